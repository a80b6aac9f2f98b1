//! The curves of a run as columns over the steps, thinned to what a page can draw.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::history::{self, History};

/// Most steps on the page. A chart has about a thousand columns of pixels.
pub(super) const MOST_STEPS: usize = 2000;

/// Columns over the steps; what was not measured at a step is `null`. Numbers are those of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Curves {
    /// Updates done.
    pub step: Vec<u64>,
    /// Training loss.
    pub loss: Vec<Option<f64>>,
    /// Its exponential mean.
    pub smoothed_loss: Vec<Option<f64>>,
    /// Loss of the class pictures.
    pub prior_loss: Vec<Option<f64>>,
    /// Loss with fixed noise and timesteps.
    pub evaluation_loss: Vec<Option<f64>>,
    /// Learning rate.
    pub learning_rate: Vec<Option<f64>>,
    /// Norm of the gradient before clipping.
    pub gradient_norm: Vec<Option<f64>>,
    /// Seconds of the update.
    pub step_seconds: Vec<Option<f64>>,
    /// Steps measured, shown or not.
    pub measured_steps: usize,
}

/// What was measured at a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Row {
    loss: Option<f64>,
    smoothed_loss: Option<f64>,
    prior_loss: Option<f64>,
    evaluation_loss: Option<f64>,
    learning_rate: Option<f64>,
    gradient_norm: Option<f64>,
    step_seconds: Option<f64>,
}

impl Curves {
    /// Of a history.
    pub fn of(history: &History) -> Self {
        let mut rows: BTreeMap<u64, Row> = BTreeMap::new();
        let mut smoothed = history::smoothed(history.losses());
        for record in history.records() {
            let row = rows.entry(record.step).or_default();
            if record.loss.is_some() {
                row.smoothed_loss = smoothed.next();
            }
            row.loss = record.loss.or(row.loss);
            row.prior_loss = record.prior_loss.or(row.prior_loss);
            row.evaluation_loss = record.evaluation_loss.or(row.evaluation_loss);
            row.learning_rate = record.learning_rate.or(row.learning_rate);
            row.gradient_norm = record.gradient_norm.or(row.gradient_norm);
            row.step_seconds = record.step_seconds.or(row.step_seconds);
        }
        let measured_steps = rows.len();
        let mut curves = Self { measured_steps, ..Self::default() };
        for (step, row) in thinned(&rows.into_iter().collect::<Vec<_>>(), MOST_STEPS) {
            curves.step.push(step);
            curves.loss.push(row.loss);
            curves.smoothed_loss.push(row.smoothed_loss);
            curves.prior_loss.push(row.prior_loss);
            curves.evaluation_loss.push(row.evaluation_loss);
            curves.learning_rate.push(row.learning_rate);
            curves.gradient_norm.push(row.gradient_norm);
            curves.step_seconds.push(row.step_seconds);
        }
        curves
    }
}

/// About `most` rows: of equal stretches those with the least and the largest loss, so that no spike is lost; the first, the last and every
/// evaluation stay.
fn thinned(rows: &[(u64, Row)], most: usize) -> Vec<(u64, Row)> {
    if rows.len() <= most {
        return rows.to_vec();
    }
    let last = rows.len() - 1;
    let mut kept = Vec::new();
    for (i, stretch) in rows.chunks(rows.len().div_ceil(most / 2)).enumerate() {
        let first = i * rows.len().div_ceil(most / 2);
        let by_loss = |a: &&(u64, Row), b: &&(u64, Row)| a.1.loss.unwrap_or_default().total_cmp(&b.1.loss.unwrap_or_default());
        let extremes = [stretch.iter().min_by(by_loss), stretch.iter().max_by(by_loss)].map(|row| row.map(|(step, _)| *step));
        kept.extend(stretch.iter().enumerate().filter_map(|(j, row)| {
            let stays = extremes.contains(&Some(row.0)) || row.1.evaluation_loss.is_some() || first + j == 0 || first + j == last;
            stays.then_some(*row)
        }));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Record;

    fn history(steps: u64) -> History {
        let mut history = History::default();
        history.push(Record { evaluation_loss: Some(0.5), ..Record::default() });
        for step in 1..=steps {
            let loss = if step == steps / 2 { 9.0 } else { 1.0 / step as f64 };
            history.push(Record { step, loss: Some(loss), learning_rate: Some(1e-4), gradient_norm: Some(0.1), step_seconds: Some(2.0), ..Record::default() });
        }
        history.push(Record { step: steps, evaluation_loss: Some(0.25), ..Record::default() });
        history
    }

    #[test]
    fn every_step_of_a_short_run_is_there_with_its_very_numbers() {
        let curves = Curves::of(&history(5));
        assert_eq!((curves.step.clone(), curves.measured_steps), ((0..=5).collect(), 6));
        assert_eq!(curves.loss, [None, Some(1.0), Some(9.0), Some(1.0 / 3.0), Some(0.25), Some(0.2)]);
        assert_eq!(curves.evaluation_loss, [Some(0.5), None, None, None, None, Some(0.25)]);
        assert_eq!(curves.smoothed_loss[5], history(5).smoothed_loss());
        assert_eq!((curves.smoothed_loss[0], curves.smoothed_loss[1]), (None, Some(1.0)));
    }

    #[test]
    fn a_long_run_is_thinned_and_keeps_its_spike_its_ends_and_its_evaluations() {
        let curves = Curves::of(&history(50_001));
        assert!(curves.step.len() <= MOST_STEPS + 3 && curves.step.len() > MOST_STEPS / 2, "{}", curves.step.len());
        assert_eq!(curves.measured_steps, 50_002);
        let spike = curves.loss.iter().position(|loss| *loss == Some(9.0)).unwrap();
        assert_eq!(curves.step[spike], 25_000);
        assert_eq!((curves.step[0], *curves.step.last().unwrap()), (0, 50_001));
        assert_eq!(curves.evaluation_loss.iter().flatten().count(), 2);
        assert!(curves.step.is_sorted());
    }
}
