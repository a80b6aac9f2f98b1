//! Puts the results into the output prefix, so that exactly one attempt's files are ever read.
//!
//! # Order
//! 1. All files into `runs/eN/`, which no other attempt writes.
//! 2. If still the newest attempt: `result.json` is created if absent. Whoever creates it has won.
//! 3. The fixed names are copied from the winner's folder, by whoever comes by: the winner, a loser, or a later run.
//!
//! A crash between any two leaves either no `result.json` (the run is continued) or a complete one (the copies are repaired).
//!
//! People edit model cards: a `README.md` that is not exactly what a run has written there is left alone, with a note.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::card;
use super::checkpoint::{Checkpoints, Digests, read_optional, some_of};
use super::result::{self, Difference, FileDigest, RunResult};
use finetune_api::plan::{ExistingOutput, OutputConfig, OutputDtype, TrainConfig};
use finetune_store::{Created, ObjectInfo, Store, StoreError, claims, fault, is_placeholder};

/// Why results cannot be published or reused.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store failed, or a newer attempt has taken over.
    #[error("failed to use the output")]
    Store(#[from] StoreError),
    /// `result.json` cannot be written.
    #[error("failed to write result.json")]
    Json(#[source] serde_json::Error),
    /// Something else is there.
    #[error("{uri} already holds {what}. Choose another output.uri, delete what is there, or set output.existing: Overwrite")]
    OutputExists {
        /// The output prefix.
        uri: String,
        /// What was found.
        what: String,
    },
    /// `result.json` is somebody else's, and not to be replaced.
    #[error("{uri}result.json was not written by finetune, and a run replaces only what it wrote: choose another output.uri, or move that file away")]
    ForeignResult {
        /// The output prefix.
        uri: String,
    },
    /// The winner's own file is gone or changed.
    #[error("{uri}{file} is missing or damaged, so the output cannot be repaired: set output.existing: Overwrite to train again")]
    Damaged {
        /// The output prefix.
        uri: String,
        /// The file.
        file: String,
    },
}

/// What the output prefix holds at the start of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// Nothing that matters.
    Nothing,
    /// A complete run of the same spec. Whether dataset and model are the same too is not known yet.
    SameSpec(Box<RunResult>),
    /// Anything else.
    Other(String),
    /// A `result.json` that no run has written.
    Foreign,
}

/// What a run would find its own result by.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// `sha256:<hex>` of what determines the weights.
    pub spec_hash: &'a str,
    /// The files' number format, where the job names one.
    pub dtype: Option<OutputDtype>,
}

impl<'a> From<&'a TrainConfig> for Wanted<'a> {
    fn from(config: &'a TrainConfig) -> Self {
        Self { spec_hash: &config.spec_hash, dtype: config.output.dtype }
    }
}

/// Looks at the output prefix. Claims, runs without a result, checkpoints (below `.checkpoints/`, and those of this run at `checkpoints`, if that
/// is below the output) and placeholders do not matter.
///
/// # Errors
/// If the store fails.
pub async fn look(output: &Store, checkpoints: &str, wanted: Wanted<'_>) -> Result<Found, PublishError> {
    if let Some(bytes) = read_optional(output, result::FILE_NAME).await? {
        return Ok(match serde_json::from_slice::<RunResult>(&bytes) {
            Ok(found) if found.spec_hash == wanted.spec_hash => match wanted.dtype.filter(|&dtype| !found.is_written_as(dtype)) {
                Some(dtype) => Found::Other(format!("the result of the same spec in another number format than {dtype} (output.dtype)")),
                None => Found::SameSpec(Box::new(found)),
            },
            Ok(found) => Found::Other(format!("the result of another spec (job {:?}, {})", found.job, found.spec_hash)),
            Err(_) => Found::Foreign,
        });
    }
    let objects = output.list("").await?;
    let foreign = foreign(&objects, checkpoints.strip_prefix(output.uri()));
    if foreign.is_empty() {
        return Ok(Found::Nothing);
    }
    Ok(Found::Other(format!("files of another origin ({})", some_of(&foreign))))
}

/// The keys below an output prefix that no run has written there; `checkpoints` is the place of this run's checkpoints, if that is below it.
fn foreign(objects: &[ObjectInfo], checkpoints: Option<&str>) -> Vec<String> {
    let newest = objects.iter().filter_map(|object| claims::epoch_of(&object.key)).max().unwrap_or_default();
    let ours = |key: &str| {
        claims::is_own(key)
            || attempt_of(key).is_some_and(|attempt| attempt <= newest)
            || is_default_checkpoint(key)
            || checkpoints.is_some_and(|checkpoints| key.starts_with(checkpoints))
    };
    objects.iter().filter(|object| !ours(&object.key) && !is_placeholder(object)).map(|object| object.key.clone()).collect()
}

/// The attempt in whose folder `runs/eN/` a key lies.
pub(super) fn attempt_of(key: &str) -> Option<u64> {
    let (folder, _) = key.strip_prefix("runs/e")?.split_once('/')?;
    folder.parse().ok().filter(|attempt: &u64| attempt.to_string() == folder)
}

/// Whether a key lies in `.checkpoints/<16 hexadecimal digits>/`.
fn is_default_checkpoint(key: &str) -> bool {
    let folder = key.strip_prefix(".checkpoints/").and_then(|rest| rest.split_once('/'));
    folder.is_some_and(|(folder, _)| folder.len() == 16 && folder.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
}

/// Whether to train, given what was found and the digests of dataset and model (where they are known already). A result of the run `own` itself
/// was published by an attempt that could not say so any more: whatever the policy says about existing results, it is this job's own.
///
/// # Errors
/// [`PublishError::OutputExists`].
pub fn decide(output: &str, policy: ExistingOutput, found: &Found, own: &str, digests: Option<&Digests>) -> Result<Decision, PublishError> {
    let exists = |what: String| Err(PublishError::OutputExists { uri: output.to_owned(), what });
    match (policy, found) {
        (_, Found::Foreign) => Err(PublishError::ForeignResult { uri: output.to_owned() }),
        (ExistingOutput::Fail | ExistingOutput::Overwrite, Found::SameSpec(result)) if result.is_of(own) => {
            Ok(if digests.is_some() { Decision::Reuse } else { Decision::Compare })
        }
        (_, Found::Nothing) | (ExistingOutput::Overwrite, _) => Ok(Decision::Train),
        (_, Found::Other(what)) => exists(what.clone()),
        (ExistingOutput::Fail, Found::SameSpec(result)) => exists(format!("the result of a run of the same spec ({})", result.completed)),
        (ExistingOutput::ReuseIfComplete, Found::SameSpec(result)) => match digests.map(|digests| result.differs_in(digests)) {
            None => Ok(Decision::Compare),
            Some(None) => Ok(Decision::Reuse),
            Some(Some(Difference { what, theirs, ours })) => exists(format!("the result of the same spec on another {what} ({theirs}, now {ours})")),
        },
    }
}

/// What [`decide`] has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing stands in the way.
    Train,
    /// The digests of dataset and model decide.
    Compare,
    /// The result is already there.
    Reuse,
}

/// What stands in the output.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The result.
    pub result: RunResult,
    /// What a person should know of the output besides.
    pub note: Option<String>,
}

/// Publishes `files` as this attempt's run; returns the result that stands, which is another attempt's if that one was first.
///
/// # Errors
/// If this attempt has been superseded, or the store fails.
pub async fn publish(
    output: &Store,
    checkpoints: &Checkpoints,
    config: &OutputConfig,
    files: BTreeMap<String, Bytes>,
    result: &RunResult,
) -> Result<Published, PublishError> {
    let policy = config.existing;
    let wanted = Wanted { spec_hash: &result.spec_hash, dtype: config.dtype };
    let run = output.child(&result.run)?;
    for (name, bytes) in &files {
        run.put(name, bytes.clone()).await?;
    }
    let text = Bytes::from(serde_json::to_vec_pretty(result).map_err(PublishError::Json)?);
    run.put(result::FILE_NAME, text.clone()).await?;
    checkpoints.ensure_newest().await?;
    if policy != ExistingOutput::Overwrite {
        refuse_to_replace(output, result).await?;
    }
    fault::pause("before-result").await;
    loop {
        if matches!(output.create(result::FILE_NAME, text.clone()).await?, Created::Yes) {
            let note = repair(output, result).await?;
            return Ok(Published { result: result.clone(), note });
        }
        let found = look(output, checkpoints.store().uri(), wanted).await?;
        let same = match &found {
            Found::SameSpec(theirs) if theirs.differs_in(checkpoints.digests()).is_none() => Some(theirs),
            _ => None,
        };
        match (policy, same) {
            _ if found == Found::Foreign => return Err(PublishError::ForeignResult { uri: output.uri().to_owned() }),
            // Another attempt of this very run was first.
            (_, Some(theirs)) if policy != ExistingOutput::Overwrite || result.job_uid.as_ref().is_some_and(|own| theirs.is_of(own)) => {
                let note = repair(output, theirs).await?;
                return Ok(Published { result: (**theirs).clone(), note });
            }
            (ExistingOutput::Overwrite, _) => {
                checkpoints.ensure_newest().await?;
                withdraw_card(output).await?;
                output.delete(result::FILE_NAME).await?;
            }
            (_, _) => {
                let what = if let Found::Other(what) = found { what } else { "the result of another run".to_owned() };
                return Err(PublishError::OutputExists { uri: output.uri().to_owned(), what });
            }
        }
    }
}

/// The card of a result that is about to be replaced goes with it, unless somebody has changed it: its digest is in the result.
async fn withdraw_card(output: &Store) -> Result<(), PublishError> {
    let Some(bytes) = read_optional(output, result::FILE_NAME).await? else { return Ok(()) };
    let Ok(old) = serde_json::from_slice::<RunResult>(&bytes) else { return Ok(()) };
    let Some(expected) = old.files.get(card::FILE_NAME) else { return Ok(()) };
    if read_matching(output, card::FILE_NAME, expected).await?.is_some() {
        output.delete(card::FILE_NAME).await?;
    }
    Ok(())
}

/// Somebody may have put files of these names there while the run lasted: they are not lost either. With a `result.json` they are copies.
async fn refuse_to_replace(output: &Store, result: &RunResult) -> Result<(), PublishError> {
    if output.head(result::FILE_NAME).await?.is_some() {
        return Ok(());
    }
    for (name, expected) in result.files.iter().filter(|(name, _)| *name != card::FILE_NAME) {
        let Some(found) = output.head(name).await?.filter(|found| !is_placeholder(found)) else { continue };
        if found.size != expected.size || read_matching(output, name, expected).await?.is_none() {
            return Err(PublishError::OutputExists { uri: output.uri().to_owned(), what: format!("{name} of another origin") });
        }
    }
    Ok(())
}

/// Makes the fixed names equal to the files of the run that `result` names; a card that is there and differs stays, and is mentioned.
///
/// # Errors
/// [`PublishError::Damaged`] if a file has to be repaired and the winner's own is not what it was.
pub async fn repair(output: &Store, result: &RunResult) -> Result<Option<String>, PublishError> {
    let mut note = None;
    for (name, expected) in &result.files {
        if read_matching(output, name, expected).await?.is_some() {
            continue;
        }
        if name == card::FILE_NAME && output.head(name).await?.is_some_and(|found| !is_placeholder(&found)) {
            let text = format!("left alone: {}{name} is not as this run has written it; the run's own is {}{name}", output.uri(), result.run);
            tracing::warn!("{text}");
            note = Some(text);
            continue;
        }
        let source = format!("{}{name}", result.run);
        match read_matching(output, &source, expected).await? {
            Some(bytes) => output.put(name, bytes).await?,
            None => return Err(PublishError::Damaged { uri: output.uri().to_owned(), file: source }),
        }
    }
    Ok(note)
}

async fn read_matching(store: &Store, key: &str, expected: &FileDigest) -> Result<Option<Bytes>, StoreError> {
    Ok(read_optional(store, key).await?.filter(|b| expected.matches(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_leave_in_the_output_is_known_by_its_exact_form() {
        let find = |keys: &[&str], checkpoints: Option<&str>| {
            let objects: Vec<ObjectInfo> = keys.iter().map(|key| ObjectInfo { key: (*key).to_owned(), size: 1, etag: None }).collect();
            foreign(&objects, checkpoints)
        };
        let ours = ["claims/000001.json", "claims/000002.json", "runs/e1/metrics.jsonl", "runs/e2/validation/step-000001/0.png", ".DS_Store"];
        assert_eq!(find(&ours, None), [""; 0]);
        let checkpoint = ".checkpoints/0123456789abcdef/step-000010/e1/manifest.json";
        assert_eq!(find(&[checkpoint, "ckpt/anything"], Some("ckpt/")), [""; 0]);
        for foreign in ["claims/notes.txt", "runs/e3/x", "runs/e02/x", "runs/Nov30_host/events", ".checkpoints/old/x", "ckpt-2/x", "lora.safetensors"] {
            assert_eq!(find(&[&ours[..], &[foreign]].concat(), Some("ckpt/")), [foreign]);
        }
    }
}
