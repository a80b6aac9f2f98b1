//! What runs have left behind in a bucket, and its deletion.
//!
//! Only keys whose exact form shows that a run wrote them count, and of those only what no run needs any more. In the folder of results (`output.uri`):
//! claims below the newest one; folders of attempts that did not win; below `.checkpoints/`, what a finished run wrote, and checkpoints of superseded
//! attempts that never became complete. In a folder of checkpoints (`checkpoint.uri`): the same, by its `identity.json` and the manifests.
//!
//! Before anything is deleted the output is claimed as by an attempt of another run: where one is at work, nothing is deleted, and one that was frozen
//! finds the newer claim before it writes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::card;
use super::checkpoint::{self, CheckpointError, Key, Place};
use super::comparison;
use super::history::Picture;
use super::log;
use super::lora_files::{DIFFUSERS_FILE, kohya_file};
use super::output::METRICS_FILE;
use super::page;
use super::publish::attempt_of;
use super::result::{self, RunResult};
use finetune_api::plan::default_checkpoint_uri;
use finetune_store::claims::{self, Claim, Owner, Run};
use finetune_store::{ObjectInfo, Store, StoreError, manifest};

/// The name under which the output is claimed.
const NAME: &str = "finetune gc";
/// Largest result that is read.
const MAX_RESULT_BYTES: u64 = 16 << 20;
/// The claims are looked at again after so many deletions.
const BATCH: usize = 100;

/// Why nobody needs a key any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A claim that a newer one has replaced.
    SupersededClaim,
    /// Results of an attempt that did not win.
    LosingAttempt,
    /// A checkpoint of a superseded attempt that never became complete.
    UnfinishedCheckpoint,
    /// Checkpoints, prepared data, logs and pictures of a run whose result is published.
    FinishedRun,
}

impl Kind {
    /// In words.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::SupersededClaim => "superseded claim",
            Self::LosingAttempt => "attempt that did not win",
            Self::UnfinishedCheckpoint => "unfinished checkpoint",
            Self::FinishedRun => "checkpoints and cache of a finished run",
        }
    }
}

/// An object that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Its key below the prefix.
    pub key: String,
    /// Its size in bytes.
    pub size: u64,
    /// Why.
    pub kind: Kind,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// What can be deleted, in the order of deletion.
    pub leftovers: Vec<Leftover>,
    /// Folders of runs that are not finished: they stay, and are continued by a job of their spec.
    pub unfinished: Vec<String>,
    /// Keys below the prefix that belong to nobody known, or are needed: all the rest.
    pub kept: usize,
}

/// Looks at the prefix `store`: an output, or a folder of checkpoints. `open` opens the output that such a folder names.
///
/// # Errors
/// If the store fails, or what a folder says of itself cannot be understood.
pub async fn look(store: &Store, open: impl Fn(&str) -> Result<Store, StoreError>) -> Result<Found, CheckpointError> {
    Ok(survey(store, &open).await?.0)
}

/// Looks again under a claim, and deletes what it finds; returns what it has deleted.
///
/// # Errors
/// [`StoreError::InUse`] where a run is at work; if the store fails. What was deleted until then stays deleted.
pub async fn delete(store: &Store, open: impl Fn(&str) -> Result<Store, StoreError>, lease: Duration) -> Result<Found, CheckpointError> {
    let (found, output) = survey(store, &open).await?;
    if found.leftovers.is_empty() {
        return Ok(found);
    }
    let run = Run { job: NAME.to_owned(), id: Run::local_id(), spec_hash: String::new() };
    let claim = Claim::acquire_for(&output, &Owner { name: NAME.to_owned(), run: Some(run) }, lease).await?;
    let alive = claim.keep_alive(|| false);
    let deleted = async {
        let (found, _) = survey(store, &open).await?;
        for (number, leftover) in found.leftovers.iter().enumerate() {
            if number % BATCH == 0 || leftover.key.ends_with(manifest::FILE_NAME) {
                claim.check().await?;
            }
            store.delete(&leftover.key).await?;
        }
        Ok(found)
    };
    let deleted = deleted.await;
    alive.end().await;
    deleted
}

/// What is at the prefix, and the output that it belongs to.
async fn survey(store: &Store, open: &impl Fn(&str) -> Result<Store, StoreError>) -> Result<(Found, Store), CheckpointError> {
    if let Some(owned) = checkpoint::owned(store).await? {
        let output = open(owned.output())?;
        let finished = result_at(&output, result::FILE_NAME).await?.is_some_and(|result| owned.has_published(&result));
        let newest = claims::newest(&output, 0).await?.unwrap_or_default();
        return Ok((in_checkpoints(store.uri(), &owned.objects, owned.others, finished, newest), output));
    }
    let objects = store.list("").await?;
    let newest = claims::newest(store, 0).await?.unwrap_or_default();
    let result = result_at(store, result::FILE_NAME).await?;
    let attempts: BTreeSet<u64> = objects.iter().filter_map(|object| attempt_of(&object.key)).collect();
    let mut lists = BTreeMap::new();
    for attempt in attempts {
        if let Some(list) = result_at(store, &format!("runs/e{attempt}/{}", result::FILE_NAME)).await? {
            lists.insert(attempt, list);
        }
    }
    // The folder of the result's spec may be that of a run that is to replace it.
    let finished = match &result {
        Some(result) => {
            let folder = default_checkpoint_uri("", &result.spec_hash);
            checkpoint::owned(&store.child(&folder)?).await?.is_some_and(|owned| owned.has_published(result)).then_some(folder)
        }
        None => None,
    };
    Ok((in_output(&objects, result.as_ref(), finished.as_deref(), &lists, newest), store.clone()))
}

/// A run's result; `None` where there is none, or somebody else's.
async fn result_at(store: &Store, key: &str) -> Result<Option<RunResult>, StoreError> {
    match store.get_limited(key, MAX_RESULT_BYTES).await {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What can go of an output. `finished` is the folder of the checkpoints of the run that made the result; `lists` are the results in the attempts' own folders.
fn in_output(objects: &[ObjectInfo], result: Option<&RunResult>, finished: Option<&str>, lists: &BTreeMap<u64, RunResult>, newest: u64) -> Found {
    let complete: BTreeSet<(&str, Place)> = objects.iter().filter_map(|object| complete(&object.key)).collect();
    let mut found = Found::default();
    let mut unfinished = BTreeSet::new();
    for ObjectInfo { key, size, .. } in objects {
        let kind = if claims::is_own(key) {
            claims::epoch_of(&key.replace(".state.json", ".json")).is_some_and(|epoch| epoch < newest).then_some(Kind::SupersededClaim)
        } else if let Some(attempt) = attempt_of(key) {
            // Without a result that can be read nobody knows who has won.
            let lost = attempt <= newest && result.is_some_and(|result| result.run != format!("runs/e{attempt}/"));
            let name = key.split_once('/').and_then(|(_, rest)| rest.split_once('/')).map_or("", |(_, name)| name);
            (lost && is_published(name, lists.get(&attempt).or(result))).then_some(Kind::LosingAttempt)
        } else if let Some((folder, own)) = in_default_checkpoints(key) {
            if finished.is_some_and(|finished| key.starts_with(finished)) {
                Some(Kind::FinishedRun)
            } else {
                unfinished.insert(format!(".checkpoints/{folder}/"));
                unfinished_checkpoint(own, newest, |place| complete.contains(&(folder, place)))
            }
        } else {
            None
        };
        match kind {
            Some(kind) => found.leftovers.push(Leftover { key: key.clone(), size: *size, kind }),
            None => found.kept += 1,
        }
    }
    found.unfinished = unfinished.into_iter().collect();
    in_order(found)
}

/// What can go of a folder of checkpoints: `objects` are the run's own, besides `others`.
fn in_checkpoints(uri: &str, objects: &[ObjectInfo], others: usize, finished: bool, newest: u64) -> Found {
    let complete: BTreeSet<Place> =
        objects.iter().filter_map(|object| Place::parse(&object.key)).filter(|(_, file)| *file == manifest::FILE_NAME).map(|(place, _)| place).collect();
    let mut found = Found { kept: others, ..Found::default() };
    for ObjectInfo { key, size, .. } in objects {
        let own = Key::parse(key).and_then(|own| unfinished_checkpoint(own, newest, |place| complete.contains(&place)));
        match if finished { Some(Kind::FinishedRun) } else { own } {
            Some(kind) => found.leftovers.push(Leftover { key: key.clone(), size: *size, kind }),
            None => found.kept += 1,
        }
    }
    if !finished {
        found.unfinished.push(uri.to_owned());
    }
    in_order(found)
}

/// A file of a checkpoint of an older attempt that never became complete.
fn unfinished_checkpoint(key: Key<'_>, newest: u64, is_complete: impl Fn(Place) -> bool) -> Option<Kind> {
    let Key::Checkpoint(place, _) = key else { return None };
    (place.attempt < newest && !is_complete(place)).then_some(Kind::UnfinishedCheckpoint)
}

/// The folder and the place of a manifest in a default checkpoint prefix.
fn complete(key: &str) -> Option<(&str, Place)> {
    match in_default_checkpoints(key)? {
        (folder, Key::Checkpoint(place, manifest::FILE_NAME)) => Some((folder, place)),
        _ => None,
    }
}

/// `<16 hexadecimal digits>` and the key of a run in `.checkpoints/<16 hexadecimal digits>/`.
fn in_default_checkpoints(key: &str) -> Option<(&str, Key<'_>)> {
    let (folder, rest) = key.strip_prefix(".checkpoints/")?.split_once('/')?;
    let digits = folder.len() == 16 && folder.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    Some((folder, Key::parse(rest).filter(|_| digits)?))
}

/// Whether an attempt publishes a file of this name: by the list that it has left, or by the exact form of the names.
fn is_published(name: &str, list: Option<&RunResult>) -> bool {
    let event = |name: &str| name.strip_prefix("logs/").is_some_and(|file| file == log::FILE_NAME || super::events::is_file_name(file, super::events::HOST));
    [result::FILE_NAME, METRICS_FILE, DIFFUSERS_FILE, comparison::FILE_NAME, page::FILE_NAME, card::FILE_NAME].contains(&name)
        || event(name)
        || Picture::parse(name).is_some()
        || list.is_some_and(|list| list.files.contains_key(name) || name == kohya_file(&list.job))
}

/// What says that something is complete goes first, what says whose it is goes last: what is deleted by half is never taken for more than it is.
fn in_order(mut found: Found) -> Found {
    let rank = |key: &str| match in_default_checkpoints(key).map(|(_, own)| own).or_else(|| Key::parse(key)) {
        _ if attempt_of(key).is_some() && key.ends_with(result::FILE_NAME) => 2,
        Some(own) => own.deletion_rank(),
        None => 1,
    };
    found.leftovers.sort_by(|one, other| (rank(&one.key), &one.key).cmp(&(rank(&other.key), &other.key)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "sha256:0123456789abcdef00";
    const FINISHED: &str = ".checkpoints/0123456789abcdef/";
    const OTHER: &str = ".checkpoints/fedcba9876543210/";

    fn objects(keys: &[&str]) -> Vec<ObjectInfo> {
        keys.iter().map(|key| ObjectInfo { key: (*key).to_owned(), size: 1, etag: None }).collect()
    }

    fn result(run: &str, files: &[&str]) -> RunResult {
        let digest = serde_json::json!({"size": 1, "sha256": "sha256:00"});
        let files: serde_json::Map<String, serde_json::Value> = files.iter().map(|name| ((*name).to_owned(), digest.clone())).collect();
        serde_json::from_value(serde_json::json!({
            "version": 1, "job": "team-a/corgi", "specHash": HASH, "datasetDigest": "", "attempt": 2, "run": run, "steps": 1, "epochs": 1.0, "samples": 1,
            "loss": {"first": 1.0, "last": 1.0, "smoothed": 1.0},
            "evaluation": {"start": 1.0, "end": 1.0, "improvement": 0.0, "samples": 1, "timesteps": 4},
            "lora": {"rank": 4, "alpha": 4.0, "modules": 1, "parameters": 1},
            "baseModel": {}, "device": "cpu", "dtype": "f32", "started": "", "completed": "", "trainingSeconds": 1.0, "artifacts": [], "files": files, "versions": {},
        }))
        .unwrap()
    }

    fn names(found: &Found) -> Vec<(&str, Kind)> {
        found.leftovers.iter().map(|leftover| (leftover.key.as_str(), leftover.kind)).collect()
    }

    #[test]
    fn of_a_finished_output_the_result_the_newest_claim_and_everything_unknown_stay() {
        let gone = [
            (format!("{FINISHED}step-000010/e1/manifest.json"), Kind::FinishedRun),
            (format!("{FINISHED}logs/e1/trainer.log"), Kind::FinishedRun),
            (format!("{FINISHED}step-000010/e1/lora.safetensors"), Kind::FinishedRun),
            (format!("{OTHER}step-000020/e1/lora.safetensors"), Kind::UnfinishedCheckpoint),
            ("claims/000001.json".to_owned(), Kind::SupersededClaim),
            ("claims/000001.state.json".to_owned(), Kind::SupersededClaim),
            ("runs/e1/corgi.safetensors".to_owned(), Kind::LosingAttempt),
            ("runs/e1/logs/events.out.tfevents.1700000000.finetune".to_owned(), Kind::LosingAttempt),
            (format!("{FINISHED}identity.json"), Kind::FinishedRun),
            ("runs/e1/result.json".to_owned(), Kind::LosingAttempt),
        ];
        let kept = [
            "claims/000002.json",
            "claims/000002.state.json",
            "claims/notes.txt",
            "result.json",
            "pytorch_lora_weights.safetensors",
            "runs/e1/notes.txt",
            "runs/e01/metrics.jsonl",
            "runs/e2/corgi.safetensors",
            "runs/e3/metrics.jsonl",
            ".checkpoints/old/identity.json",
            "holiday.jpg",
            &format!("{FINISHED}notes.txt"),
            &format!("{OTHER}identity.json"),
            &format!("{OTHER}step-000010/e1/manifest.json"),
            &format!("{OTHER}step-000010/e1/lora.safetensors"),
            &format!("{OTHER}step-000020/e2/lora.safetensors"),
        ];
        let all: Vec<&str> = gone.iter().map(|(key, _)| key.as_str()).chain(kept).collect();
        let winner = result("runs/e2/", &["corgi.safetensors"]);
        let found = in_output(&objects(&all), Some(&winner), Some(FINISHED), &BTreeMap::new(), 2);
        assert_eq!(names(&found), gone.iter().map(|(key, kind)| (key.as_str(), *kind)).collect::<Vec<_>>());
        assert_eq!((found.kept, found.unfinished), (kept.len(), vec![OTHER.to_owned()]));
    }

    #[test]
    fn of_an_unfinished_output_the_checkpoints_stay() {
        let keys = [
            "claims/000001.json",
            "claims/000003.json",
            "runs/e1/README.md",
            "runs/e1/metrics.jsonl",
            "runs/e1/other.safetensors",
            "runs/e1/report.html",
            &format!("{FINISHED}identity.json"),
            &format!("{FINISHED}prepared/{}.safetensors", "0a".repeat(32)),
            &format!("{FINISHED}step-000010/e1/manifest.json"),
            &format!("{FINISHED}step-000020/e2/state.json"),
            &format!("{FINISHED}step-000020/e3/state.json"),
        ];
        let found = in_output(&objects(&keys), None, None, &BTreeMap::new(), 3);
        let unfinished = format!("{FINISHED}step-000020/e2/state.json");
        assert_eq!(
            names(&found),
            [(unfinished.as_str(), Kind::UnfinishedCheckpoint), ("claims/000001.json", Kind::SupersededClaim)],
            "who has won is not known"
        );
        let lists = [(1, result("runs/e1/", &["other.safetensors"]))].into();
        let listed = in_output(&objects(&keys), Some(&result("runs/e3/", &[])), None, &lists, 3);
        for gone in ["runs/e1/metrics.jsonl", "runs/e1/report.html", "runs/e1/other.safetensors"] {
            assert!(names(&listed).contains(&(gone, Kind::LosingAttempt)), "{gone}: by its form, or by the attempt's own list");
        }
    }

    #[test]
    fn a_folder_of_checkpoints_goes_when_its_output_has_the_result() {
        let own =
            objects(&["identity.json", "step-000010/e1/manifest.json", "step-000010/e1/state.json", "step-000020/e1/state.json", "step-000020/e2/state.json"]);
        let found = in_checkpoints("s3://b/c/", &own, 3, true, 2);
        assert_eq!(
            (found.leftovers.len(), found.kept, &found.leftovers[0].key[..], &found.leftovers[4].key[..]),
            (5, 3, "step-000010/e1/manifest.json", "identity.json")
        );
        let found = in_checkpoints("s3://b/c/", &own, 3, false, 2);
        assert_eq!(names(&found), [("step-000020/e1/state.json", Kind::UnfinishedCheckpoint)]);
        assert_eq!((found.kept, found.unfinished), (7, vec!["s3://b/c/".to_owned()]));
    }
}
