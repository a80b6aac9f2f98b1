//! What comes before and after the blocks: patches, positions, timestep and pooled prompt.

use std::sync::{Arc, Mutex, PoisonError};

use super::config::{MmditConfig, TIMESTEP_FEATURES};
use crate::weights::Weights;
use finetune_compute::kernels::{Device, DeviceBuffer as _};
use finetune_compute::nn::{Gradients, Linear, LinearSaved, Pass};

/// `linear_2(silu(linear_1(x)))`.
#[derive(Debug)]
pub(super) struct Embedder<D: Device> {
    pub(super) linear_1: Linear<D>,
    pub(super) linear_2: Linear<D>,
}

/// # Saved for backward
/// The input, the first layer's output, its SiLU.
#[derive(Debug)]
pub(super) struct EmbedderSaved<D: Device> {
    x: D::Buffer,
    h: D::Buffer,
    activated: D::Buffer,
    first: LinearSaved<D>,
    second: LinearSaved<D>,
}

impl<D: Device> Embedder<D> {
    pub(super) fn has_lora(&self) -> bool {
        self.linear_1.has_lora() || self.linear_2.has_lora()
    }

    /// x [batch, in] -> [batch, D].
    pub(super) fn forward(&self, pass: Pass<'_, D>, batch: usize, x: D::Buffer) -> (D::Buffer, EmbedderSaved<D>) {
        let (h, first) = self.linear_1.forward(pass, batch, &x);
        let activated = pass.device.silu(&h);
        let (y, second) = self.linear_2.forward(pass, batch, &activated);
        (y, EmbedderSaved { x, h, activated, first, second })
    }

    /// LoRA gradients alone: nothing below wants any.
    pub(super) fn backward(&self, pass: Pass<'_, D>, batch: usize, saved: &EmbedderSaved<D>, dy: &D::Buffer, gradients: &mut Gradients<D>) {
        let mut dh = self.linear_1.has_lora().then(|| pass.device.alloc(saved.h.len()));
        self.linear_2.backward(pass, batch, Some(&saved.activated), &saved.second, dy, dh.as_mut().map(|d| (d, false)), gradients);
        if let Some(mut dh) = dh {
            pass.device.silu_backward(&saved.h, &mut dh);
            self.linear_1.backward(pass, batch, Some(&saved.x), &saved.first, &dh, None, gradients);
        }
    }
}

/// Sinusoidal features [batch, 256] of timesteps: `[cos(t f), sin(t f)]`, `f_k = exp(-ln(10000) k / 128)`.
///
/// Exponent, frequency and angle are rounded to f32 as in the reference: an angle of 1000 with one wrong last place of its
/// frequency would be off by 6e-5. PyTorch's exponential on the CPU is correctly rounded at all but two of these 128 places.
pub(super) fn timestep_features(timesteps: &[f32]) -> Vec<f32> {
    let half = TIMESTEP_FEATURES / 2;
    let exponent = -(4.0 * std::f64::consts::LN_10) as f32;
    let frequencies: Vec<f32> = (0..half)
        .map(|k| {
            let rounded = f64::from(exponent * k as f32 / half as f32).exp() as f32;
            match k {
                12 | 106 => f32::from_bits(rounded.to_bits().wrapping_add(1)),
                _ => rounded,
            }
        })
        .collect();
    let angles = |t: f32| frequencies.iter().map(move |f| f64::from(t * f));
    let mut features = Vec::with_capacity(timesteps.len() * TIMESTEP_FEATURES);
    for &t in timesteps {
        features.extend(angles(t).map(|angle| angle.cos() as f32));
        features.extend(angles(t).map(|angle| angle.sin() as f32));
    }
    features
}

/// The name of the table of position embeddings.
pub(super) const POSITIONS: &str = "pos_embed.pos_embed";

/// Rows and columns of a crop, and its values.
type Crop<D> = (usize, usize, Arc<<D as Device>::Buffer>);

/// The table of position embeddings, read where it is stored.
#[derive(Debug)]
pub(super) struct Positions<D: Device> {
    pub(super) weights: Arc<Weights>,
    /// The crop that was used last on a GPU, and its size.
    pub(super) kept: Mutex<Option<Crop<D>>>,
}

impl<D: Device> Positions<D> {
    /// The central h x w patches of the table [1, M·M, D], as [h · w, D]; `None` if it cannot be read.
    pub(super) fn crop(&self, device: &D, config: &MmditConfig, h: usize, w: usize) -> Option<Arc<D::Buffer>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., crop)) = kept.as_ref().filter(|(rows, columns, _)| (*rows, *columns) == (h, w)) {
            return Some(Arc::clone(crop));
        }
        let (side, d) = (config.pos_embed_max_size, config.width());
        let (top, left) = ((side - h) / 2, (side - w) / 2);
        let view = self.weights.view(POSITIONS).ok()?;
        let mut values = vec![0.0; h * w * d];
        for (i, row) in values.chunks_exact_mut(w * d).enumerate() {
            if !view.read_f32(((top + i) * side + left) * d, row) {
                return None;
            }
        }
        let crop = Arc::new(device.upload(&values));
        *kept = (!D::IS_HOST).then(|| (h, w, Arc::clone(&crop)));
        Some(crop)
    }
}

/// Latents [B, C, H, W] as patches [B · (H/p) · (W/p), C · p · p], each in the order (c, p, q) of the convolution's weight.
pub(super) fn patchify(x: &[f32], batch: usize, channels: usize, (height, width): (usize, usize), p: usize) -> Vec<f32> {
    let (h, w) = (height / p, width / p);
    let mut patches = Vec::with_capacity(x.len());
    for b in 0..batch {
        for i in 0..h {
            for j in 0..w {
                for c in 0..channels {
                    for row in 0..p {
                        let start = ((b * channels + c) * height + i * p + row) * width + j * p;
                        patches.extend_from_slice(&x[start..start + p]);
                    }
                }
            }
        }
    }
    patches
}

/// Patches [B · h · w, p · p · C] in the order (p, q, c) of the output projection, as latents [B, C, h·p, w·p].
pub(super) fn unpatchify(patches: &[f32], batch: usize, channels: usize, (height, width): (usize, usize), p: usize) -> Vec<f32> {
    let mut x = vec![0.0; patches.len()];
    each_output(batch, channels, (height, width), p, |patch, pixel| x[pixel] = patches[patch]);
    x
}

/// The backward of [`unpatchify`]: latents to patches.
pub(super) fn unpatchify_backward(dx: &[f32], batch: usize, channels: usize, (height, width): (usize, usize), p: usize) -> Vec<f32> {
    let mut patches = vec![0.0; dx.len()];
    each_output(batch, channels, (height, width), p, |patch, pixel| patches[patch] = dx[pixel]);
    patches
}

/// Calls `f` with corresponding places in patches and latents.
fn each_output(batch: usize, channels: usize, (height, width): (usize, usize), p: usize, mut f: impl FnMut(usize, usize)) {
    let (h, w) = (height / p, width / p);
    let mut patch = 0;
    for b in 0..batch {
        for i in 0..h {
            for j in 0..w {
                for row in 0..p {
                    for column in 0..p {
                        for c in 0..channels {
                            f(patch, ((b * channels + c) * height + i * p + row) * width + j * p + column);
                            patch += 1;
                        }
                    }
                }
            }
        }
    }
}
