//! One micro-batch from inputs to gradients: forward, loss of flow matching, backward.

use candle_core::Tensor;

use super::run::{Mode, unscaled};
use super::{Mmdit, MmditError};
use crate::kernels::{FlowSample, PatchLayout};
use crate::nn::DropoutKey;
use crate::nn::flow_matching::{self, LossKind};

/// What the loss compares the velocity with.
#[derive(Debug, Clone, Copy)]
pub struct FlowTarget<'a> {
    /// Which loss.
    pub kind: LossKind,
    /// Normalised latents [B, C, h, w].
    pub x0: &'a [f32],
    /// [B, C, h, w].
    pub noise: &'a [f32],
    /// [B].
    pub sigmas: &'a [f32],
    /// What each sample's loss counts in the gradients [B].
    pub coefficients: &'a [f64],
}

/// How often a backward in f16 is tried again with gradients of a sixteenth, when one became infinite.
const SMALLER: i32 = 4;

impl Mmdit {
    /// Each sample's loss and the gradients of the LoRA parameters in canonical order: [`Mmdit::forward`], [`flow_matching::loss`] and
    /// [`Mmdit::backward`]. On a GPU the output stays there and nothing waits for it before the end.
    ///
    /// # Errors
    /// If an input does not fit, or the device fails.
    pub fn flow_step(
        &self,
        x: &Tensor,
        timestep: &Tensor,
        prompt_embeds: &Tensor,
        pooled: &Tensor,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
    ) -> Result<(Vec<f64>, Vec<Vec<f32>>), MmditError> {
        if !self.engine.is_cuda() {
            let (velocity, saved) = self.forward(x, timestep, prompt_embeds, pooled, dropout)?;
            let values: Vec<f32> = velocity.flatten_all()?.to_vec1()?;
            let loss = flow_matching::loss(target.kind, &values, target.x0, target.noise, target.sigmas, target.coefficients);
            let d_velocity = Tensor::from_vec(loss.d_velocity, velocity.dims(), velocity.device())?;
            return Ok((loss.per_sample, self.backward(saved, &d_velocity)?));
        }
        let mut scale = self.gradient_scale(samples(target, 1.0).iter().fold(0.0_f32, |most, s| most.max(s.factor.abs() as f32)));
        for _ in 0..SMALLER {
            let (losses, gradients) = crate::kernels::catch(|| self.try_flow_step(x, timestep, prompt_embeds, pooled, dropout, target, scale))??;
            if scale == 1.0 || gradients.iter().flatten().all(|g| g.is_finite()) {
                return Ok((losses, unscaled(gradients, scale)));
            }
            scale /= 16.0;
        }
        let (losses, gradients) = crate::kernels::catch(|| self.try_flow_step(x, timestep, prompt_embeds, pooled, dropout, target, scale))??;
        Ok((losses, unscaled(gradients, scale)))
    }

    /// On a GPU, gradients multiplied by `scale`.
    #[expect(clippy::too_many_arguments, reason = "the step's inputs")]
    fn try_flow_step(
        &self,
        x: &Tensor,
        timestep: &Tensor,
        prompt_embeds: &Tensor,
        pooled: &Tensor,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        scale: f32,
    ) -> Result<(Vec<f64>, Vec<Vec<f32>>), MmditError> {
        let (out, saved) = self.run(x, timestep, prompt_embeds, pooled, dropout, 1.0, Mode::Train)?;
        let layout = PatchLayout { channels: self.config.out_channels(), width: saved.sizes.patches.1, patch: self.config.patch_size };
        let preconditioned = target.kind.precondition_outputs;
        let (dy, sums) = self
            .engine
            .flow_loss(&out, target.x0, target.noise, &samples(target, f64::from(scale)), layout, preconditioned)
            .ok_or_else(|| MmditError::Input { input: "the engine", got: Vec::new(), expected: "a GPU".into() })?;
        drop(out);
        let (batch, n) = (saved.sizes.batch, target.x0.len() / saved.sizes.batch);
        let gradients = self.gradients(saved, &dy);
        let sums = self.engine.download(&sums);
        let losses = sums.chunks_exact(sums.len() / batch).map(|parts| parts.iter().map(|p| f64::from(*p)).sum::<f64>() / n as f64);
        Ok((losses.collect(), gradients))
    }
}

fn samples(target: &FlowTarget<'_>, scale: f64) -> Vec<FlowSample> {
    let n = target.x0.len() / target.sigmas.len().max(1);
    let sample = |(&sigma, &coefficient): (&f32, &f64)| {
        let weight = target.kind.weighting.weight(sigma);
        FlowSample { sigma, weight, factor: 2.0 * f64::from(weight) * coefficient / n as f64 * scale }
    };
    target.sigmas.iter().zip(target.coefficients).map(sample).collect()
}
