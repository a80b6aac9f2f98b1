//! What is measured while training: `metrics.jsonl` and the TensorBoard events made from it.

use serde::{Deserialize, Serialize};

use super::events::{self, Value};
use super::trainer::TrainerError;

/// One line of `metrics.jsonl`: an optimizer update, or a measurement between updates.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// Updates done (the first update's record has 1).
    pub step: u64,
    /// Passes over the dataset done, with a fraction.
    pub epoch: f64,
    /// Seconds since 1970.
    pub time: f64,
    /// Mean training loss of the update's micro-batches; with prior preservation plus the weighted loss of the class pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean loss of the class pictures, without its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior_loss: Option<f64>,
    /// Learning rate of the update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Norm of the gradient before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// Seconds that the update took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_seconds: Option<f64>,
    /// Peak resident memory of the process so far, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Loss with fixed noise and timesteps on the fixed subset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation_loss: Option<f64>,
}

impl Record {
    /// The record's numbers by their TensorBoard tags.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        [
            ("train/loss", self.loss),
            ("train/prior_loss", self.prior_loss),
            ("train/learning_rate", self.learning_rate),
            ("train/gradient_norm", self.gradient_norm),
            ("train/step_seconds", self.step_seconds),
            ("train/memory_gib", self.memory_bytes.map(|b| b as f64 / f64::from(1 << 30))),
            ("train/epoch", self.loss.is_some().then_some(self.epoch)),
            // Measured on training pictures, with fixed noise and timesteps.
            ("train/fixed_loss", self.evaluation_loss),
        ]
        .into_iter()
        .filter_map(|(tag, value)| Some((tag, value?)))
        .collect()
    }
}

/// A picture drawn while training.
#[derive(Debug, Clone)]
pub struct Picture {
    /// Updates done.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// Which prompt, from 0.
    pub prompt: usize,
    /// Encoded PNG.
    pub png: Vec<u8>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
}

impl Picture {
    /// Where the picture lies below the output prefix.
    pub fn file_name(&self) -> String {
        name_of_picture(self.step, self.prompt)
    }

    /// Step and prompt of such a name.
    pub fn parse(file_name: &str) -> Option<(u64, usize)> {
        let (step, prompt) = file_name.strip_prefix("validation/step-")?.strip_suffix(".png")?.split_once('/')?;
        let (step, prompt) = (step.parse().ok()?, prompt.parse().ok()?);
        (name_of_picture(step, prompt) == file_name).then_some((step, prompt))
    }
}

fn name_of_picture(step: u64, prompt: usize) -> String {
    format!("validation/step-{step:06}/{prompt}.png")
}

/// At this multiple of the loss at the start the LoRA has been ruined: noise and timesteps are the same, so the base model is the measure.
const RUINED: f64 = 2.0;
/// At this multiple it deserves a warning.
const WORSE: f64 = 1.1;

/// Everything measured so far; part of a checkpoint, so that a resumed run's files have no holes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    records: Vec<Record>,
}

impl History {
    /// Adds a record.
    pub fn push(&mut self, record: Record) {
        self.records.push(record);
    }

    /// All records, oldest first.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Training losses, oldest first.
    pub fn losses(&self) -> impl DoubleEndedIterator<Item = f64> {
        self.records.iter().filter_map(|r| r.loss)
    }

    /// The evaluation loss measured after `step` updates.
    pub fn evaluation_at(&self, step: u64) -> Option<f64> {
        self.records.iter().find(|r| r.step == step && r.evaluation_loss.is_some()).and_then(|r| r.evaluation_loss)
    }

    /// Refuses an end at which the LoRA is far worse than none.
    ///
    /// # Errors
    /// [`TrainerError::FarAboveStart`] where the fixed loss has multiplied since the start.
    pub fn check_end(&self, step: u64) -> Result<(), TrainerError> {
        match (self.evaluation_at(0), self.evaluation_at(step)) {
            (Some(start), Some(end)) if end > start * RUINED => Err(TrainerError::FarAboveStart { step, start, end }),
            _ => Ok(()),
        }
    }

    /// A warning where the LoRA is worse than none at the end.
    pub fn worse(&self, step: u64) -> Option<String> {
        let (start, end) = (self.evaluation_at(0)?, self.evaluation_at(step)?);
        (end > start * WORSE).then(|| {
            format!(
                "the loss with fixed noise has risen from {start:.4} to {end:.4} ({:+.0}%): the LoRA is probably worse than none; lower training.optimizer.learningRate",
                100.0 * (end / start - 1.0)
            )
        })
    }

    /// [`smoothed`] training loss of the last update: what progress shows.
    pub fn smoothed_loss(&self) -> Option<f64> {
        // 200 updates back the factor is below 1e-4.
        let recent: Vec<f64> = self.losses().rev().take(200).collect();
        smoothed(recent.into_iter().rev()).last()
    }

    /// `metrics.jsonl`.
    ///
    /// # Errors
    /// If a number cannot be written (JSON has no NaN: it becomes `null` and is refused when read back).
    pub fn to_jsonl(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut out = Vec::new();
        for record in &self.records {
            serde_json::to_writer(&mut out, record)?;
            out.push(b'\n');
        }
        Ok(out)
    }

    /// Reads `metrics.jsonl`.
    ///
    /// # Errors
    /// If a line is not a record.
    pub fn from_jsonl(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        let lines = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
        Ok(Self { records: lines.map(serde_json::from_slice).collect::<Result<_, _>>()? })
    }

    /// The TensorBoard event file of all records and `pictures`.
    pub fn to_events(&self, pictures: &[Picture]) -> Vec<u8> {
        let start = self.records.first().map_or(0.0, |r| r.time);
        let mut out = events::header(start);
        for record in &self.records {
            let values: Vec<(&str, Value<'_>)> = record.scalars().into_iter().map(|(tag, x)| (tag, Value::Scalar(x as f32))).collect();
            if !values.is_empty() {
                out.extend(events::summary(record.time, record.step, &values));
            }
        }
        for picture in pictures {
            let tag = format!("validation/prompt_{}", picture.prompt);
            let value = Value::Picture { png: &picture.png, width: picture.width, height: picture.height };
            out.extend(events::summary(picture.time, picture.step, &[(&tag, value)]));
        }
        out
    }
}

/// The exponential means of losses with factor 0.95, corrected for their start.
pub fn smoothed(losses: impl Iterator<Item = f64>) -> impl Iterator<Item = f64> {
    losses.scan((0.0, 0.0), |(sum, weight), loss| {
        *sum = 0.95 * *sum + 0.05 * loss;
        *weight = 0.95 * *weight + 0.05;
        Some(*sum / *weight)
    })
}

/// Seconds since 1970.
pub fn now() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_secs_f64() * 1000.0).round() / 1000.0
}

/// Peak resident memory of this process in bytes, where the system reports it (Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let mut history = History::default();
        history.push(Record { evaluation_loss: Some(0.5), time: 10.0, ..Record::default() });
        for step in 1..=3 {
            history.push(Record { step, epoch: 0.1, time: 11.0, loss: Some(step as f64 / 3.0), learning_rate: Some(1e-4), ..Record::default() });
        }
        history
    }

    #[test]
    fn jsonl_round_trips_exactly_and_a_damaged_line_is_an_error() {
        let bytes = history().to_jsonl().unwrap();
        assert_eq!(History::from_jsonl(&bytes).unwrap(), history());
        assert!(History::from_jsonl(&bytes[..bytes.len() - 5]).is_err());
    }

    #[test]
    fn smoothing_starts_at_the_first_loss_and_weighs_the_latest_most() {
        assert_eq!(History::default().smoothed_loss(), None);
        let mut one = History::default();
        one.push(Record { loss: Some(0.3), ..Record::default() });
        assert!((one.smoothed_loss().unwrap() - 0.3).abs() < 1e-12);
        let smoothed = history().smoothed_loss().unwrap();
        assert!(smoothed > 2.0 / 3.0 && smoothed < 0.7, "{smoothed}");
    }

    #[test]
    fn an_end_far_above_the_start_is_no_result() {
        let ended = |loss| {
            let mut history = history();
            history.push(Record { step: 3, evaluation_loss: Some(loss), ..Record::default() });
            history
        };
        for fine in [0.1, 0.5, 0.54] {
            assert!(ended(fine).check_end(3).is_ok() && ended(fine).worse(3).is_none(), "{fine}");
        }
        let worse = ended(0.75);
        assert!(worse.check_end(3).is_ok() && worse.worse(3).unwrap().contains("+50%"));
        let error = ended(1.1).check_end(3).unwrap_err().to_string();
        assert!(error.contains("0.5000") && error.contains("1.1000") && error.contains("learningRate"), "{error}");
        assert!(history().check_end(3).is_ok(), "not measured");
    }

    #[test]
    fn the_event_file_has_one_event_per_record_and_picture() {
        let picture = Picture { step: 3, time: 1.0, prompt: 0, png: vec![1, 2, 3], width: 8, height: 8 };
        let mut rest = &history().to_events(&[picture])[..];
        let mut events = 0;
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            rest = &rest[16 + length..];
            events += 1;
        }
        assert_eq!(events, 1 + 4 + 1);
    }
}
