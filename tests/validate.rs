//! `finetune validate` on real manifests, datasets and models.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use finetune_testing::servers;
use serde_json::Value;

const QUICKSTART: &str = "examples/quickstart";

/// Runs `finetune validate --output json` and returns its exit code and findings.
fn validate(manifest: &Path, arguments: &[&str]) -> (i32, Value) {
    validate_with(manifest, arguments, &[])
}

/// The same with further variables.
fn validate_with(manifest: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> (i32, Value) {
    let mut command = Command::cargo_bin("finetune").unwrap();
    command.envs(environment.iter().copied()).env_remove("AWS_ENDPOINT_URL").env("AWS_ACCESS_KEY_ID", "id").env("AWS_SECRET_ACCESS_KEY", "secret");
    let output = command.arg("validate").arg(manifest).args(["--output", "json"]).args(arguments).output().unwrap();
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code().unwrap(), findings)
}

/// The texts of a list of findings.
fn texts(findings: &Value, list: &str) -> Vec<String> {
    findings[list].as_array().unwrap().iter().map(|f| f["message"].as_str().or(f.as_str()).unwrap().to_owned()).collect()
}

/// A copy of the quickstart's bucket: the model's files as links, the dataset's as copies.
fn copy_of_the_bucket(to: &Path) {
    let from = fs::canonicalize(Path::new(QUICKSTART).join("bucket")).unwrap();
    let mut folders = vec![from.clone()];
    while let Some(folder) = folders.pop() {
        let place = to.join(folder.strip_prefix(&from).unwrap());
        fs::create_dir_all(&place).unwrap();
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.components().any(|c| c.as_os_str() == "models") {
                std::os::unix::fs::symlink(&path, place.join(path.file_name().unwrap())).unwrap();
            } else {
                fs::copy(&path, place.join(path.file_name().unwrap())).unwrap();
            }
        }
    }
}

#[test]
fn buckets_are_shown_with_the_number_of_their_pictures_and_what_they_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let bucket = dir.path().join("bucket");
    copy_of_the_bucket(&bucket);
    let wide = image::RgbImage::from_pixel(300, 120, image::Rgb([9; 3]));
    let first =
        fs::read_dir(bucket.join("datasets/robi")).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "png"));
    wide.save(first.unwrap()).unwrap();
    let argument = format!("s3://quickstart={}", bucket.display());
    let job = fs::read_to_string(Path::new(QUICKSTART).join("job.yaml")).unwrap();
    let manifest = dir.path().join("job.yaml");
    let with = |buckets: &str| {
        fs::write(&manifest, job.replace("resolution: 96\n", &format!("resolution: 96\n    buckets: {buckets}\n"))).unwrap();
        validate(&manifest, &["--bucket", &argument])
    };
    let (code, findings) = with("{step: 32}");
    assert_eq!(code, 0, "{findings}");
    let said = texts(&findings, "checked").join("\n");
    assert!(said.contains("38 usable pictures in 2 buckets: 64 x 32 (1 picture), 96 x 96 (37)"), "{findings}");
    assert!(texts(&findings, "warnings").iter().any(|line| line.contains("1 of 38 pictures loses more than 10 % of the area")), "{findings}");
    // The model's table reaches to 256 pixels.
    let (code, findings) = with("{upscale: true, step: 16, minSize: 16}");
    assert_eq!((code, findings["violations"][0]["path"].as_str()), (78, Some("spec.training.buckets.maxSize")), "{findings}");
    let (code, findings) = with("{step: 96}");
    assert_eq!((code, findings["violations"][0]["path"].as_str()), (78, Some("spec.training.buckets")), "{findings}");
    assert!(texts(&findings, "violations")[0].contains("1 picture is (") && texts(&findings, "violations")[0].contains("(300 x 120)"), "{findings}");
}

#[test]
fn the_quickstart_is_valid_to_its_last_picture() {
    let manifest = Path::new(QUICKSTART).join("job.yaml");
    let (code, findings) = validate(&manifest, &["--bucket", "s3://quickstart=examples/quickstart/bucket"]);
    assert_eq!((code, findings["valid"].as_bool(), findings["jobs"].as_array().unwrap().len()), (0, Some(true), 1), "{findings}");
    assert!(texts(&findings, "checked").iter().any(|line| line.contains("38 usable pictures")), "{findings}");
    assert!(texts(&findings, "unchecked").is_empty(), "{findings}");
}

#[test]
fn what_is_wrong_with_dataset_and_model_is_said_at_once() {
    let bucket = tempfile::tempdir().unwrap();
    copy_of_the_bucket(bucket.path());
    let text = fs::read_to_string(Path::new(QUICKSTART).join("job.yaml")).unwrap();
    let job: Value = finetune_common::yaml::documents(&text).unwrap().remove(0);
    let dataset = bucket.path().join(job["spec"]["dataset"]["uri"].as_str().unwrap().strip_prefix("s3://quickstart/").unwrap());
    let metadata = dataset.join("metadata.jsonl");
    let lines = fs::read_to_string(&metadata).unwrap();
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    let picture = first["file_name"].as_str().unwrap();
    fs::write(dataset.join(picture), b"no picture").unwrap();
    fs::write(&metadata, format!("{lines}{{\"file_name\": \"../secret.png\", \"caption\": \"x\"}}\nnonsense\n")).unwrap();
    let model = bucket.path().join(job["spec"]["model"]["source"]["objectStore"]["uri"].as_str().unwrap().strip_prefix("s3://quickstart/").unwrap());
    fs::remove_file(model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();

    let argument = format!("s3://quickstart={}", bucket.path().display());
    let (code, findings) = validate(&Path::new(QUICKSTART).join("job.yaml"), &["--bucket", &argument]);
    assert_eq!(code, i32::from(finetune_api::Reason::InvalidConfig.exit_code()), "{findings}");
    let said = texts(&findings, "violations").join("\n");
    let count = lines.lines().count();
    for part in [picture, "line 1:", &format!("line {}:", count + 1), &format!("line {}:", count + 2), "stay in the dataset's folder", "no weights", "vae/"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }

    let (code, findings) = validate(&Path::new(QUICKSTART).join("job.yaml"), &["--bucket", &argument, "--offline"]);
    assert_eq!((code, texts(&findings, "checked").len()), (0, 0), "{findings}");
}

/// The pictures of `validation.datasetUri` are looked at as the dataset's are.
#[test]
fn a_broken_picture_among_the_held_out_ones_is_named() {
    let bucket = tempfile::tempdir().unwrap();
    copy_of_the_bucket(bucket.path());
    let text = fs::read_to_string(Path::new(QUICKSTART).join("job.yaml")).unwrap();
    let job: Value = finetune_common::yaml::documents(&text).unwrap().remove(0);
    let held_out = bucket.path().join(job["spec"]["validation"]["datasetUri"].as_str().unwrap().strip_prefix("s3://quickstart/").unwrap());
    let picture = fs::read_dir(&held_out).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "png")).unwrap();
    fs::write(&picture, "<!DOCTYPE html><title>Not found</title>").unwrap();
    let (code, findings) = validate(&Path::new(QUICKSTART).join("job.yaml"), &["--bucket", &format!("s3://quickstart={}", bucket.path().display())]);
    assert_eq!(code, i32::from(finetune_api::Reason::InvalidConfig.exit_code()), "{findings}");
    let violation = &findings["violations"][0];
    assert_eq!(violation["path"], "spec.validation.datasetUri", "{findings}");
    for part in [picture.file_name().unwrap().to_str().unwrap(), "an HTML page"] {
        assert!(violation["message"].as_str().unwrap().contains(part), "{findings}");
    }
}

/// The server is asked as a proxy, so that names which nobody resolves come to it as they are.
#[test]
fn the_bucket_goes_in_front_of_the_endpoints_host_where_the_job_says_so() {
    let server = servers::gofakes3();
    let port = server.endpoint.rsplit(':').next().unwrap().parse().unwrap();
    let dataset = Path::new(QUICKSTART).join("bucket/datasets/robi");
    for entry in fs::read_dir(&dataset).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(servers::http(port, "PUT", &format!("/{}/robi/{name}", servers::BUCKET), &[], &fs::read(&path).unwrap()), Some(200));
    }
    let text = fs::read_to_string(Path::new(QUICKSTART).join("job.yaml")).unwrap();
    let mut job: Value = finetune_common::yaml::documents(&text).unwrap().remove(0);
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("job.yaml");
    let mut check = |style: Value, variable: &str| {
        job["spec"]["dataset"]["uri"] = format!("s3://{}/robi/", servers::BUCKET).into();
        job["spec"]["storage"] = serde_json::json!({"endpoint": format!("http://{}", servers::VIRTUAL_HOST), "region": "x", "addressingStyle": style});
        fs::write(&manifest, finetune_common::yaml::to_string(&job).unwrap()).unwrap();
        let proxy = server.endpoint.as_str();
        let environment = [("http_proxy", proxy), ("no_proxy", ""), ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", variable)];
        let (code, findings) = validate_with(&manifest, &["--bucket", "s3://quickstart=examples/quickstart/bucket"], &environment);
        (code, findings.to_string())
    };
    for (style, variable) in [("VirtualHost", "false"), ("VirtualHost", "true"), ("Path", "true")] {
        let (code, findings) = check(style.into(), variable);
        assert!(code == 0 && findings.contains("38 usable pictures"), "{style}, {variable}: {findings}");
    }
    let (code, findings) = check(Value::Null, "true");
    assert!(code == 78 && findings.contains("AWS_VIRTUAL_HOSTED_STYLE_REQUEST"), "{findings}");
}

#[test]
fn a_store_that_does_not_answer_is_no_mistake_of_the_manifest() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("job.yaml");
    let text = fs::read_to_string(Path::new(QUICKSTART).join("job.yaml")).unwrap();
    let mut job: Value = finetune_common::yaml::documents(&text).unwrap().remove(0);
    job["spec"]["storage"] = serde_json::json!({"endpoint": format!("http://127.0.0.1:{port}"), "region": "x"});
    fs::write(&manifest, finetune_common::yaml::to_string(&job).unwrap()).unwrap();
    let (code, findings) = validate(&manifest, &[]);
    assert_eq!(code, 0, "{findings}");
    let unchecked = texts(&findings, "unchecked").join("\n");
    assert!(unchecked.contains("dataset was not checked") && unchecked.contains("model was not checked"), "{findings}");
}
