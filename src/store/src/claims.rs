//! Fencing of attempts: `claims/NNNNNN.json` (reference: the job's failure semantics in `docs/concepts/object-stores.md`).
//!
//! # Expected flow
//! An attempt acquires a claim on the prefix that it writes: the next free number, by create-if-absent, which every store can. The
//! number is its epoch. It writes only below names that hold the epoch (`step-S/eN/`, `runs/eN/`), and asks [`Claim::check`] before
//! each manifest and each deletion.
//!
//! # Two jobs on one prefix
//! A claim names the run that it belongs to ([`Run`]). An attempt takes over from attempts of its own run at once. Where the newest claim is
//! another run's, it asks whether that one lives: a holder writes `claims/NNNNNN.state.json` again and again while it works ([`Claim::keep_alive`]),
//! and for the last time when it ends. One that goes on working is not disturbed ([`StoreError::InUse`]); one that is about to end is waited for;
//! one that has been silent for the whole lease is dead. No clocks are compared: what counts is that the object changes while one looks.
//!
//! # Guarantees
//! Epochs are unique and grow. After a newer claim exists, an older attempt publishes no further manifest that passes its
//! check; one that was frozen between its check and its put writes below its own epoch only, where nobody of a higher epoch
//! looks for their own work and where readers accept whole, verified manifests only.
//!
//! # Caveats
//! Claims are never deleted: a reused number would break the order. They are a few hundred bytes each. Claims of versions that did not name the run
//! are taken over at once, as those versions did with every claim.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{Result, StoreError};
use super::retry::random_bits;
use super::{Created, Store};

/// Folder of the claims below the claimed prefix.
const FOLDER: &str = "claims";
/// Largest claim that is read.
const MAX_CLAIM_BYTES: u64 = 64 << 10;

/// How long a holder may be silent before it is taken for dead.
pub const LEASE: Duration = Duration::from_secs(90);
/// How often a holder says that it lives.
const BEAT: Duration = Duration::from_secs(15);
/// How long a holder tries to say that it has ended.
const LAST_WORD: Duration = Duration::from_secs(5);
/// How often a holder looks whether it is about to end, and a waiting attempt whether the holder has said something.
const LOOK: Duration = Duration::from_secs(1);

/// The run that an attempt belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// `namespace/name` of the job.
    pub job: String,
    /// UID of the FineTuneJob; [`Run::local_id`] without a cluster.
    pub id: String,
    /// `sha256:<hex>` of what determines the weights.
    pub spec_hash: String,
}

/// Beginning of the ids of runs without a cluster.
const LOCAL: &str = "local-";

impl Run {
    /// An id for a run of this process.
    pub fn local_id() -> String {
        format!("{LOCAL}{:016x}{:016x}", random_bits(), random_bits())
    }

    /// Whether attempts of `other` are attempts of this run: those of the same FineTuneJob; without a cluster, of the same job and spec.
    fn is(&self, other: &Self) -> bool {
        let local = |run: &Self| run.id.starts_with(LOCAL);
        self.id == other.id || (local(self) && local(other) && (&self.job, &self.spec_hash) == (&other.job, &other.spec_hash))
    }
}

/// Who makes an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The pod or the host: a name for people to see.
    pub name: String,
    /// The run; without one, the newest claim is taken over whoever holds it.
    pub run: Option<Run>,
}

/// What a claim's object says about its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRecord {
    /// The number in the claim's name.
    pub epoch: u64,
    /// Random; distinguishes attempts that race for one number.
    pub nonce: String,
    /// The pod or the host: whatever the caller knows of itself.
    pub owner: String,
    /// The run; claims of earlier versions do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Run>,
    /// When the attempt started, by its own clock.
    pub created_at: String,
}

/// What the holder of a claim is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Activity {
    /// It works.
    Working,
    /// It has been asked to end, and saves what it has.
    Ending,
    /// It has ended.
    Ended,
}

/// What a holder writes again and again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClaimState {
    /// Of the claim: a frozen attempt cannot speak for another's.
    nonce: String,
    /// Counts.
    beat: u64,
    activity: Activity,
}

/// An attempt's claim on a prefix.
#[derive(Debug, Clone)]
pub struct Claim {
    store: Store,
    record: ClaimRecord,
}

impl Claim {
    /// Claims the prefix `store` for a new attempt, whoever holds it. `owner` is a name for people to see.
    ///
    /// # Errors
    /// Those of listing and creating objects; [`StoreError::Unusable`] where the server would let two attempts have one claim.
    pub async fn acquire(store: &Store, owner: &str) -> Result<Self> {
        Self::acquire_for(store, &Owner { name: owner.to_owned(), run: None }, LEASE).await
    }

    /// Claims the prefix `store` for a new attempt of a run, unless another run is at work there. Where another run has not said that it ended,
    /// this may take as long as `lease`.
    ///
    /// # Errors
    /// [`StoreError::InUse`] names the run that is at work; those of listing, reading and creating objects.
    pub async fn acquire_for(store: &Store, owner: &Owner, lease: Duration) -> Result<Self> {
        let nonce = format!("{:016x}{:016x}", random_bits(), random_bits());
        let created_at = jiff::Timestamp::now().to_string();
        loop {
            let newest = newest(store, 0).await?;
            if let Some(newest) = newest {
                give_way(store, newest, owner, lease).await?;
            }
            let epoch = newest.map_or(Ok(1), |newest| next_epoch(store, newest))?;
            let record = ClaimRecord { epoch, nonce: nonce.clone(), owner: owner.name.clone(), run: owner.run.clone(), created_at: created_at.clone() };
            let json = to_json(store, &record)?;
            match store.create(&key(epoch), json.clone()).await? {
                Created::Yes => {
                    store.check_creates_are_conditional(&key(epoch), json).await?;
                    tracing::info!(prefix = store.uri(), epoch, "claimed");
                    return Ok(Self { store: store.clone(), record });
                }
                // Somebody else was faster; who that is decides what follows.
                Created::AlreadyExists => {}
            }
        }
    }

    /// Says again and again that the holder works, from a task of its own, until [`KeptAlive::end`]. `ending` is asked whether it is about to end.
    pub fn keep_alive(&self, ending: impl Fn() -> bool + Send + 'static) -> KeptAlive {
        let claim = self.clone();
        let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let mut activity = Activity::Working;
            for beat in 1.. {
                if let Err(error) = claim.say(beat, activity).await {
                    tracing::debug!(%error, epoch = claim.epoch(), "failed to say that the claim's holder lives");
                }
                let said = Instant::now();
                while said.elapsed() < BEAT && (ending() == (activity == Activity::Ending)) {
                    if tokio::time::timeout(LOOK, &mut stopped).await.is_ok() {
                        return;
                    }
                }
                activity = if ending() { Activity::Ending } else { Activity::Working };
            }
        });
        KeptAlive { claim: self.clone(), stop: Some(stop), task }
    }

    async fn say(&self, beat: u64, activity: Activity) -> Result<()> {
        let state = ClaimState { nonce: self.record.nonce.clone(), beat, activity };
        self.store.put(&state_key(self.epoch()), to_json(&self.store, &state)?).await
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
    /// When a higher claim exists, [`StoreError::Superseded`] if it is of the same run, else [`StoreError::InUse`]; those of listing.
    pub async fn check(&self) -> Result<()> {
        let Some(newest) = newest(&self.store, self.epoch()).await? else { return Ok(()) };
        if let (Some(own), Some(record)) = (&self.record.run, holder(&self.store, newest).await)
            && let Some(run) = record.run.as_ref().filter(|run| !own.is(run))
        {
            return Err(in_use(&self.store, &record, run));
        }
        Err(StoreError::Superseded { location: self.store.uri().to_owned(), epoch: self.epoch(), newest })
    }
}

/// Says that a claim's holder lives, until it is dropped.
#[derive(Debug)]
pub struct KeptAlive {
    claim: Claim,
    /// Dropped to stop the task between two of its words.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl KeptAlive {
    /// Says that the holder has ended, so that nobody waits for it. Takes a few seconds at most: a process that is asked to end has little time, and
    /// without this word others only wait longer.
    pub async fn end(mut self) {
        drop(self.stop.take());
        let epoch = self.claim.epoch();
        let last_word = async {
            // A word that is still under way must not come after the last one.
            let _ended = (&mut self.task).await;
            self.claim.say(u64::MAX, Activity::Ended).await
        };
        match tokio::time::timeout(LAST_WORD, last_word).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, epoch, "failed to say that the claim's holder has ended"),
            Err(_) => tracing::debug!(epoch, "no time to say that the claim's holder has ended"),
        }
    }
}

impl Drop for KeptAlive {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The record of a claim that is known to exist; what cannot be read says nothing.
async fn holder(store: &Store, epoch: u64) -> Option<ClaimRecord> {
    read(store, epoch).await.ok().flatten()
}

fn in_use(store: &Store, record: &ClaimRecord, run: &Run) -> StoreError {
    let holder = format!("job {} ({}, since {}, spec {}, id {})", run.job, record.owner, record.created_at, run.spec_hash, run.id);
    StoreError::InUse { location: store.uri().to_owned(), holder }
}

/// Returns when claim `epoch` does not stand in the way of an attempt of `owner`.
async fn give_way(store: &Store, epoch: u64, owner: &Owner, lease: Duration) -> Result<()> {
    let (Some(own), Some(record)) = (&owner.run, read(store, epoch).await?) else { return Ok(()) };
    let Some(run) = record.run.as_ref().filter(|run| !own.is(run)) else { return Ok(()) };
    let mut last = state(store, &record).await?;
    let mut silent = Instant::now();
    let is = |state: &Option<ClaimState>, activity| state.as_ref().is_some_and(|state| state.activity == activity);
    if !is(&last, Activity::Ended) {
        tracing::info!(
            holder = run.job,
            owner = record.owner,
            lease = lease.as_secs(),
            "another job has not said that it left this output: waiting to see whether it lives"
        );
    }
    while !is(&last, Activity::Ended) && silent.elapsed() < lease {
        tokio::time::sleep(LOOK).await;
        let now = state(store, &record).await?;
        if now == last {
            continue;
        }
        if is(&now, Activity::Working) {
            return Err(in_use(store, &record, run));
        }
        (last, silent) = (now, Instant::now());
    }
    Ok(())
}

/// What the holder of a claim has said last.
async fn state(store: &Store, record: &ClaimRecord) -> Result<Option<ClaimState>> {
    match store.get_limited(&state_key(record.epoch), MAX_CLAIM_BYTES).await {
        // What cannot be understood has not been said by this claim's holder.
        Ok(json) => Ok(serde_json::from_slice::<ClaimState>(&json).ok().filter(|state| state.nonce == record.nonce)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn to_json(store: &Store, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| StoreError::corrupt(store.uri(), error.to_string()))
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

fn state_key(epoch: u64) -> String {
    format!("{FOLDER}/{epoch:06}.state.json")
}

/// Whether attempts write a key below the claimed prefix.
pub fn is_own(key: &str) -> bool {
    epoch_of(key).is_some() || key.strip_suffix(".state.json").is_some_and(|name| epoch_of(&format!("{name}.json")).is_some())
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

    fn owner(job: &str, id: &str, spec: &str) -> Owner {
        Owner { name: format!("pod of {job}"), run: Some(Run { job: job.into(), id: id.into(), spec_hash: spec.into() }) }
    }

    fn place() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().to_str().unwrap(), &crate::StoreOptions::default()).unwrap();
        (dir, store)
    }

    const SHORT: Duration = Duration::from_millis(2500);

    /// The next attempt of one's own takes over at once, whatever the first one is doing.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn attempts_of_the_same_run_supersede_each_other() {
        for (first, second) in [
            (owner("a/x", "uid-1", "s"), owner("a/x", "uid-1", "s")),
            (owner("a/x", "local-1", "s"), owner("a/x", "local-2", "s")),
            (Owner { name: "an earlier version".into(), run: None }, owner("a/x", "uid-1", "s")),
        ] {
            let (_dir, store) = place();
            let old = Claim::acquire_for(&store, &first, LEASE).await.unwrap();
            let _alive = old.keep_alive(|| false);
            let new = Claim::acquire_for(&store, &second, LEASE).await.unwrap();
            assert_eq!(new.epoch(), 2);
            assert!(matches!(old.check().await.unwrap_err(), StoreError::Superseded { epoch: 1, newest: 2, .. }));
        }
    }

    /// Another job, another spec, or the same manifest in another cluster.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_live_claim_of_another_run_is_not_taken_and_its_holder_is_named() {
        for second in [owner("b/y", "uid-2", "s"), owner("a/x", "uid-2", "s"), owner("a/x", "local-2", "s")] {
            let (_dir, store) = place();
            let old = Claim::acquire_for(&store, &owner("a/x", "uid-1", "s"), LEASE).await.unwrap();
            let _alive = old.keep_alive(|| false);
            let error = Claim::acquire_for(&store, &second, LEASE).await.unwrap_err();
            assert!(matches!(error, StoreError::InUse { .. }) && error.to_string().contains("job a/x (pod of a/x"), "{error}");
            old.check().await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn claims_of_runs_that_ended_or_fell_silent_are_taken() {
        let (_dir, store) = place();
        let ended = Claim::acquire_for(&store, &owner("a/x", "uid-1", "s"), LEASE).await.unwrap();
        ended.keep_alive(|| false).end().await;
        let begin = Instant::now();
        let silent = Claim::acquire_for(&store, &owner("b/y", "uid-2", "s"), LEASE).await.unwrap();
        assert!(begin.elapsed() < LEASE / 2, "nobody waits for one that has ended");
        let alive = silent.keep_alive(|| false);
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(alive);
        let taken = Claim::acquire_for(&store, &owner("c/z", "uid-3", "s"), SHORT).await.unwrap();
        assert_eq!(taken.epoch(), 3);
        // Whoever wakes up learns who has it now.
        let error = silent.check().await.unwrap_err();
        assert!(matches!(&error, StoreError::InUse { holder, .. } if holder.contains("c/z")), "{error}");
    }

    /// A job that is deleted and created again under its name meets its own pod that still saves a checkpoint.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_that_is_about_to_end_is_waited_for() {
        let (_dir, store) = place();
        let old = Claim::acquire_for(&store, &owner("a/x", "uid-1", "s"), LEASE).await.unwrap();
        let alive = old.keep_alive(|| true);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(4)).await;
            alive.end().await;
        });
        let new = Claim::acquire_for(&store, &owner("a/x", "uid-2", "s"), LEASE).await.unwrap();
        assert_eq!(new.epoch(), 2);
    }

    #[test]
    fn records_of_earlier_versions_are_read_and_states_have_names_of_their_own() {
        let old: ClaimRecord = serde_json::from_str(r#"{"epoch": 1, "nonce": "n", "owner": "pod", "createdAt": "2026-01-01T00:00:00Z"}"#).unwrap();
        assert_eq!(old.run, None);
        assert!(is_own("claims/000001.json") && is_own("claims/000001.state.json"));
        assert!(!is_own("claims/1.state.json") && !is_own("claims/notes.json") && epoch_of("claims/000001.state.json").is_none());
    }
}
