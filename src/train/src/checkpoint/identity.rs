//! `identity.json`: which run a checkpoint prefix belongs to.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{CheckpointError, read_optional};
use finetune_store::{Created, Store};

/// The name below the checkpoint prefix.
pub(super) const FILE_NAME: &str = "identity.json";

/// The run that a checkpoint prefix belongs to; created once, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Identity {
    /// `sha256:<hex>` of what determines the weights.
    pub spec_hash: String,
    /// `sha256:<hex>` of metadata and pictures.
    pub dataset_digest: String,
    /// Where the results go.
    pub output: String,
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
        let text = serde_json::to_vec_pretty(self).map_err(|source| CheckpointError::Json { file: FILE_NAME, source })?;
        if matches!(store.create(FILE_NAME, Bytes::from(text)).await?, Created::Yes) {
            return Ok(());
        }
        match Self::read(store).await? {
            Some(theirs) => Ok(self.compare(&theirs, store.uri())?),
            None => Err(IdentityError::Unreadable { uri: store.uri().to_owned() }.into()),
        }
    }

    /// Whether the prefix at `uri` belongs to this run.
    pub(super) fn compare(&self, theirs: &Self, uri: &str) -> Result<(), IdentityError> {
        self.compare_spec_and_output(theirs, uri)?;
        if theirs.dataset_digest == self.dataset_digest {
            return Ok(());
        }
        Err(IdentityError::DatasetChanged { uri: uri.to_owned(), began: theirs.dataset_digest.clone(), now: self.dataset_digest.clone() })
    }

    /// Whether the prefix at `uri` belongs to this run, whatever its dataset was then.
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
        let ours = Identity { spec_hash: "a".into(), dataset_digest: "b".into(), output: "s3://x/y/".into() };
        let compare = |theirs: Identity| ours.compare(&theirs, "u");
        assert_eq!(compare(ours.clone()), Ok(()));
        assert!(matches!(compare(Identity { dataset_digest: "c".into(), ..ours.clone() }), Err(IdentityError::DatasetChanged { .. })));
        assert!(matches!(compare(Identity { spec_hash: "c".into(), ..ours.clone() }), Err(IdentityError::Foreign { what: "spec", .. })));
        assert!(matches!(compare(Identity { output: "c".into(), ..ours.clone() }), Err(IdentityError::Foreign { what: "output", .. })));
    }
}
