//! Fencing of attempts: `claims/NNNNNN.json` (reference: the job's failure semantics in `docs/concepts/object-stores.md`).
//!
//! # Expected flow
//! An attempt acquires a claim on the prefix that it writes: the next free number, by create-if-absent, which every store can. The
//! number is its epoch. It writes only below names that hold the epoch (`step-S/eN/`, `runs/eN/`), and asks [`Claim::check`] before
//! each manifest and each deletion.
//!
//! # Guarantees
//! Epochs are unique and grow. After a newer claim exists, an older attempt publishes no further manifest that passes its
//! check; one that was frozen between its check and its put writes below its own epoch only, where nobody of a higher epoch
//! looks for their own work and where readers accept whole, verified manifests only.
//!
//! # Caveats
//! Claims are never deleted: a reused number would break the order. They are a few hundred bytes each.

use serde::{Deserialize, Serialize};

use super::error::{Result, StoreError};
use super::retry::random_bits;
use super::{Created, Store};

/// Folder of the claims below the claimed prefix.
const FOLDER: &str = "claims";
/// Largest claim that is read.
const MAX_CLAIM_BYTES: u64 = 64 << 10;

/// What a claim's object says about its owner. For people; the name alone decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRecord {
    /// The number in the claim's name.
    pub epoch: u64,
    /// Random; tells apart attempts that race for one number.
    pub nonce: String,
    /// The job, the pod or the host: whatever the caller knows of itself.
    pub owner: String,
    /// When the attempt started, by its own clock.
    pub created_at: String,
}

/// An attempt's claim on a prefix.
#[derive(Debug, Clone)]
pub struct Claim {
    store: Store,
    record: ClaimRecord,
}

impl Claim {
    /// Claims the prefix `store` for a new attempt. `owner` is a name for people to see.
    ///
    /// # Errors
    /// Those of listing and creating objects.
    pub async fn acquire(store: &Store, owner: &str) -> Result<Self> {
        let nonce = format!("{:016x}{:016x}", random_bits(), random_bits());
        let created_at = jiff::Timestamp::now().to_string();
        let mut epoch = newest(store, 0).await?.map_or(Ok(1), |newest| next_epoch(store, newest))?;
        loop {
            let record = ClaimRecord { epoch, nonce: nonce.clone(), owner: owner.to_owned(), created_at: created_at.clone() };
            let json = serde_json::to_vec(&record).map_err(|error| StoreError::corrupt(store.uri(), error.to_string()))?;
            match store.create(&key(epoch), json).await? {
                Created::Yes => {
                    tracing::info!(prefix = store.uri(), epoch, "claimed");
                    return Ok(Self { store: store.clone(), record });
                }
                Created::AlreadyExists => epoch = next_epoch(store, newest(store, epoch - 1).await?.unwrap_or(epoch))?,
            }
        }
    }

    /// This attempt's number: unique below the prefix, higher than that of every earlier attempt.
    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// What was written into the claim.
    pub fn record(&self) -> &ClaimRecord {
        &self.record
    }

    /// True while no higher claim exists. To be asked before each manifest and each deletion.
    ///
    /// # Errors
    /// Those of listing: not to know means not to write.
    pub async fn is_newest(&self) -> Result<bool> {
        Ok(newest(&self.store, self.epoch()).await?.is_none())
    }

    /// [`Claim::is_newest`] as a result.
    ///
    /// # Errors
    /// [`StoreError::Superseded`] when a higher claim exists; those of listing.
    pub async fn check(&self) -> Result<()> {
        match newest(&self.store, self.epoch()).await? {
            None => Ok(()),
            Some(newest) => Err(StoreError::Superseded { location: self.store.uri().to_owned(), epoch: self.epoch(), newest }),
        }
    }
}

/// The record of claim `epoch`, or `None` when there is none.
///
/// # Errors
/// Those of reading; [`StoreError::Corrupt`] when it is not a claim.
pub async fn read(store: &Store, epoch: u64) -> Result<Option<ClaimRecord>> {
    let key = key(epoch);
    match store.get_limited(&key, MAX_CLAIM_BYTES).await {
        Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|error| StoreError::corrupt(store.uri_of(&key), error.to_string())),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The highest epoch above `above` that has been claimed.
///
/// # Errors
/// Those of listing.
pub async fn newest(store: &Store, above: u64) -> Result<Option<u64>> {
    // Names have at least six digits, so up to 999,999 their order is that of the numbers and lower ones need not be listed.
    let after = (1..999_999).contains(&above).then(|| key(above));
    let claims = store.list_from(FOLDER, after.as_deref()).await?;
    Ok(claims.iter().filter_map(|claim| epoch_of(&claim.key)).filter(|epoch| *epoch > above).max())
}

fn next_epoch(store: &Store, newest: u64) -> Result<u64> {
    newest.checked_add(1).ok_or_else(|| StoreError::corrupt(store.uri(), "the highest claim has the highest number there is"))
}

fn key(epoch: u64) -> String {
    format!("{FOLDER}/{epoch:06}.json")
}

/// The number in a claim's key below the claimed prefix; `None` for any other key.
pub fn epoch_of(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(FOLDER)?.strip_prefix('/')?.strip_suffix(".json")?;
    if digits.len() < 6 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        for epoch in [1, 42, 999_999, 1_000_000, u64::MAX] {
            assert_eq!(epoch_of(&key(epoch)), Some(epoch));
        }
        assert_eq!(key(7), "claims/000007.json");
        for other in
            ["claims/7.json", "claims/00000x.json", "claims/000007.json.part", "claims/+00007.json", "other/000007.json", "claims/99999999999999999999999.json"]
        {
            assert_eq!(epoch_of(other), None, "{other}");
        }
    }
}
