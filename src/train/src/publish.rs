//! Puts the results into the output prefix, so that exactly one attempt's files are ever read.
//!
//! # Order
//! 1. All files into `runs/eN/`, which no other attempt writes.
//! 2. If still the newest attempt: `result.json` is created if absent. Whoever creates it has won.
//! 3. The fixed names are copied from the winner's folder, by whoever comes by: the winner, a loser, or a later run.
//!
//! A crash between any two leaves either no `result.json` (the run is continued) or a complete one (the copies are repaired).

use std::collections::BTreeMap;

use bytes::Bytes;

use super::checkpoint::{Checkpoints, read_optional};
use super::result::{self, FileDigest, RunResult};
use finetune_api::plan::ExistingOutput;
use finetune_store::{Created, Store, StoreError, fault};

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
    /// A complete run of the same spec. Whether the dataset is the same too is not known yet.
    SameSpec(Box<RunResult>),
    /// Anything else.
    Other(String),
}

/// Looks at the output prefix. Claims, runs without a result and checkpoints (below `.checkpoints/`) do not matter.
///
/// # Errors
/// If the store fails.
pub async fn look(output: &Store, spec_hash: &str) -> Result<Found, PublishError> {
    if let Some(bytes) = read_optional(output, result::FILE_NAME).await? {
        return Ok(match serde_json::from_slice::<RunResult>(&bytes) {
            Ok(found) if found.spec_hash == spec_hash => Found::SameSpec(Box::new(found)),
            Ok(found) => Found::Other(format!("the result of another spec (job {:?}, {})", found.job, found.spec_hash)),
            Err(_) => Found::Other("a result.json that cannot be understood".to_owned()),
        });
    }
    let ours = |key: &str| ["claims/", "runs/", ".checkpoints/"].iter().any(|p| key.starts_with(p));
    let mut foreign: Vec<String> = output.list("").await?.into_iter().map(|o| o.key).filter(|k| !ours(k)).collect();
    if foreign.is_empty() {
        return Ok(Found::Nothing);
    }
    let count = foreign.len();
    foreign.truncate(3);
    let more = if count > 3 { format!(" and {} more", count - 3) } else { String::new() };
    Ok(Found::Other(format!("files of another origin ({}{more})", foreign.join(", "))))
}

/// Whether to train, given what was found and the dataset's digest (where it is known already).
///
/// # Errors
/// [`PublishError::OutputExists`].
pub fn decide(output: &str, policy: ExistingOutput, found: &Found, dataset_digest: Option<&str>) -> Result<Decision, PublishError> {
    let exists = |what: String| Err(PublishError::OutputExists { uri: output.to_owned(), what });
    match (policy, found) {
        (_, Found::Nothing) | (ExistingOutput::Overwrite, _) => Ok(Decision::Train),
        (_, Found::Other(what)) => exists(what.clone()),
        (ExistingOutput::Fail, Found::SameSpec(result)) => exists(format!("the result of a run of the same spec ({})", result.completed)),
        (ExistingOutput::ReuseIfComplete, Found::SameSpec(result)) => match dataset_digest {
            None => Ok(Decision::CompareDataset),
            Some(digest) if digest == result.dataset_digest => Ok(Decision::Reuse),
            Some(digest) => exists(format!("the result of the same spec on another dataset ({}, now {digest})", result.dataset_digest)),
        },
    }
}

/// What [`decide`] has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing stands in the way.
    Train,
    /// The dataset's digest decides.
    CompareDataset,
    /// The result is already there.
    Reuse,
}

/// Publishes `files` as this attempt's run; returns the result that stands, which is another attempt's if that one was first.
///
/// # Errors
/// If this attempt has been superseded, or the store fails.
pub async fn publish(
    output: &Store,
    checkpoints: &Checkpoints,
    policy: ExistingOutput,
    files: BTreeMap<String, Bytes>,
    result: &RunResult,
) -> Result<RunResult, PublishError> {
    let run = output.child(&result.run)?;
    for (name, bytes) in &files {
        run.put(name, bytes.clone()).await?;
    }
    let text = Bytes::from(serde_json::to_vec_pretty(result).map_err(PublishError::Json)?);
    run.put(result::FILE_NAME, text.clone()).await?;
    checkpoints.ensure_newest().await?;
    fault::pause("before-result").await;
    loop {
        if matches!(output.create(result::FILE_NAME, text.clone()).await?, Created::Yes) {
            repair(output, result).await?;
            return Ok(result.clone());
        }
        let found = look(output, &result.spec_hash).await?;
        let same = match &found {
            Found::SameSpec(theirs) if theirs.dataset_digest == result.dataset_digest => Some(theirs),
            _ => None,
        };
        match (policy, same) {
            // Another attempt of this very run was first.
            (ExistingOutput::ReuseIfComplete | ExistingOutput::Fail, Some(theirs)) => {
                repair(output, theirs).await?;
                return Ok((**theirs).clone());
            }
            (ExistingOutput::Overwrite, _) => {
                checkpoints.ensure_newest().await?;
                output.delete(result::FILE_NAME).await?;
            }
            (_, None) => {
                let what = if let Found::Other(what) = found { what } else { "the result of another run".to_owned() };
                return Err(PublishError::OutputExists { uri: output.uri().to_owned(), what });
            }
        }
    }
}

/// Makes the fixed names equal to the files of the run that `result` names.
///
/// # Errors
/// [`PublishError::Damaged`] if a file has to be repaired and the winner's own is not what it was.
pub async fn repair(output: &Store, result: &RunResult) -> Result<(), PublishError> {
    for (name, expected) in &result.files {
        if read_matching(output, name, expected).await?.is_some() {
            continue;
        }
        let source = format!("{}{name}", result.run);
        match read_matching(output, &source, expected).await? {
            Some(bytes) => output.put(name, bytes).await?,
            None => return Err(PublishError::Damaged { uri: output.uri().to_owned(), file: source }),
        }
    }
    Ok(())
}

async fn read_matching(store: &Store, key: &str, expected: &FileDigest) -> Result<Option<Bytes>, StoreError> {
    Ok(read_optional(store, key).await?.filter(|b| expected.matches(b)))
}
