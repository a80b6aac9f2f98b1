//! What a run has besides its configuration: stores, folders, the wish to stop, somebody to tell.

use std::path::PathBuf;
use std::time::Duration;

use super::interrupt::Interrupt;
use super::log::LogTail;
use super::report::Reporter;
use finetune_api::ModelFiles;
use finetune_api::plan::{ModelConfig, ModelSource, StorageConfig, TrainConfig};
use finetune_store::{AddressingStyle, Buckets, Environment, RetryPolicy, StoreError, StoreOptions, model_source};

/// What a run has besides its configuration.
#[derive(Clone)]
pub struct JobEnvironment {
    /// Directories that stand in for buckets.
    pub buckets: Buckets,
    /// Folder for downloads and prepared data.
    pub cache_dir: PathBuf,
    /// A name for people to see in claims: the pod or the host.
    pub owner: String,
    /// Which run this is an attempt of: the UID of the FineTuneJob, or [`finetune_store::claims::Run::local_id`].
    pub run_id: String,
    /// How long another job at the same output may be silent before it is taken for dead.
    pub claim_lease: Duration,
    /// The wish to stop.
    pub interrupt: Interrupt,
    /// Somebody to tell.
    pub reporter: Reporter,
    /// The end of the process's log.
    pub log: LogTail,
}

impl JobEnvironment {
    /// How the run's own stores are reached.
    pub fn store_options(&self, config: &TrainConfig) -> StoreOptions {
        let own = config.storage.clone().unwrap_or_default();
        options(&own, credentials(&own, &own, variables()), &self.buckets)
    }

    /// Where the model is, and how that is reached.
    pub fn model_source(&self, config: &TrainConfig) -> (model_source::ModelSource, StoreOptions) {
        model_source(config, &self.buckets)
    }

    /// Opens a prefix of the run's own stores.
    ///
    /// # Errors
    /// If the location cannot be used.
    pub fn open(&self, uri: &str, config: &TrainConfig) -> Result<finetune_store::Store, StoreError> {
        finetune_store::Store::open(uri, &self.store_options(config))
    }
}

/// Where a run's model is, and how that is reached.
pub fn model_source(config: &TrainConfig, buckets: &Buckets) -> (model_source::ModelSource, StoreOptions) {
    let ModelConfig { source, files: _, cache_dir: _ } = &config.model;
    let own = config.storage.clone().unwrap_or_default();
    let of = |storage: &StorageConfig| options(storage, credentials(storage, &own, variables()), buckets);
    match source {
        ModelSource::HuggingFace { repo, revision } => (model_source::ModelSource::HuggingFace { repo: repo.clone(), revision: revision.clone() }, of(&own)),
        ModelSource::Directory { path } => (model_source::ModelSource::Directory(path.clone()), of(&own)),
        ModelSource::ObjectStore { uri, sha256_manifest, storage } => {
            let (folder, _) = single_file(uri).unwrap_or((uri, ""));
            let source = model_source::ModelSource::ObjectStore { uri: folder.to_owned(), sha256_manifest: sha256_manifest.clone() };
            (source, of(storage.as_ref().unwrap_or(&own)))
        }
    }
}

/// Which file of the model holds which part, where they are not in diffusers' layout: as the job says, and by the name of a single file.
pub fn model_files(config: &ModelConfig) -> Option<ModelFiles> {
    let single = match &config.source {
        ModelSource::ObjectStore { uri, .. } => single_file(uri).map(|(_, name)| name.to_owned()),
        ModelSource::HuggingFace { .. } | ModelSource::Directory { .. } => None,
    };
    match (config.files.clone(), single) {
        (files, None) => files,
        (files, single) => Some(ModelFiles { transformer: single, ..files.unwrap_or_default() }),
    }
}

/// The folder and the name of a location that is a single file.
fn single_file(uri: &str) -> Option<(&str, &str)> {
    let at = uri.rfind('/').filter(|_| uri.ends_with(".safetensors"))? + 1;
    Some(uri.split_at(at))
}

/// Bounds of retrying; `FINETUNE_STORAGE_RETRY_SECONDS` changes how long a request is tried before the run gives up.
fn retry() -> RetryPolicy {
    let seconds = std::env::var("FINETUNE_STORAGE_RETRY_SECONDS").ok().and_then(|text| text.parse().ok());
    let policy = RetryPolicy::default();
    RetryPolicy { total: seconds.map_or(policy.total, Duration::from_secs), ..policy }
}

fn options(storage: &StorageConfig, environment: Environment, buckets: &Buckets) -> StoreOptions {
    let StorageConfig { endpoint, addressing_style, region, ca_bundle, credentials_prefix: _ } = storage.clone();
    let addressing_style = addressing_style.map(|style| match style {
        finetune_api::AddressingStyle::Path => AddressingStyle::Path,
        finetune_api::AddressingStyle::VirtualHost => AddressingStyle::VirtualHost,
    });
    StoreOptions { endpoint, addressing_style, region, ca_bundle, buckets: buckets.clone(), environment, retry: retry() }
}

/// How storage is reached that belongs to no run, with the credentials of the process's variables.
pub fn options_of(storage: &StorageConfig, buckets: &Buckets) -> StoreOptions {
    options(storage, credentials(storage, storage, variables()), buckets)
}

/// The process's variables; those that are not UTF-8 are nobody's credentials.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Variables that name the identity of the workload, which is the provider's own and holds for the provider's own endpoint alone.
const WORKLOAD_IDENTITY: [&str; 14] = [
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AZURE_CLIENT_ID",
    "AZURE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_AUTHORITY_HOST",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "GOOGLE_APPLICATION_CREDENTIALS",
];
/// No credentials at all: without these, a client without keys asks the node for its identity and sends that.
const UNSIGNED: [(&str, &str); 3] = [("AWS_SKIP_SIGNATURE", "true"), ("GOOGLE_SKIP_SIGNATURE", "true"), ("AZURE_SKIP_SIGNATURE", "true")];

/// The variables that a request to `storage` may use. Credentials that are named for it; else, at the server of the run's `own` storage, all variables; at
/// any other server nothing that a server could use elsewhere: the workload's identity at the provider's own endpoint, no signature at another one.
fn credentials(storage: &StorageConfig, own: &StorageConfig, variables: impl Iterator<Item = (String, String)>) -> Environment {
    if let Some(prefix) = &storage.credentials_prefix {
        return Environment::from_pairs(variables.filter_map(|(name, value)| Some((name.strip_prefix(prefix.as_str())?.to_owned(), value))));
    }
    if finetune_store::same_server(storage.endpoint.as_deref(), own.endpoint.as_deref()) {
        return Environment::of_user(variables);
    }
    let (identity, unsigned) = match &storage.endpoint {
        None => (&WORKLOAD_IDENTITY[..], &[][..]),
        Some(endpoint) => {
            tracing::info!(endpoint, "the model's server is not that of spec.storage and no credentials are named for it: requests to it are not signed");
            (&["AZURE_STORAGE_ACCOUNT_NAME"][..], &UNSIGNED[..])
        }
    };
    let kept = variables.filter(|(name, _)| identity.contains(&name.as_str()) || name.ends_with("_CA_BUNDLE"));
    Environment::from_pairs(kept.chain(unsigned.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "https://own.example.com";

    fn storage(endpoint: Option<&str>, prefix: Option<&str>) -> StorageConfig {
        StorageConfig { endpoint: endpoint.map(str::to_owned), credentials_prefix: prefix.map(str::to_owned), ..StorageConfig::default() }
    }

    /// What a request to the model's storage may use of `NAME=value` variables.
    fn used(model: &StorageConfig, own: Option<&str>, name: &str) -> Option<String> {
        let variables = ["AWS_SECRET_ACCESS_KEY", "MODEL_AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_SAS_KEY", "AWS_ROLE_ARN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL"];
        let variables = variables.iter().map(|name| ((*name).to_owned(), format!("the {name}")));
        credentials(model, &storage(own, None), variables).get(name).map(str::to_owned)
    }

    #[test]
    fn credentials_of_one_server_never_go_to_another() {
        let secret = "AWS_SECRET_ACCESS_KEY";
        for (model, own, expected) in [
            (None, None, true),
            (Some(OWN), Some(OWN), true),
            (Some("https://OWN.example.com:443/"), Some(OWN), true),
            (Some("http://own.example.com"), Some(OWN), false),
            (Some("https://own.example.com:444"), Some(OWN), false),
            (Some("https://own.example.com/tenant"), Some(OWN), false),
            (Some("https://other.example.com"), Some(OWN), false),
            (Some("https://other.example.com"), None, false),
            (Some("not an address"), Some("not an address"), false),
            (None, Some(OWN), false),
        ] {
            let model = storage(model, None);
            assert_eq!(used(&model, own, secret).is_some(), expected, "{model:?} beside {own:?}");
            assert_eq!(used(&model, own, "AZURE_STORAGE_SAS_KEY").is_some(), expected, "{model:?} beside {own:?}");
            assert_eq!(used(&model, own, "AWS_ENDPOINT_URL").is_some(), expected, "{model:?} beside {own:?}");
            assert!(used(&model, own, "AWS_CA_BUNDLE").is_some());
        }
    }

    #[test]
    fn a_single_file_is_its_folder_and_its_name() {
        assert_eq!(single_file("s3://b/models/sd3.safetensors"), Some(("s3://b/models/", "sd3.safetensors")));
        assert_eq!(single_file("s3://b/sd3.safetensors"), Some(("s3://b/", "sd3.safetensors")));
        assert_eq!(single_file("s3://b/sd3.safetensors/"), None);
    }

    #[test]
    fn named_credentials_are_used_and_no_others() {
        for endpoint in [None, Some(OWN), Some("https://other.example.com")] {
            let named = storage(endpoint, Some("MODEL_"));
            assert_eq!(used(&named, Some(OWN), "AWS_SECRET_ACCESS_KEY").as_deref(), Some("the MODEL_AWS_SECRET_ACCESS_KEY"));
            assert_eq!((used(&named, Some(OWN), "AWS_ROLE_ARN"), used(&named, Some(OWN), "AWS_SKIP_SIGNATURE")), (None, None));
        }
    }

    #[test]
    fn the_workloads_identity_is_for_the_providers_own_endpoint() {
        let provider = storage(None, None);
        assert!(used(&provider, Some(OWN), "AWS_ROLE_ARN").is_some());
        assert_eq!(used(&provider, Some(OWN), "AWS_SKIP_SIGNATURE"), None);
        let other = storage(Some("https://other.example.com"), None);
        assert_eq!(used(&other, Some(OWN), "AWS_ROLE_ARN"), None);
        for (name, value) in UNSIGNED {
            assert_eq!(used(&other, Some(OWN), name).as_deref(), Some(value));
        }
    }
}
