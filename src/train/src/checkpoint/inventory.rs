//! What of a checkpoint prefix is this run's own, and what is not.
//!
//! The default prefix below the output is named after the spec hash: nobody else has a reason to write there, and the exact form of a key
//! ([`Key`]) shows that a run wrote it. A prefix that somebody chose may hold anything. There `identity.json` says whose the keys of that form
//! are, and a checkpoint's manifest must name this run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::{Identity, Key, Label, Place};
use finetune_store::{Store, StoreError, StoreErrorKind, is_placeholder, manifest};

/// Files that a run has found where it cleans up, and left alone since it did not write them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftAlone {
    /// The prefix.
    pub uri: String,
    /// Their keys below it.
    pub keys: Vec<String>,
}

impl LeftAlone {
    /// Whether there was no such file.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl fmt::Display for LeftAlone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files = if self.keys.len() == 1 { "file" } else { "files" };
        write!(f, "{} {files} in {} that this run did not write: {}", self.keys.len(), self.uri, some_of(&self.keys))
    }
}

/// The first three keys, and how many more there are.
pub(crate) fn some_of(keys: &[String]) -> String {
    let first = keys[..keys.len().min(3)].join(", ");
    if keys.len() > 3 { format!("{first} and {} more", keys.len() - 3) } else { first }
}

/// All that lies below a checkpoint prefix, but for placeholders.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    /// Written by this run: all that may ever be deleted.
    pub(super) own: Vec<String>,
    /// Everything else.
    pub(super) foreign: Vec<String>,
}

/// Tells this run's keys from others'.
#[derive(Debug)]
pub(super) struct Ownership {
    spec_hash: String,
    /// Nobody else writes into the prefix.
    dedicated: bool,
    /// Complete checkpoints whose manifests have been read, or written: whether they are this run's.
    known: Mutex<BTreeMap<Place, bool>>,
}

impl Ownership {
    pub(super) fn of(store: &Store, identity: &Identity) -> Self {
        let dedicated = store.uri() == finetune_api::plan::default_checkpoint_uri(&identity.output, &identity.spec_hash);
        Self { spec_hash: identity.spec_hash.clone(), dedicated, known: Mutex::default() }
    }

    /// Whether the prefix is the run's own by its name.
    pub(super) fn is_dedicated(&self) -> bool {
        self.dedicated
    }

    /// This attempt has written a checkpoint.
    pub(super) fn wrote(&self, place: Place) {
        self.remember(place, true);
    }

    /// Looks at all keys.
    pub(super) async fn inventory(&self, store: &Store) -> Result<Inventory, StoreError> {
        let objects = store.list("").await?;
        let complete = objects.iter().filter_map(|object| match Key::parse(&object.key) {
            Some(Key::Checkpoint(place, manifest::FILE_NAME)) => Some(place),
            _ => None,
        });
        let mut foreign = BTreeSet::new();
        for place in complete {
            if !self.is_own(store, place).await? {
                foreign.insert(place);
            }
        }
        let is_own = |key: &str| match Key::parse(key) {
            Some(Key::Checkpoint(place, _)) => !foreign.contains(&place),
            other => other.is_some(),
        };
        let mut inventory = Inventory::default();
        for object in objects {
            if is_own(&object.key) {
                inventory.own.push(object.key);
            } else if !is_placeholder(&object) {
                inventory.foreign.push(object.key);
            }
        }
        Ok(inventory)
    }

    /// Whether a complete checkpoint is this run's.
    async fn is_own(&self, store: &Store, place: Place) -> Result<bool, StoreError> {
        if self.dedicated {
            return Ok(true);
        }
        if let Some(known) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&place) {
            return Ok(*known);
        }
        let own = match manifest::read(&store.child(&place.folder())?).await {
            Ok(Some(manifest)) => serde_json::from_value::<Label>(manifest.metadata).is_ok_and(|label| label.spec_hash == self.spec_hash),
            // Gone meanwhile.
            Ok(None) => return Ok(true),
            // Whose it was cannot be said any more.
            Err(error) if error.kind() == StoreErrorKind::Corrupt => false,
            Err(error) => return Err(error),
        };
        self.remember(place, own);
        Ok(own)
    }

    fn remember(&self, place: Place, own: bool) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(place, own);
    }
}
