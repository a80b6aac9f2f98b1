//! Checkpoints: objects plus a manifest written last, fenced by claims. See `docs/concepts/checkpoints.md`.
//!
//! # Guarantees
//! - A reader sees a whole checkpoint or none: files come first, the manifest with their digests last, and a checkpoint
//!   whose files do not match is passed over for the one before it.
//! - Attempts never write into each other's folders (`step-S/eN/`, N being the claim).
//! - Before each manifest and each deletion the claims are listed; an attempt that finds a newer one stops and deletes nothing.
//! - Nothing is deleted but what this run has written: see `inventory`.

mod due;
mod identity;
mod inventory;
mod own;
mod place;
mod snapshot;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

pub use due::Due;
pub use identity::{Digests, Identity, IdentityError};
pub use inventory::LeftAlone;
pub(super) use inventory::some_of;
pub use own::{Key, log_folder};
pub use place::{Label, Place};
pub use snapshot::{ExecutionPlan, LORA_FILE, METRICS_FILE, Snapshot, SnapshotError, State};

use self::inventory::{Inventory, Ownership};
use super::result::RunResult;
use finetune_store::claims::Claim;
use finetune_store::manifest::{self, Content, Verified};
use finetune_store::{ObjectInfo, Store, StoreError};

/// Where prepared embeddings and latents lie below the checkpoint prefix.
pub const PREPARED: &str = "prepared/";

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store failed, or a newer attempt has taken over.
    #[error("failed to use the checkpoints")]
    Store(#[from] StoreError),
    /// The snapshot cannot be written.
    #[error("failed to write a checkpoint")]
    Snapshot(#[from] SnapshotError),
    /// A small file cannot be written.
    #[error("failed to write {file}")]
    Json {
        /// The file.
        file: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The prefix belongs to another run.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No usable checkpoint where one was demanded.
    #[error("found no complete checkpoint in {uri}")]
    NotFound {
        /// Where.
        uri: String,
    },
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Updates done.
    pub step: u64,
    /// Its folder's URI.
    pub uri: String,
    /// `sha256:<hex>` of the manifest, which holds the digests of all files.
    pub sha256: String,
    /// Bytes of all files.
    pub bytes: u64,
}

/// The checkpoints of one run (one spec and dataset) as its newest attempt sees them.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    store: Store,
    claim: Claim,
    identity: Identity,
    digests: Digests,
    ownership: Arc<Ownership>,
}

impl Checkpoints {
    /// Takes the prefix for this run: writes its identity, or checks the one that is there.
    ///
    /// # Errors
    /// [`CheckpointError::Identity`] if the prefix belongs to another spec, dataset or output, or holds checkpoints of nobody knows whom.
    pub async fn open(store: Store, claim: Claim, identity: Identity) -> Result<Self, CheckpointError> {
        let this = Self::new(store, claim, identity);
        match Identity::read(&this.store).await? {
            Some(theirs) => {
                this.identity.compare(&theirs, this.store.uri())?;
                this.complete_identity(&theirs).await?;
            }
            None => this.take().await?,
        }
        Ok(this)
    }

    /// As [`Checkpoints::open`], after deleting what earlier jobs of this spec have written there, also on another dataset, but for prepared data,
    /// which is keyed by content and stays right: `resume.policy: Never`. Attempts of one job go on from each other's checkpoints.
    ///
    /// # Errors
    /// As [`Checkpoints::open`]; if this attempt has been superseded, or the store fails.
    pub async fn restart(store: Store, claim: Claim, identity: Identity) -> Result<Self, CheckpointError> {
        let this = Self::new(store, claim, identity);
        let Some(theirs) = Identity::read(&this.store).await? else {
            this.take().await?;
            return Ok(this);
        };
        this.identity.compare_spec_and_output(&theirs, this.store.uri())?;
        // An earlier attempt of this very job has begun anew: its work counts.
        if this.identity.is_of_the_same_run(&theirs) {
            this.identity.compare(&theirs, this.store.uri())?;
            return Ok(this);
        }
        let Inventory { own, .. } = this.inventory().await?;
        this.delete(own.iter().filter(|key| !matches!(Key::parse(key), Some(Key::Prepared | Key::Identity))).collect()).await?;
        this.ensure_newest().await?;
        this.identity.replace(&this.store).await?;
        Ok(this)
    }

    fn new(store: Store, claim: Claim, identity: Identity) -> Self {
        let ownership = Arc::new(Ownership::of(&store, &identity));
        let digests = identity.digests();
        Self { store, claim, identity, digests, ownership }
    }

    /// A run that an earlier version began did not record its base model: from now on it does.
    async fn complete_identity(&self, theirs: &Identity) -> Result<(), CheckpointError> {
        if theirs.model_digest.is_some() {
            return Ok(());
        }
        tracing::warn!(prefix = self.store.uri(), "an earlier version began this run, and did not record the base model: it is taken to be the present one");
        self.ensure_newest().await?;
        self.identity.replace(&self.store).await
    }

    /// Writes the identity into a prefix that has none.
    async fn take(&self) -> Result<(), CheckpointError> {
        if !self.ownership.is_dedicated() {
            let found = self.store.list("").await?;
            if let Some(stranger) = found.iter().find(|object| Key::parse(&object.key).is_some_and(|key| key != Key::Identity)) {
                return Err(IdentityError::Unclaimed { uri: self.store.uri().to_owned(), key: stranger.key.clone() }.into());
            }
        }
        self.identity.create(&self.store).await
    }

    /// Where the checkpoints lie.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What the run is made from.
    pub fn digests(&self) -> &Digests {
        &self.digests
    }

    /// The run's id.
    pub fn run(&self) -> Option<&str> {
        self.identity.run.as_deref()
    }

    /// This attempt's number.
    pub fn attempt(&self) -> u64 {
        self.claim.epoch()
    }

    /// Stops an attempt that is no longer the newest.
    ///
    /// # Errors
    /// [`StoreError::Superseded`], and those of listing.
    pub async fn ensure_newest(&self) -> Result<(), StoreError> {
        self.claim.check().await
    }

    /// Writes a checkpoint: files, then (if still the newest attempt) the manifest.
    ///
    /// # Errors
    /// If this attempt has been superseded, or the store fails.
    pub async fn save(&self, snapshot: &Snapshot) -> Result<Saved, CheckpointError> {
        let place = Place { step: snapshot.state.step, attempt: self.claim.epoch() };
        let files: Vec<(String, Content)> = snapshot.encode()?.into_iter().map(|(name, bytes)| (name, Content::Bytes(bytes))).collect();
        let label = Label {
            step: place.step,
            attempt: place.attempt,
            spec_hash: self.identity.spec_hash.clone(),
            dataset_digest: self.identity.dataset_digest.clone(),
            model_digest: self.identity.model_digest.clone(),
        };
        let metadata = serde_json::to_value(label).map_err(|source| CheckpointError::Json { file: manifest::FILE_NAME, source })?;
        let folder = self.store.child(&place.folder())?;
        let manifest = manifest::publish(&folder, files, metadata, Some(&self.claim)).await?;
        self.ownership.wrote(place);
        let bytes = manifest.files.iter().map(|f| f.size).sum();
        Ok(Saved { step: place.step, uri: folder.uri().to_owned(), sha256: manifest.digest(), bytes })
    }

    /// The newest checkpoint that verifies, passing over damaged ones.
    ///
    /// # Errors
    /// If the store fails. A damaged checkpoint is no error.
    pub async fn latest(&self) -> Result<Option<(Place, Snapshot)>, CheckpointError> {
        for place in places(&self.store).await?.into_iter().rev() {
            let Some(verified) = manifest::first_that_verifies(&self.store, &[place.folder()]).await? else { continue };
            match self.read(place, verified) {
                Ok(snapshot) => return Ok(Some((place, snapshot))),
                Err(problem) => tracing::warn!(checkpoint = place.folder(), problem, "passed over a checkpoint"),
            }
        }
        Ok(None)
    }

    fn read(&self, place: Place, verified: Verified) -> Result<Snapshot, String> {
        let label: Label = serde_json::from_value(verified.manifest.metadata).map_err(|e| format!("its manifest cannot be understood: {e}"))?;
        if (label.step, label.attempt) != (place.step, place.attempt) {
            return Err("its manifest names another place".to_owned());
        }
        let Identity { spec_hash, dataset_digest, model_digest, .. } = &self.identity;
        if label.spec_hash != *spec_hash
            || label.dataset_digest != *dataset_digest
            || label.model_digest.is_some_and(|digest| Some(&digest) != model_digest.as_ref())
        {
            return Err("it belongs to another spec, dataset or base model".to_owned());
        }
        let snapshot = Snapshot::decode(&verified.files.into_iter().collect()).map_err(|e| format!("it cannot be read: {e}"))?;
        if snapshot.state.step == place.step { Ok(snapshot) } else { Err("its state belongs to another step".to_owned()) }
    }

    /// Deletes all but the checkpoints of the newest `keep` steps, and what older attempts have left unfinished.
    ///
    /// # Errors
    /// If this attempt has been superseded (nothing is deleted then), or the store fails.
    pub async fn retain(&self, keep: u32) -> Result<(), CheckpointError> {
        let Inventory { own, .. } = self.inventory().await?;
        self.delete(stale(&own, keep, self.claim.epoch())).await
    }

    /// Deletes everything that this run has written below the prefix; says what is left there.
    ///
    /// # Errors
    /// If this attempt has been superseded (nothing is deleted then), or the store fails.
    pub async fn delete_all(&self) -> Result<LeftAlone, CheckpointError> {
        let Inventory { own, foreign } = self.inventory().await?;
        self.delete(own.iter().collect()).await?;
        Ok(LeftAlone { uri: self.store.uri().to_owned(), keys: foreign })
    }

    async fn inventory(&self) -> Result<Inventory, CheckpointError> {
        Ok(self.ownership.inventory(&self.store).await?)
    }

    /// In the order of [`Key::deletion_rank`]; the claims are listed before each manifest.
    async fn delete(&self, mut keys: Vec<&String>) -> Result<(), CheckpointError> {
        let rank = |key: &str| Key::parse(key).map_or(1, Key::deletion_rank);
        keys.sort_by_key(|key| (rank(key), key.as_str()));
        for (i, key) in keys.into_iter().enumerate() {
            if i == 0 || rank(key) == 0 {
                self.ensure_newest().await?;
            }
            self.store.delete(key).await?;
        }
        Ok(())
    }
}

/// The keys that retention deletes.
fn stale(keys: &[String], keep: u32, attempt: u64) -> Vec<&String> {
    let complete: BTreeSet<Place> = keys.iter().filter_map(|k| Place::parse(k)).filter(|(_, f)| *f == manifest::FILE_NAME).map(|(p, _)| p).collect();
    let steps: BTreeSet<u64> = complete.iter().map(|p| p.step).collect();
    let kept: BTreeSet<u64> = steps.iter().rev().take(keep.max(1) as usize).copied().collect();
    let is_stale = |place: Place| {
        // Unfinished folders of older attempts are garbage; one of this attempt is its next checkpoint.
        if complete.contains(&place) { !kept.contains(&place.step) } else { place.attempt < attempt }
    };
    keys.iter().filter(|k| Place::parse(k).is_some_and(|(place, _)| is_stale(place))).collect()
}

/// The files of the newest checkpoint that verifies, whichever run it belongs to.
///
/// # Errors
/// If the store fails.
pub async fn newest(store: &Store) -> Result<Option<Vec<(String, Bytes)>>, StoreError> {
    let folders: Vec<String> = places(store).await?.into_iter().rev().map(Place::folder).collect();
    Ok(manifest::first_that_verifies(store, &folders).await?.map(|verified| verified.files))
}

/// What a run has written below a checkpoint prefix, by its `identity.json`.
#[derive(Debug)]
pub struct Owned {
    identity: Identity,
    /// What it has written.
    pub objects: Vec<ObjectInfo>,
    /// How many objects besides are not its own.
    pub others: usize,
}

impl Owned {
    /// Where its results go.
    pub fn output(&self) -> &str {
        &self.identity.output
    }

    /// Whether `result` is what the attempts here have led to: of the same spec, dataset and model, and by none before the newest checkpoint here (a later
    /// run of the same spec, say, that is to replace it).
    pub fn has_published(&self, result: &RunResult) -> bool {
        let Identity { spec_hash, dataset_digest, model_digest, .. } = &self.identity;
        let same_model = model_digest.is_none() || result.model_digest.is_none() || *model_digest == result.model_digest;
        let later = self.objects.iter().filter_map(|object| Place::parse(&object.key)).any(|(place, _)| place.attempt > result.attempt);
        result.spec_hash == *spec_hash && result.dataset_digest == *dataset_digest && same_model && !later
    }
}

/// What the run of the prefix's `identity.json` has written there; `None` where there is no such file.
///
/// # Errors
/// If the store fails, or the file cannot be understood.
pub async fn owned(store: &Store) -> Result<Option<Owned>, CheckpointError> {
    let Some(identity) = Identity::read(store).await? else { return Ok(None) };
    let Inventory { own, foreign } = Ownership::of(store, &identity).inventory(store).await?;
    let own: BTreeSet<String> = own.into_iter().collect();
    let objects = store.list("").await?.into_iter().filter(|object| own.contains(&object.key)).collect();
    Ok(Some(Owned { identity, objects, others: foreign.len() }))
}

/// All places with a manifest, oldest first.
async fn places(store: &Store) -> Result<BTreeSet<Place>, StoreError> {
    let objects = store.list("").await?;
    Ok(objects.iter().filter_map(|o| Place::parse(&o.key)).filter(|(_, file)| *file == manifest::FILE_NAME).map(|(place, _)| place).collect())
}

/// The object, or none if there is none.
pub(super) async fn read_optional(store: &Store, key: &str) -> Result<Option<Bytes>, StoreError> {
    match store.get(key).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_keeps_the_newest_steps_of_any_attempt_and_unfinished_work_of_its_own() {
        let keys: Vec<String> = [
            "identity.json",
            "prepared/x",
            "step-000010/e1/lora.safetensors",
            "step-000010/e1/manifest.json",
            "step-000020/e1/lora.safetensors",
            "step-000020/e1/manifest.json",
            "step-000020/e2/manifest.json",
            "step-000030/e1/lora.safetensors",
            "step-000030/e2/manifest.json",
            "step-000040/e2/lora.safetensors",
        ]
        .map(String::from)
        .into();
        let expected = ["step-000010/e1/lora.safetensors", "step-000010/e1/manifest.json", "step-000030/e1/lora.safetensors"];
        assert_eq!(stale(&keys, 2, 2), expected);
        assert_eq!(stale(&keys, 9, 2), expected[2..]);
    }
}
