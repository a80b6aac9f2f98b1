//! `identity.json`: which run a checkpoint prefix belongs to.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{CheckpointError, read_optional};
use finetune_store::{Created, Store};

/// The name below the checkpoint prefix.
pub(super) const FILE_NAME: &str = "identity.json";

/// The version of the file that is written.
const VERSION: u32 = 2;

/// What a run is made from, by content: `sha256:<hex>` each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digests {
    /// Metadata and pictures.
    pub dataset: String,
    /// The base model's files.
    pub model: String,
}

/// The run that a checkpoint prefix belongs to. A neighbouring version of this program may write more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// 2; files of version 1 do not say.
    #[serde(default = "one")]
    version: u32,
    /// `sha256:<hex>` of what determines the weights.
    pub(super) spec_hash: String,
    /// `sha256:<hex>` of metadata and pictures.
    pub(super) dataset_digest: String,
    /// `sha256:<hex>` of the base model's files; absent in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) model_digest: Option<String>,
    /// Where the results go.
    pub(super) output: String,
    /// The run that began: UID of the FineTuneJob, or `local-…` without a cluster; absent in version 1. What `resume.policy: Never` means by
    /// another job's checkpoints; nothing else is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) run: Option<String>,
}

fn one() -> u32 {
    1
}

/// The prefix belongs to another run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Another dataset under the same spec.
    #[error(
        "the dataset has changed since this run began: it was {began}, it is {now}. Restore the dataset, or begin anew with \
         resume.policy: Never or another output.uri (checkpoints: {uri})"
    )]
    DatasetChanged {
        /// The prefix.
        uri: String,
        /// The digest that the run began with.
        began: String,
        /// The digest now.
        now: String,
    },
    /// Another base model under the same spec.
    #[error(
        "the base model has changed since this run began: it was {began}, it is {now}. Restore the model's files, or begin anew with \
         resume.policy: Never or another output.uri (checkpoints: {uri})"
    )]
    ModelChanged {
        /// The prefix.
        uri: String,
        /// The digest that the run began with.
        began: String,
        /// The digest now.
        now: String,
    },
    /// Another spec or output.
    #[error("the checkpoint prefix {uri} belongs to another run ({what} {theirs}, not {ours}): use another checkpoint.uri")]
    Foreign {
        /// The prefix.
        uri: String,
        /// What differs.
        what: &'static str,
        /// Theirs.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// Checkpoints without an identity: nobody knows whose.
    #[error(
        "the checkpoint prefix {uri} holds files that have the names of checkpoints ({key}) and no identity.json that says whose they are; \
         a run would overwrite them: use another checkpoint.uri, or move them away"
    )]
    Unclaimed {
        /// The prefix.
        uri: String,
        /// One of the files.
        key: String,
    },
    /// The file cannot be understood.
    #[error("failed to understand identity.json in {uri}: use another checkpoint.uri or delete that prefix")]
    Unreadable {
        /// The prefix.
        uri: String,
    },
}

impl Identity {
    /// Of the run of a spec, by its hash, on this dataset and model, whose results go to `output`; `run` is its id.
    pub fn new(spec_hash: String, digests: Digests, output: String, run: String) -> Self {
        let Digests { dataset, model } = digests;
        Self { version: VERSION, spec_hash, dataset_digest: dataset, model_digest: Some(model), output, run: Some(run) }
    }

    /// Whether the same run wrote `other`.
    pub(super) fn is_of_the_same_run(&self, other: &Self) -> bool {
        self.run.is_some() && self.run == other.run
    }

    /// What the run is made from.
    pub(super) fn digests(&self) -> Digests {
        Digests { dataset: self.dataset_digest.clone(), model: self.model_digest.clone().unwrap_or_default() }
    }

    /// Whether a run has taken the prefix.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn is_at(store: &Store) -> Result<bool, CheckpointError> {
        Ok(store.head(FILE_NAME).await?.is_some())
    }

    /// The identity that is there.
    pub(super) async fn read(store: &Store) -> Result<Option<Self>, CheckpointError> {
        let Some(bytes) = read_optional(store, FILE_NAME).await? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&bytes).map_err(|_| IdentityError::Unreadable { uri: store.uri().to_owned() })?))
    }

    /// Writes the identity into a prefix that has none; where another attempt was first, compares.
    pub(super) async fn create(&self, store: &Store) -> Result<(), CheckpointError> {
        if matches!(store.create(FILE_NAME, self.to_json()?).await?, Created::Yes) {
            return Ok(());
        }
        match Self::read(store).await? {
            Some(theirs) => Ok(self.compare(&theirs, store.uri())?),
            None => Err(IdentityError::Unreadable { uri: store.uri().to_owned() }.into()),
        }
    }

    /// Writes the identity in place of an earlier one of the same run.
    pub(super) async fn replace(&self, store: &Store) -> Result<(), CheckpointError> {
        Ok(store.put(FILE_NAME, self.to_json()?).await?)
    }

    fn to_json(&self) -> Result<Bytes, CheckpointError> {
        serde_json::to_vec_pretty(self).map(Bytes::from).map_err(|source| CheckpointError::Json { file: FILE_NAME, source })
    }

    /// Whether the prefix at `uri` belongs to this run.
    pub(super) fn compare(&self, theirs: &Self, uri: &str) -> Result<(), IdentityError> {
        self.compare_spec_and_output(theirs, uri)?;
        if theirs.dataset_digest != self.dataset_digest {
            return Err(IdentityError::DatasetChanged { uri: uri.to_owned(), began: theirs.dataset_digest.clone(), now: self.dataset_digest.clone() });
        }
        match (&theirs.model_digest, &self.model_digest) {
            (Some(began), Some(now)) if began != now => Err(IdentityError::ModelChanged { uri: uri.to_owned(), began: began.clone(), now: now.clone() }),
            _ => Ok(()),
        }
    }

    /// Whether the prefix at `uri` belongs to this run, whatever its dataset and model were then.
    pub(super) fn compare_spec_and_output(&self, theirs: &Self, uri: &str) -> Result<(), IdentityError> {
        for (what, theirs, ours) in [("spec", &theirs.spec_hash, &self.spec_hash), ("output", &theirs.output, &self.output)] {
            if theirs != ours {
                return Err(IdentityError::Foreign { uri: uri.to_owned(), what, theirs: theirs.clone(), ours: ours.clone() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_dataset_and_a_foreign_run_are_told_apart() {
        let digests = Digests { dataset: "b".into(), model: "m".into() };
        let ours = Identity::new("a".into(), digests, "s3://x/y/".into(), "uid".into());
        let compare = |theirs: Identity| ours.compare(&theirs, "u");
        assert_eq!(compare(ours.clone()), Ok(()));
        assert!(matches!(compare(Identity { dataset_digest: "c".into(), ..ours.clone() }), Err(IdentityError::DatasetChanged { .. })));
        assert!(matches!(compare(Identity { model_digest: Some("n".into()), ..ours.clone() }), Err(IdentityError::ModelChanged { .. })));
        assert!(matches!(compare(Identity { spec_hash: "c".into(), ..ours.clone() }), Err(IdentityError::Foreign { what: "spec", .. })));
        assert!(matches!(compare(Identity { output: "c".into(), ..ours.clone() }), Err(IdentityError::Foreign { what: "output", .. })));
    }

    /// As version 1 wrote it, and as a later version may.
    #[test]
    fn files_of_neighbouring_versions_are_read() {
        let old: Identity = serde_json::from_str(r#"{"specHash": "a", "datasetDigest": "b", "output": "s3://x/y/"}"#).unwrap();
        assert_eq!((old.version, &old.model_digest), (1, &None));
        let ours = Identity::new("a".into(), Digests { dataset: "b".into(), model: "m".into() }, "s3://x/y/".into(), "uid".into());
        assert_eq!(ours.compare(&old, "u"), Ok(()));
        let mut later = serde_json::to_value(&ours).unwrap();
        later["more"] = serde_json::json!({"x": 1});
        assert_eq!(serde_json::from_value::<Identity>(later).unwrap(), ours);
    }
}
