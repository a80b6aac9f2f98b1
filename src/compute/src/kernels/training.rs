//! What the operations around a model work on: the loss of flow matching, and updates of parameters.

/// What the loss of a sample depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowSample {
    /// The noise level.
    pub sigma: f32,
    /// The weight of the squared error.
    pub weight: f32,
    /// Factor of difference · slope in the gradient.
    pub factor: f64,
}

impl FlowSample {
    /// As a GPU's kernel reads them: the factor in f64, sigma and weight in f32.
    pub(super) fn words(samples: &[Self]) -> Vec<f32> {
        let halves = |factor: f64| [factor.to_bits() as u32, (factor.to_bits() >> 32) as u32].map(f32::from_bits);
        samples.iter().flat_map(|s| halves(s.factor).into_iter().chain([s.sigma, s.weight])).collect()
    }
}

/// What a loss compares with: latents and noise [B, n], and each sample's numbers.
#[derive(Debug)]
pub struct FlowData<B> {
    pub(super) x0: B,
    pub(super) noise: B,
    /// The samples as [`FlowSample::words`].
    pub(super) words: B,
    pub(super) samples: Vec<FlowSample>,
}

/// Where the values of an output lie: patches of p x p pixels with their channels, w patches in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchLayout {
    /// Channels.
    pub channels: usize,
    /// Patches in a row.
    pub width: usize,
    /// Side of a patch.
    pub patch: usize,
}

/// The numbers of one update of AdamW, in f32.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWScalars {
    /// 1 - learning rate · weight decay.
    pub keep: f32,
    /// 1 - β₁.
    pub one_minus_beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// 1 - β₂.
    pub one_minus_beta2: f32,
    /// √(1 - β₂ᵗ).
    pub root_correction2: f32,
    /// ε.
    pub epsilon: f32,
    /// Learning rate / (1 - β₁ᵗ).
    pub step_size: f32,
    /// What gradients are multiplied with first.
    pub clip: f32,
}

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// Points of the grid on which a moment is rounded before its code is looked up.
pub const GRID: usize = 1 << 16;

/// Up to [`BLOCK`] neighbouring values of one parameter and where their moments are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first value, among all parameters.
    pub values: i64,
    /// The first of its moments: among the codes (a multiple of [`BLOCK`]), or among the f32 moments.
    pub state: i64,
    /// How many.
    pub count: i32,
    /// 1: moments of 32 bits.
    pub full: i32,
}

/// A moment as codes.
#[derive(Debug)]
pub struct CodedMoment<'a, B, C> {
    /// Codes.
    pub codes: &'a mut C,
    /// The largest magnitude of each [`BLOCK`] codes.
    pub largest: &'a mut B,
    /// The value of each of the 256 codes.
    pub table: &'a B,
    /// The code of each point of the [`GRID`].
    pub nearest: &'a C,
}
