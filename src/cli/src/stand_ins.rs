//! `--bucket s3://NAME=DIR`: a name that the manifest does not have is a slip, and must not end as a question to a cloud.

use finetune_api::plan::{ModelSource, StorageConfig, TrainConfig};
use finetune_store::{Buckets, Location, Scheme};

/// Variables that name another server than the provider's own.
const ENDPOINTS: [&str; 6] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"];

/// Checks the stand-ins against the buckets of the job.
///
/// # Errors
/// A stand-in that no location of the job is in, beside a bucket without one that a public cloud would be asked for.
pub(super) fn check(config: &TrainConfig, buckets: &Buckets) -> Result<(), String> {
    let elsewhere = ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some());
    check_with(config, buckets, elsewhere)
}

fn check_with(config: &TrainConfig, buckets: &Buckets, elsewhere: bool) -> Result<(), String> {
    let mut used = Vec::new();
    let mut asked = Vec::new();
    for (uri, storage) in locations(config) {
        let Ok(Location::Bucket { scheme, bucket, .. }) = Location::parse(uri) else { continue };
        let name = format!("{}://{bucket}", scheme.as_str());
        if buckets.directory(scheme, &bucket).is_some() {
            used.push(name);
        } else if !elsewhere && storage.is_none_or(|storage| storage.endpoint.is_none()) {
            asked.push(name);
        }
    }
    let unused: Vec<String> =
        buckets.names().map(|(scheme, bucket): (Scheme, &str)| format!("{}://{bucket}", scheme.as_str())).filter(|name| !used.contains(name)).collect();
    asked.sort_unstable();
    asked.dedup();
    if unused.is_empty() || asked.is_empty() {
        return Ok(());
    }
    Err(format!("--bucket: nothing of the job is in {}; no stand-in is given for {}", unused.join(", "), asked.join(", ")))
}

/// Every location of the job, and how its store is reached.
fn locations(config: &TrainConfig) -> Vec<(&str, Option<&StorageConfig>)> {
    let own = config.storage.as_ref();
    let mut all = vec![(config.dataset.uri.as_str(), own), (&config.output.uri, own), (&config.checkpoint.uri, own)];
    if let ModelSource::ObjectStore { uri, storage, .. } = &config.model.source {
        all.push((uri, storage.as_ref().or(own)));
    }
    if let Some(uri) = config.validation.as_ref().and_then(|validation| validation.dataset_uri.as_ref()) {
        all.push((uri, own));
    }
    all.extend(config.resume.from_checkpoint.iter().map(|uri| (uri.as_str(), own)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_api::FineTuneJobSpec;
    use finetune_api::plan::{Facts, resolve};

    fn config(storage: &serde_json::Value) -> TrainConfig {
        let spec: FineTuneJobSpec = serde_json::from_value(serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://models/m/"}}}, "dataset": {"uri": "s3://box/d/"}, "output": {"uri": "s3://box/o/"}, "storage": storage,
        }))
        .unwrap();
        resolve(&spec, "n", "j", &Facts::default()).unwrap().config
    }

    #[test]
    fn a_misspelt_stand_in_is_named_before_a_cloud_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let given = |names: &[&str]| Buckets::parse(&names.iter().map(|name| format!("s3://{name}={}", folder.path().display())).collect::<Vec<_>>()).unwrap();
        let own = config(&serde_json::Value::Null);
        let message = check_with(&own, &given(&["models", "bxo"]), false).unwrap_err();
        assert!(message.contains("in s3://bxo") && message.contains("for s3://box"), "{message}");
        // Some in the cloud and some here is a choice, and so is a server that is named.
        for (config, names, elsewhere) in [
            (&own, &["models"][..], false),
            (&own, &["models", "box"], false),
            (&own, &["models", "box", "more"], false),
            (&own, &["models", "bxo"], true),
            (&config(&serde_json::json!({"endpoint": "http://127.0.0.1:1"})), &["models", "bxo"], false),
            (&own, &[], false),
        ] {
            assert_eq!(check_with(config, &given(names), elsewhere), Ok(()), "{names:?}");
        }
    }
}
