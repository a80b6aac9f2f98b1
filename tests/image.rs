//! The image that the tests run and the image that the Dockerfile describes are the same: user, entry point, files.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use finetune_testing::programs::repository;
use serde_json::Value;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Instructions of one stage of the Dockerfile, its FROM first.
fn instructions(stage: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(repository().join("Dockerfile")).expect("the Dockerfile");
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
    let mut within = false;
    let mut found = Vec::new();
    for (instruction, rest) in lines {
        if instruction == "FROM" {
            within = rest.ends_with(&format!(" AS {stage}"));
        }
        if within {
            found.push((instruction.to_owned(), rest.trim().to_owned()));
        }
    }
    found
}

/// Path below `root` -> (mode, size), for files and folders.
fn tree(root: &Path) -> BTreeMap<String, (u32, u64)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").filter_map(Result::ok) {
            let meta = entry.metadata().expect("metadata");
            let size = if meta.is_dir() { 0 } else { meta.len() };
            let name = entry.path().strip_prefix(root).expect("below the root").display().to_string();
            found.insert(name, (meta.permissions().mode() & 0o7777, size));
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found
}

/// The image that the tests put together from `stage` has the Dockerfile's user, entry point, environment and files; the files.
fn same_as_the_dockerfile(stage: &str, build: &str, libraries: &[&str]) -> BTreeMap<String, (u32, u64)> {
    let folder = tempfile::tempdir().expect("a folder");
    let binary = env!("CARGO_BIN_EXE_finetune");
    let archive = folder.path().join("image.tar");
    run(Command::new(repository().join("tests/testbed/image")).args([binary, "localhost/finetune:compare"]).arg(&archive).arg(stage).args(libraries));
    let member = |name: &str| run(Command::new("tar").arg("-xOf").arg(&archive).arg(name));
    let manifest: Value = serde_json::from_slice(&member("manifest.json")).expect("a manifest");
    let config: Value = serde_json::from_slice(&member(manifest[0]["Config"].as_str().expect("a configuration"))).expect("JSON");

    // The stage starts from nothing and takes its files from the script alone.
    let lines = instructions(stage);
    let all = |name: &str| lines.iter().filter(|(instruction, _)| instruction == name).map(|(_, rest)| rest.clone()).collect::<Vec<_>>();
    let kinds: Vec<&str> = lines.iter().map(|(instruction, _)| instruction.as_str()).filter(|instruction| *instruction != "ENV").collect();
    assert_eq!(kinds, ["FROM", "COPY", "USER", "ENTRYPOINT"]);
    assert_eq!(all("FROM"), [format!("scratch AS {stage}")]);
    assert_eq!(all("COPY"), [format!("--from={build} /rootfs/ /")]);
    let text = std::fs::read_to_string(repository().join("Dockerfile")).expect("the Dockerfile");
    let script = text.split("FROM ").find(|part| part.starts_with(&format!("sources AS {build}\n"))).expect("the stage that builds");
    assert!(script.contains("&& deploy/image/rootfs target"), "the files come from the script");

    assert_eq!(all("USER"), ["65532:65532"]);
    assert_eq!(config["config"]["User"], all("USER")[0].as_str());
    let entrypoint: Value = serde_json::from_str(&all("ENTRYPOINT")[0]).expect("the JSON form");
    assert_eq!(config["config"]["Entrypoint"], entrypoint);
    let environment: Vec<&str> = config["config"]["Env"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert!(environment[0].starts_with("PATH="), "what container engines add");
    assert_eq!(environment[1..], all("ENV"));

    let (expected, unpacked) = (folder.path().join("rootfs"), folder.path().join("unpacked"));
    run(Command::new(repository().join("deploy/image/rootfs")).arg(binary).arg(&expected).args(libraries));
    std::fs::create_dir(&unpacked).expect("a folder");
    let layer = folder.path().join("layer.tar");
    std::fs::write(&layer, member(manifest[0]["Layers"][0].as_str().expect("a layer"))).expect("the layer");
    run(Command::new("tar").arg("-xpf").arg(&layer).arg("-C").arg(&unpacked));
    assert_eq!(manifest[0]["Layers"].as_array().map(Vec::len), Some(1));
    assert_eq!(tree(&unpacked), tree(&expected));
    small_and_without_a_shell(&tree(&unpacked));
    tree(&unpacked)
}

#[test]
fn the_test_image_is_what_the_dockerfile_makes() {
    let files = same_as_the_dockerfile("operator", "build", &[]);
    assert!(files.keys().all(|name| !name.starts_with("usr/local/cuda")), "no CUDA in the operator's image");
    let text = std::fs::read_to_string(repository().join("Dockerfile")).expect("the Dockerfile");
    let last = text.lines().rfind(|line| line.starts_with("FROM ")).expect("a stage");
    assert_eq!(last, "FROM scratch AS operator", "a build without a target makes the operator's image");
}

#[test]
fn the_image_for_gpus_finds_its_libraries() {
    // Any shared library stands for cuBLASLt here, which has half a gigabyte.
    let said = String::from_utf8(run(Command::new("ldd").arg(env!("CARGO_BIN_EXE_finetune")))).expect("text");
    let library = said.split_whitespace().find(|word| word.starts_with('/') && word.contains("libgcc_s")).expect("a library");
    let files = same_as_the_dockerfile("trainer-cuda", "build-cuda", &[library]);
    let name = library.rsplit('/').next().expect("a name");
    let environment: Vec<String> = instructions("trainer-cuda").into_iter().filter(|(instruction, _)| instruction == "ENV").map(|(_, pair)| pair).collect();
    let path = environment.iter().find_map(|pair| pair.strip_prefix("LD_LIBRARY_PATH=")).expect("LD_LIBRARY_PATH");
    assert!(path.split(':').any(|folder| files.contains_key(&format!("{}/{name}", folder.trim_start_matches('/')))), "{path} does not lead to {name}");
    assert!(environment.contains(&"NVIDIA_DRIVER_CAPABILITIES=compute,utility".to_owned()), "what the node's runtime mounts");
    for needed in ["libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6"] {
        assert!(files.keys().any(|file| file.ends_with(needed)), "the driver needs {needed}");
    }
}

fn small_and_without_a_shell(files: &BTreeMap<String, (u32, u64)>) {
    let programs: Vec<&String> =
        files.iter().filter(|(name, (mode, size))| mode & 0o111 != 0 && *size > 0 && !name.contains(".so")).map(|(name, _)| name).collect();
    assert_eq!(programs, ["finetune"], "nothing else can be run");
    assert!(files.values().all(|(mode, _)| mode & 0o6000 == 0), "no set-user-id file");
    assert!(files.contains_key("etc/ssl/certs/ca-certificates.crt"), "object stores are reached by HTTPS");
}
