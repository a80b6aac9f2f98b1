//! Shows how far a run is: a progress bar on a terminal, log lines elsewhere, `Progress` for the operator, metrics for Prometheus, a page for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::{SignedDuration, Timestamp};

use super::checkpoint::{ExecutionPlan, Saved};
use super::history::{self, History, Record};
use super::page::Page;
use finetune_api::{Progress, ReportedArtifact, ReportedCheckpoint, Stage, TrainingResult};

/// Where no bar is drawn, at most one line per this time.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shared by the run, its progress server and its transfers. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    progress: Progress,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    seconds_per_step: Option<f64>,
    latest: Option<Record>,
    transfers: BTreeMap<String, (u64, u64)>,
    transferred_bytes: u64,
    checkpoints: u64,
    checkpoint_seconds: f64,
    checkpoint_bytes: u64,
    preparing: (u64, u64),
    page: Page,
}

impl Reporter {
    /// With a bar when stderr is a terminal, else with log lines.
    pub fn new() -> Self {
        let bar =
            std::io::stderr().is_terminal().then(|| ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8)).with_style(spinner_style()));
        if let Some(bar) = &bar {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        let shared = Shared {
            progress: Progress::default(),
            bar,
            last_line: None,
            seconds_per_step: None,
            latest: None,
            transfers: BTreeMap::new(),
            transferred_bytes: 0,
            checkpoints: 0,
            checkpoint_seconds: 0.0,
            checkpoint_bytes: 0,
            preparing: (0, 0),
            page: Page::default(),
        };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Every change leaves the state usable, so that of a thread that panicked is too.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new stage begins; `what` says what is done, `total` of how many units (0: unknown).
    pub fn stage(&self, stage: Stage, what: &'static str, total: u64) {
        let mut shared = self.lock();
        shared.progress.stage = stage;
        shared.preparing = (0, total);
        shared.page.stages.begin(what);
        shared.transfers.clear();
        shared.last_line = None;
        if let Some(bar) = &shared.bar {
            bar.reset();
            bar.set_style(if total > 0 { counted_style() } else { spinner_style() });
            bar.set_length(total.max(1));
            bar.set_prefix("");
            bar.set_message(what);
        } else if total > 0 {
            tracing::info!(stage = ?stage, total, "{what}");
        } else {
            tracing::info!(stage = ?stage, "{what}");
        }
    }

    /// One unit of the stage is done.
    pub fn advance(&self, units: u64) {
        let mut shared = self.lock();
        shared.preparing.0 += units;
        if let Some(bar) = &shared.bar {
            bar.inc(units);
        } else if shared.line_is_due() {
            tracing::info!(done = shared.preparing.0, total = shared.preparing.1, "preparing");
        }
    }

    /// What the run is about.
    pub fn identity(&self, spec_hash: &str, dataset_digest: Option<&str>, skipped_samples: Option<u64>) {
        let mut shared = self.lock();
        shared.progress.spec_hash = Some(spec_hash.to_owned());
        shared.progress.dataset_digest = dataset_digest.map(str::to_owned);
        shared.progress.skipped_samples = skipped_samples;
    }

    /// So many captions are longer than what the encoders read.
    pub fn truncated_captions(&self, captions: u64) {
        self.lock().progress.truncated_captions = Some(captions);
    }

    /// Steps begin, at `step` of `total`.
    pub fn training(&self, step: u64, total: u64) {
        let mut shared = self.lock();
        shared.progress.stage = Stage::Training;
        shared.progress.step = step;
        shared.progress.total_steps = total;
        shared.page.stages.begin("training, with checkpoints and validation pictures");
        shared.last_line = None;
        if let Some(bar) = &shared.bar {
            bar.reset();
            bar.set_style(training_style());
            bar.set_length(total);
            bar.set_position(step);
            bar.reset_eta();
        }
    }

    /// How a step is divided now, and the most bytes that buffers took on a GPU so far (0 on the CPU).
    pub fn execution(&self, plan: &ExecutionPlan, device_peak_bytes: usize) {
        let progress = &mut self.lock().progress;
        progress.micro_batch = Some(plan.micro_batch);
        progress.recomputed_blocks = Some(plan.recomputed_blocks);
        let memory = progress.memory.get_or_insert_default();
        memory.device_peak_bytes = (device_peak_bytes > 0).then_some(device_peak_bytes as u64);
    }

    /// An update is done.
    pub fn update(&self, record: &Record, smoothed_loss: Option<f64>) {
        let mut shared = self.lock();
        let seconds = record.step_seconds.unwrap_or_default();
        let smoothed = shared.seconds_per_step.map_or(seconds, |old| 0.9 * old + 0.1 * seconds);
        shared.seconds_per_step = Some(smoothed);
        let left = shared.progress.total_steps.saturating_sub(record.step) as f64 * smoothed;
        let progress = &mut shared.progress;
        progress.step = record.step;
        progress.epoch = Some(record.epoch);
        progress.loss = smoothed_loss;
        progress.steps_per_second = (smoothed > 0.0).then(|| (1.0 / smoothed).min(1e6));
        progress.estimated_completion_time = SignedDuration::try_from_secs_f64(left).ok().and_then(|left| Timestamp::now().checked_add(left).ok());
        progress.memory.get_or_insert_default().host_peak_bytes = record.memory_bytes;
        let (step, total, rate) = (record.step, progress.total_steps, progress.steps_per_second.unwrap_or_default());
        shared.latest = Some(record.clone());
        shared.page.history.push(record.clone());
        if let Some(bar) = &shared.bar {
            bar.set_message(format!("loss {:.4}  {rate:.2} it/s", smoothed_loss.unwrap_or_default()));
            bar.set_position(step);
        } else if shared.line_is_due() || step == total {
            let (loss, learning_rate, gradient_norm) = (record.loss, record.learning_rate, record.gradient_norm);
            tracing::info!(step, total, loss, smoothed_loss, learning_rate, gradient_norm, steps_per_second = rate, seconds_left = left, "training");
        }
    }

    /// Everything measured so far, by earlier attempts too.
    pub fn history(&self, history: &History) {
        self.lock().page.history = history.clone();
    }

    /// What else the page shows.
    pub fn show(&self, change: impl FnOnce(&mut Page)) {
        change(&mut self.lock().page);
    }

    /// The page as of now.
    pub fn page(&self) -> Page {
        let shared = self.lock();
        Page { progress: shared.progress.clone(), ..shared.page.clone() }
    }

    /// A checkpoint is in the bucket.
    pub fn checkpoint(&self, saved: &Saved, seconds: f64) {
        let mut shared = self.lock();
        shared.checkpoints += 1;
        shared.checkpoint_seconds = seconds;
        shared.checkpoint_bytes = saved.bytes;
        shared.progress.checkpoint_error = None;
        shared.progress.last_checkpoint =
            Some(ReportedCheckpoint { step: saved.step, uri: saved.uri.clone(), sha256: saved.sha256.clone(), time: Timestamp::now() });
        tracing::info!(step = saved.step, uri = saved.uri, bytes = saved.bytes, seconds, "saved a checkpoint");
    }

    /// A checkpoint could not be saved; the run goes on.
    pub fn checkpoint_failed(&self, error: &str) {
        self.lock().progress.checkpoint_error = Some(error.to_owned());
    }

    /// The run has ended.
    pub fn finished(&self, result: TrainingResult, artifacts: Vec<ReportedArtifact>) {
        let mut shared = self.lock();
        shared.progress.stage = Stage::Finished;
        shared.progress.result = Some(result);
        shared.progress.artifacts = artifacts;
        shared.progress.estimated_completion_time = None;
        if let Some(bar) = shared.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// What `GET /progress` answers.
    pub fn progress(&self) -> Progress {
        self.lock().progress.clone()
    }

    /// What `GET /metrics` answers: Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut text = String::new();
        for Metric { name, kind, help, value } in self.lock().metrics() {
            let Some(value) = value else { continue };
            let _infallible = writeln!(text, "# HELP finetune_trainer_{name} {help}\n# TYPE finetune_trainer_{name} {kind}\nfinetune_trainer_{name} {value}");
        }
        text
    }

    /// Name, type and help of every metric that [`Reporter::metrics`] can show.
    pub fn metric_descriptions() -> Vec<(String, &'static str, &'static str)> {
        let reporter = Self::new();
        reporter.lock().metrics().map(|metric| (format!("finetune_trainer_{}", metric.name), metric.kind, metric.help)).into()
    }
}

/// A metric; without a value while it is not known.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: Option<f64>,
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    /// Every metric.
    fn metrics(&self) -> [Metric; 18] {
        let latest = self.latest.clone().unwrap_or_default();
        let progress = &self.progress;
        [
            ("step", "gauge", "Optimizer updates done.", Some(progress.step as f64)),
            ("steps_planned", "gauge", "Optimizer updates in all.", Some(progress.total_steps as f64)),
            ("epoch", "gauge", "Passes over the dataset done.", progress.epoch),
            ("loss", "gauge", "Training loss of the last update.", latest.loss),
            ("loss_smoothed", "gauge", "Training loss, smoothed.", progress.loss),
            ("learning_rate", "gauge", "Learning rate of the last update.", latest.learning_rate),
            ("gradient_norm", "gauge", "Norm of the last gradient before clipping.", latest.gradient_norm),
            ("step_seconds", "gauge", "Seconds of the last update.", latest.step_seconds),
            ("steps_per_second", "gauge", "Optimizer updates per second, smoothed.", progress.steps_per_second),
            ("checkpoints_total", "counter", "Checkpoints saved by this attempt.", Some(self.checkpoints as f64)),
            ("checkpoint_seconds", "gauge", "Seconds that saving the last checkpoint took.", Some(self.checkpoint_seconds)),
            ("checkpoint_bytes", "gauge", "Bytes of the last checkpoint.", Some(self.checkpoint_bytes as f64)),
            ("checkpoint_failing", "gauge", "1 while checkpoints cannot be saved.", Some(f64::from(u8::from(progress.checkpoint_error.is_some())))),
            ("downloaded_bytes_total", "counter", "Bytes downloaded by this attempt.", Some(self.transferred_bytes as f64)),
            ("micro_batch", "gauge", "Samples per forward pass.", progress.micro_batch.map(f64::from)),
            ("recomputed_blocks", "gauge", "Blocks that are recomputed in the backward pass.", progress.recomputed_blocks.map(f64::from)),
            ("device_memory_peak_bytes", "gauge", "Peak bytes of buffers on the GPU.", progress.memory.and_then(|m| m.device_peak_bytes).map(|b| b as f64)),
            ("host_memory_peak_bytes", "gauge", "Peak memory of the process, in bytes.", history::peak_memory_bytes().map(|b| b as f64)),
        ]
        .map(|(name, kind, help, value)| Metric { name, kind, help, value })
    }

    /// Whether it is time for another log line; if so, the clock starts again.
    fn line_is_due(&mut self) -> bool {
        let due = self.bar.is_none() && self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }

    fn show_transfers(&mut self) {
        let (done, size) = self.transfers.values().fold((0, 0), |(d, s), (done, size)| (d + done, s + size));
        if let Some(bar) = &self.bar {
            bar.set_style(bytes_style());
            bar.set_length(size.max(1));
            bar.set_position(done);
        } else if self.line_is_due() {
            tracing::info!(bytes = done, of = size, files = self.transfers.len(), "downloading");
        }
    }
}

/// Downloads report here.
impl finetune_store::Progress for Reporter {
    fn start(&self, name: &str, size: u64, resumed: u64) {
        let mut shared = self.lock();
        shared.transfers.insert(name.to_owned(), (resumed, size));
        shared.show_transfers();
    }

    fn advance(&self, name: &str, bytes: u64) {
        let mut shared = self.lock();
        shared.transferred_bytes += bytes;
        if let Some((done, _)) = shared.transfers.get_mut(name) {
            *done += bytes;
        }
        shared.show_transfers();
    }

    fn restart(&self, name: &str) {
        if let Some((done, _)) = self.lock().transfers.get_mut(name) {
            *done = 0;
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

fn spinner_style() -> ProgressStyle {
    style("{spinner} {msg} {elapsed}")
}

fn counted_style() -> ProgressStyle {
    style("{msg} [{bar:30}] {pos}/{len} {elapsed}")
}

fn bytes_style() -> ProgressStyle {
    style("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

fn training_style() -> ProgressStyle {
    style("training [{bar:30}] {pos}/{len}  {msg}  {elapsed} < {eta}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use finetune_api::plan::FrozenWeights;

    #[test]
    fn reports_are_believed_by_the_operator_and_estimates_are_absolute() {
        let reporter = Reporter::new();
        reporter.training(0, 10);
        for step in 1..=4 {
            reporter.update(&Record { step, epoch: 0.1, loss: Some(0.5), step_seconds: Some(2.0), ..Record::default() }, Some(0.5));
        }
        let progress = Progress::parse(&serde_json::to_vec(&reporter.progress()).unwrap()).unwrap();
        assert_eq!((progress.step, progress.total_steps, progress.steps_per_second), (4, 10, Some(0.5)));
        let left = progress.estimated_completion_time.unwrap().duration_since(Timestamp::now()).as_secs_f64();
        assert!((11.0..=12.0).contains(&left), "{left}");
    }

    #[test]
    fn metrics_are_in_prometheus_text_format() {
        let reporter = Reporter::new();
        reporter.training(0, 10);
        reporter.execution(
            &ExecutionPlan { device: "cuda".into(), dtype: "bf16".into(), weights: FrozenWeights::Float, micro_batch: 4, recomputed_blocks: 10 },
            1 << 33,
        );
        reporter.update(&Record { step: 1, loss: Some(0.25), ..Record::default() }, Some(0.25));
        finetune_store::Progress::start(&reporter, "a", 10, 0);
        finetune_store::Progress::advance(&reporter, "a", 7);
        let text = reporter.metrics();
        for line in [
            "# TYPE finetune_trainer_loss gauge",
            "finetune_trainer_loss 0.25",
            "finetune_trainer_step 1",
            "finetune_trainer_downloaded_bytes_total 7",
            "finetune_trainer_recomputed_blocks 10",
            "finetune_trainer_device_memory_peak_bytes 8589934592",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
