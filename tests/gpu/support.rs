//! Two devices side by side.

use finetune_common::rng::{Purpose, Stream};
use finetune_compute::kernels::{Cpu, Cuda, CudaBuffer, Device, HostBuffer, Precision};

/// The GPU in a precision beside the CPU.
pub(crate) struct Pair {
    pub(crate) gpu: Cuda,
    pub(crate) cpu: Cpu,
    /// Allowed relative error (Frobenius) of a result.
    pub(crate) tolerance: f64,
}

pub(crate) fn pairs() -> Vec<Pair> {
    [(Precision::F32, 2e-6), (Precision::F16, 1.5e-3), (Precision::Bf16, 1.2e-2)]
        .into_iter()
        .map(|(precision, tolerance)| {
            let gpu = Cuda::open(0, precision).expect("a GPU");
            poison(&gpu);
            Pair { gpu, cpu: Cpu::default(), tolerance }
        })
        .collect()
}

/// The results of the same operations on the GPU and on the CPU: `both!(pair, device => results)`.
macro_rules! both {
    ($pair:expr, $device:ident => $results:expr) => {{
        let got = {
            let $device = &$pair.gpu;
            $results
        };
        let want = {
            let $device = &$pair.cpu;
            $results
        };
        (got, want)
    }};
}

pub(crate) use both;

/// Fills memory that later buffers get with NaN: a result that is not written is seen.
pub(crate) fn poison(gpu: &Cuda) {
    let lengths = (0..14).map(|i| 1 << i).chain([100_000, 1_000_000]);
    let poisoned: Vec<CudaBuffer> = lengths.flat_map(|len| (0..6).map(move |_| len)).map(|len| gpu.upload(&vec![f32::NAN; len])).collect();
    drop(poisoned);
}

pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Stream::new(seed, Purpose::Noise, 1, 0).fill_normal(&mut values);
    values
}

impl Pair {
    /// What both devices are given: the values as the GPU's precision holds them.
    pub(crate) fn rounded(&self, values: &[f32]) -> Vec<f32> {
        self.gpu.download(&self.gpu.upload(values))
    }

    /// Random values that both hold exactly.
    pub(crate) fn random(&self, len: usize, seed: u64) -> Vec<f32> {
        self.rounded(&random(len, seed))
    }

    #[expect(clippy::print_stdout, reason = "every error is shown with --nocapture")]
    pub(crate) fn check(&self, what: &str, got: &[f32], want: &[f32]) {
        let error = relative(got, want);
        println!("{:>5} {what:<50} {error:.2e}", self.gpu.precision().to_string());
        assert!(error <= self.tolerance, "{} {what}: {error:.3e} > {:.1e}", self.gpu.precision(), self.tolerance);
    }

    pub(crate) fn compare(&self, what: &str, got: &CudaBuffer, want: &HostBuffer) {
        self.check(what, &self.gpu.download(got), &self.cpu.download(want));
    }
}

/// ‖got - want‖ / ‖want‖; NaN counts as infinite.
pub(crate) fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |f: &dyn Fn(usize) -> f64| (0..want.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    let error = square(&|i| f64::from(got[i]) - f64::from(want[i])) / square(&|i| f64::from(want[i])).max(1e-30);
    if error.is_nan() { f64::INFINITY } else { error }
}
