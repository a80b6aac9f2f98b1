//! How long a run takes on this machine's CPU, before it begins: the plan's work, divided by what a matrix product reaches here.

use std::fmt;
use std::time::{Duration, Instant};

use finetune_api::FineTuneJob;
use finetune_api::plan::{self, DeviceFacts, Facts, ModelShape, TrainConfig};
use finetune_compute::kernels::{Cpu, Device as _};
use finetune_model::mmdit::MmditConfig;
use finetune_store::model_source::ModelSource;
use finetune_store::{Buckets, RetryPolicy, Store};
use finetune_train::{division, environment};

/// Longest run that the CPU takes over from a GPU without being asked to.
const LONG: f64 = 3600.0;
/// Share of the matrix product's rate that a training step reaches.
const SHARE: f64 = 0.6;
/// Largest configuration that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// How long a run takes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Estimate {
    /// Seconds, if the number of steps is known.
    seconds: Option<f64>,
    /// Seconds of one step.
    step: f64,
    /// Whether the model's shape is assumed.
    assumed: bool,
}

impl Estimate {
    /// A run of so many seconds.
    #[cfg(test)]
    pub(super) fn of(seconds: f64) -> Self {
        Self { seconds: Some(seconds), step: seconds, assumed: false }
    }

    /// Whether nobody should have to find out by waiting.
    pub(super) fn is_long(&self) -> bool {
        self.seconds.is_none_or(|seconds| seconds > LONG)
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seconds {
            Some(seconds) => write!(f, "about {}", duration(seconds))?,
            None => write!(f, "about {} for each step, of as many steps as the dataset's epochs have", duration(self.step))?,
        }
        if self.assumed { f.write_str(" (if the model is Stable Diffusion 3 Medium)") } else { Ok(()) }
    }
}

/// The length of the job on the CPU. Preparing (text encoders, VAE) and drawing pictures come on top.
pub(super) fn on_cpu(job: &FineTuneJob, config: &TrainConfig, buckets: &Buckets) -> Estimate {
    let shape = shape(config, buckets);
    let (known, assumed) = (shape.unwrap_or(ModelShape::SD3_MEDIUM), shape.is_none());
    let facts = Facts { device: Some(DeviceFacts::Cpu), model: Some(known), ..Facts::default() };
    let Ok(plan) = plan::resolve(&job.spec, "default", &config.job, &facts) else { return Estimate { seconds: None, step: 0.0, assumed } };
    let flops = |steps| plan::run_flops(&plan.config.training, &known, &plan.memory, steps);
    let step = cpu_seconds(flops(1));
    Estimate { seconds: plan.steps.total_steps.map(|steps| step * flops(steps) / flops(1)), step, assumed }
}

/// Seconds that so many floating-point operations of training take on this machine's CPU.
pub(super) fn cpu_seconds(flops: f64) -> f64 {
    flops / (SHARE * rate(&Cpu::default()))
}

/// The model's shape, where its configuration can be read without waiting.
fn shape(config: &TrainConfig, buckets: &Buckets) -> Option<ModelShape> {
    let (source, mut options) = environment::model_source(config, buckets);
    let ModelSource::ObjectStore { uri, .. } = source else { return None };
    options.retry = RetryPolicy { max_retries: 1, total: Duration::from_secs(5), ..options.retry };
    let store = Store::open(&uri, &options).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let json = runtime.block_on(store.get_limited("transformer/config.json", MAX_CONFIG_BYTES)).ok()?;
    let config: MmditConfig = serde_json::from_slice(&json).ok()?;
    config.check().ok()?;
    Some(division::shape(&config))
}

/// Floating-point operations per second of a matrix product on the device: 0.2 s of one that is as wide as the model's.
fn rate(device: &Cpu) -> f64 {
    const WIDTH: usize = 1536;
    const ROWS: usize = 512;
    let weight = device.frozen(WIDTH, WIDTH, &vec![0.01; WIDTH * WIDTH]);
    let x = device.upload(&vec![0.5; ROWS * WIDTH]);
    let mut y = device.zeros(ROWS * WIDTH);
    let mut product = || {
        device.linear(ROWS, &x, &weight, None, None, &mut y);
    };
    product();
    let started = Instant::now();
    let mut products = 0;
    while started.elapsed() < Duration::from_millis(200) {
        product();
        products += 1;
    }
    f64::from(products) * 2.0 * (ROWS * WIDTH * WIDTH) as f64 / started.elapsed().as_secs_f64()
}

/// A time for people.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        360_000.. => format!("{:.0} days", seconds / 86_400.0),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_readable() {
        assert_eq!([0.4, 61.6, 7325.0, 500_000.0].map(duration), ["0.4 s", "1 min 2 s", "2 h 2 min", "6 days"]);
    }

    #[test]
    fn a_run_of_unknown_length_is_long() {
        let unknown = Estimate { seconds: None, step: 2.0, assumed: true };
        assert!(unknown.is_long() && unknown.to_string().contains("2.0 s for each step") && unknown.to_string().contains("Medium"), "{unknown}");
        assert!(Estimate::of(3601.0).is_long() && !Estimate::of(3599.0).is_long());
    }

    #[test]
    fn the_rate_is_that_of_a_processor() {
        let rate = rate(&Cpu::default());
        assert!((1e8..1e14).contains(&rate), "{rate:e}");
    }
}
