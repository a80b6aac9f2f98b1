//! Which keys below the checkpoint prefix a run writes: by their exact form. Everything else there belongs to somebody else and is never touched.

use super::place::Place;
use super::snapshot::{LORA_FILE, METRICS_FILE, OPTIMIZER_FILE, STATE_FILE};
use super::{PREPARED, identity};
use crate::events;
use crate::history::Picture;
use crate::log;
use crate::page;
use crate::validation;
use finetune_data::cache;
use finetune_store::manifest;

/// A key that a run writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// `identity.json`.
    Identity,
    /// `prepared/<digest>.safetensors`: named by its content.
    Prepared,
    /// `logs/eN/metrics.jsonl`, `logs/eN/report.html`, `logs/eN/trainer.log` and `logs/eN/events.out.tfevents.<seconds>.finetune`.
    Log,
    /// `pictures/validation/step-S/P.png`.
    Picture,
    /// `step-S/eN/<file>`.
    Checkpoint(Place, &'a str),
}

impl<'a> Key<'a> {
    /// What `key` is, if a run may have written it.
    pub fn parse(key: &'a str) -> Option<Self> {
        if key == identity::FILE_NAME {
            return Some(Self::Identity);
        }
        if let Some(name) = key.strip_prefix(PREPARED) {
            return cache::is_pack_name(name).then_some(Self::Prepared);
        }
        if let Some(rest) = key.strip_prefix(LOGS) {
            return is_log(rest).then_some(Self::Log);
        }
        if let Some(name) = key.strip_prefix(validation::FOLDER).and_then(|rest| rest.strip_prefix('/')) {
            return Picture::parse(name).map(|_| Self::Picture);
        }
        let (place, file) = Place::parse(key)?;
        [LORA_FILE, OPTIMIZER_FILE, STATE_FILE, METRICS_FILE, manifest::FILE_NAME].contains(&file).then_some(Self::Checkpoint(place, file))
    }

    /// In which order keys are deleted: manifests first, for a folder that is only half deleted must not look complete; the identity last, for as long as
    /// there is something of a run, it says whose that is.
    pub fn deletion_rank(self) -> u8 {
        match self {
            Self::Checkpoint(_, manifest::FILE_NAME) => 0,
            Self::Identity => 2,
            _ => 1,
        }
    }
}

/// Folder of the measurements and the log of a run that lasts.
const LOGS: &str = "logs/";

/// The folder of an attempt's measurements and log: `logs/eN`.
pub fn log_folder(attempt: u64) -> String {
    format!("{LOGS}e{attempt}")
}

fn is_log(rest: &str) -> bool {
    let Some((folder, file)) = rest.split_once('/') else { return false };
    let attempt = folder.strip_prefix('e').and_then(|digits| digits.parse::<u64>().ok());
    attempt.is_some_and(|attempt| format!("e{attempt}") == folder)
        && ([METRICS_FILE, page::FILE_NAME, log::FILE_NAME].contains(&file) || events::is_file_name(file, events::HOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_writes_is_known_by_its_exact_form_and_nothing_else_is() {
        let pack = format!("prepared/{}.safetensors", "0a".repeat(32));
        for own in [
            "identity.json",
            &pack,
            "logs/e2/metrics.jsonl",
            "logs/e2/report.html",
            "logs/e2/trainer.log",
            "logs/e12/events.out.tfevents.1700000000.finetune",
            "pictures/validation/step-000500/0.png",
            "step-000200/e3/lora.safetensors",
            "step-000200/e3/optimizer.safetensors",
            "step-000200/e3/state.json",
            "step-000200/e3/metrics.jsonl",
            "step-12345678/e10/manifest.json",
        ] {
            assert!(Key::parse(own).is_some(), "{own}");
        }
        for foreign in [
            "",
            "base-model.safetensors",
            "sd3/model_index.json",
            "loras/older/pytorch_lora_weights.safetensors",
            "result.json",
            "old/identity.json",
            "identity.json.bak",
            "prepared/notes.txt",
            "prepared/sub/0.safetensors",
            &pack.to_uppercase(),
            &pack.replace("0a0a", "0A0A"),
            &pack.replace("0a0a", "0a"),
            "logs/metrics.jsonl",
            "logs/e02/metrics.jsonl",
            "logs/e2/train.log",
            "logs/report.html",
            "logs/e2/reports.html",
            "logs/trainer.log",
            "logs/e2/trainer.log.1",
            "logs/e2/sub/metrics.jsonl",
            "logs/e2/events.out.tfevents.1700000000.host",
            "logs/e2/events.out.tfevents.17x.finetune",
            "pictures/cat.png",
            "pictures/validation/step-500/0.png",
            "pictures/validation/step-000500/00.png",
            "pictures/validation/step-000500/+1.png",
            "step-200/e3/lora.safetensors",
            "step-000200/lora.safetensors",
            "step-000200/e03/lora.safetensors",
            "step-000200/e3/pytorch_lora_weights.safetensors",
            "step-000200/e3/sub/lora.safetensors",
            "step-000200/e3/",
            "checkpoint-500/optimizer.bin",
        ] {
            assert_eq!(Key::parse(foreign), None, "{foreign}");
        }
    }
}
