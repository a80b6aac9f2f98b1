//! The image that the tests run and the image that the Dockerfile describes are the same: user, entry point, files.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Instructions of the Dockerfile's last stage, its FROM first.
fn last_stage() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(repository().join("Dockerfile")).expect("the Dockerfile");
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
    let mut stage = Vec::new();
    for (instruction, rest) in lines {
        if instruction == "FROM" {
            stage.clear();
        }
        stage.push((instruction.to_owned(), rest.trim().to_owned()));
    }
    stage
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

#[test]
fn the_test_image_is_what_the_dockerfile_makes() {
    let folder = tempfile::tempdir().expect("a folder");
    let binary = env!("CARGO_BIN_EXE_finetune");
    let archive = folder.path().join("image.tar");
    run(Command::new(repository().join("tests/cluster/image")).args([binary, "localhost/finetune:compare"]).arg(&archive));
    let member = |name: &str| run(Command::new("tar").arg("-xOf").arg(&archive).arg(name));
    let manifest: Value = serde_json::from_slice(&member("manifest.json")).expect("a manifest");
    let config: Value = serde_json::from_slice(&member(manifest[0]["Config"].as_str().expect("a configuration"))).expect("JSON");

    // The Dockerfile's last stage starts from nothing and takes its files from the script alone.
    let stage = last_stage();
    let instruction = |name: &str| stage.iter().find(|(instruction, _)| instruction == name).map(|(_, rest)| rest.as_str()).unwrap_or_default();
    assert_eq!(stage.iter().map(|(instruction, _)| instruction.as_str()).collect::<Vec<_>>(), ["FROM", "COPY", "USER", "ENTRYPOINT"]);
    assert_eq!(instruction("FROM"), "scratch");
    assert_eq!(instruction("COPY"), "--from=build /rootfs/ /");
    let text = std::fs::read_to_string(repository().join("Dockerfile")).expect("the Dockerfile");
    assert!(text.contains("deploy/image/rootfs target/release/finetune /rootfs"), "the files come from the script");

    assert_eq!(config["config"]["User"], instruction("USER"));
    assert_eq!(config["config"]["User"], "65532:65532");
    let entrypoint: Value = serde_json::from_str(instruction("ENTRYPOINT")).expect("the JSON form");
    assert_eq!(config["config"]["Entrypoint"], entrypoint);

    let (expected, unpacked) = (folder.path().join("rootfs"), folder.path().join("unpacked"));
    run(Command::new(repository().join("deploy/image/rootfs")).arg(binary).arg(&expected));
    std::fs::create_dir(&unpacked).expect("a folder");
    let layer = folder.path().join("layer.tar");
    std::fs::write(&layer, member(manifest[0]["Layers"][0].as_str().expect("a layer"))).expect("the layer");
    run(Command::new("tar").arg("-xpf").arg(&layer).arg("-C").arg(&unpacked));
    assert_eq!(manifest[0]["Layers"].as_array().map(Vec::len), Some(1));
    assert_eq!(tree(&unpacked), tree(&expected));
    small_and_without_a_shell(&tree(&unpacked));
}

fn small_and_without_a_shell(files: &BTreeMap<String, (u32, u64)>) {
    let programs: Vec<&String> =
        files.iter().filter(|(name, (mode, size))| mode & 0o111 != 0 && *size > 0 && !name.contains(".so")).map(|(name, _)| name).collect();
    assert_eq!(programs, ["finetune"], "nothing else can be run");
    assert!(files.values().all(|(mode, _)| mode & 0o6000 == 0), "no set-user-id file");
    assert!(files.contains_key("etc/ssl/certs/ca-certificates.crt"), "object stores are reached by HTTPS");
}
