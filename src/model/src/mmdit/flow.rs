//! One micro-batch from inputs to gradients: forward, loss of flow matching, backward.

use std::sync::{Mutex, PoisonError};

use super::run::{Inputs, Mode, unscaled};
use super::{Mmdit, MmditError};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Buffer, FlowData, FlowSample, PatchLayout, Recording};
use finetune_compute::nn::flow_matching::{self, LossKind};
use finetune_compute::nn::{DropoutKey, Gradients};

/// What the loss compares the velocity with.
#[derive(Debug, Clone, Copy)]
pub struct FlowTarget<'a> {
    /// Which loss.
    pub kind: LossKind,
    /// Normalised latents [B, C, h, w].
    pub x0: &'a [f32],
    /// [B, C, h, w].
    pub noise: &'a [f32],
    /// One per sample.
    pub sigmas: &'a [f32],
    /// What each sample's loss counts in the gradients: one per sample.
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
        x: &HostTensor,
        timestep: &HostTensor,
        prompt_embeds: &HostTensor,
        pooled: &HostTensor,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
    ) -> Result<(Vec<f64>, Vec<Vec<f32>>), MmditError> {
        if !self.engine.is_cuda() {
            let (velocity, saved) = self.forward(x, timestep, prompt_embeds, pooled, dropout)?;
            let loss = flow_matching::loss(target.kind, velocity.values(), target.x0, target.noise, target.sigmas, target.coefficients);
            let d_velocity = HostTensor::new(loss.d_velocity, velocity.shape())?;
            return Ok((loss.per_sample, self.backward(saved, &d_velocity)?));
        }
        self.scaled_flow_step((x, timestep, prompt_embeds, pooled), dropout, target, &mut |gradients, scale, last| {
            let gradients = gradients.download(&self.engine);
            (last || gradients.iter().flatten().all(|g| g.is_finite())).then(|| unscaled(gradients, scale))
        })
    }

    /// [`Mmdit::flow_step`] on a GPU, whose gradients are added to `sum` there ([`finetune_compute::kernels::flat_offsets`] says where each lies).
    ///
    /// # Errors
    /// If an input does not fit, or the device fails.
    #[cfg(feature = "cuda")]
    pub fn flow_step_into(
        &self,
        inputs: (&HostTensor, &HostTensor, &HostTensor, &HostTensor),
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        sum: &mut Buffer,
    ) -> Result<Vec<f64>, MmditError> {
        let add = &mut |gradients: &Gradients, scale: f32, last: bool| {
            let (ops, whole) = self.engine.update_ops().zip(gradients.whole())?;
            (last || ops.square_sum(whole).is_finite()).then(|| ops.add_scaled(sum, whole, 1.0 / scale))
        };
        self.scaled_flow_step(inputs, dropout, target, add).map(|(losses, ())| losses)
    }

    /// On a GPU: steps with smaller and smaller gradients until `take` takes them. It is given them, what they were multiplied with, and
    /// whether there will be no others.
    fn scaled_flow_step<T>(
        &self,
        inputs: (&HostTensor, &HostTensor, &HostTensor, &HostTensor),
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        take: &mut dyn FnMut(&Gradients, f32, bool) -> Option<T>,
    ) -> Result<(Vec<f64>, T), MmditError> {
        let mut scale = self.gradient_scale(samples(target, 1.0).iter().fold(0.0_f32, |most, s| most.max(s.factor.abs() as f32)));
        let mut tries = 0;
        loop {
            tries += 1;
            // A power of two that is 1 where the precision has enough small numbers.
            let last = scale == 1.0 || tries > SMALLER;
            let taken = &mut |gradients: &Gradients| take(gradients, scale, last);
            let step = finetune_compute::kernels::catch(|| self.try_flow_step(inputs, dropout, target, f64::from(scale), taken));
            if step.is_err() {
                // Recordings hold memory.
                self.recorded.clear();
            }
            if let (losses, Some(taken)) = step?? {
                return Ok((losses, taken));
            }
            scale /= 16.0;
        }
    }

    /// On a GPU, gradients multiplied by `scale`. The second step of the same sizes is recorded, later ones replay it.
    fn try_flow_step<T>(
        &self,
        (x, timestep, prompt_embeds, pooled): (&HostTensor, &HostTensor, &HostTensor, &HostTensor),
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        scale: f64,
        take: &mut dyn FnMut(&Gradients) -> T,
    ) -> Result<(Vec<f64>, T), MmditError> {
        let engine = &self.engine;
        let samples = samples(target, scale);
        let batch = samples.len();
        let mut outcome = |gradients: &Gradients, sums: &Buffer| {
            let sums = engine.download(sums);
            let n = target.x0.len() / batch;
            let losses = sums.chunks_exact(sums.len() / batch).map(|parts| parts.iter().map(|p| f64::from(*p)).sum::<f64>() / n as f64);
            (losses.collect(), take(gradients))
        };
        // Each step's dropout masks are others.
        let records = engine.records() && dropout.is_none_or(|_| self.layout.dropout == 0.0);
        let key = (x.shape().to_vec(), prompt_embeds.shape().to_vec(), target.kind.precondition_outputs);
        let mut recorded = self.recorded.0.lock().unwrap_or_else(PoisonError::into_inner);
        match recorded.iter().find(|step| step.key == key).map(|step| &step.state).filter(|_| records) {
            Some(State::Recorded(step)) => {
                let RecordedStep { recording, inputs, data, gradients, sums } = &**step;
                self.overwrite(inputs, x, timestep, prompt_embeds, pooled)?;
                engine.overwrite_flow_data(data, target.x0, target.noise, &samples);
                engine.replay(recording);
                Ok(outcome(gradients, sums))
            }
            seen => {
                let seen = seen.is_some();
                let inputs = self.upload(x, timestep, prompt_embeds, pooled)?;
                let data = engine.flow_data(target.x0, target.noise, &samples);
                if !seen {
                    let (gradients, sums) = self.flow_operations(&inputs, &data, dropout, key.2);
                    if records {
                        recorded.truncate(RECORDINGS - 1);
                        recorded.insert(0, Step { key, state: State::Seen });
                    }
                    return Ok(outcome(&gradients, &sums));
                }
                let ((gradients, sums), recording) = engine.record(|| self.flow_operations(&inputs, &data, None, key.2));
                engine.replay(&recording);
                let outcome = outcome(&gradients, &sums);
                if let Some(step) = recorded.iter_mut().find(|step| step.key == key) {
                    step.state = State::Recorded(Box::new(RecordedStep { recording, inputs, data, gradients, sums }));
                }
                Ok(outcome)
            }
        }
    }

    /// Forward, loss and backward on the device: gradients, and the parts of the losses.
    fn flow_operations(&self, inputs: &Inputs, data: &FlowData, dropout: Option<&DropoutKey>, preconditioned: bool) -> (Gradients, Buffer) {
        let (out, saved) = self.run(inputs, dropout, 1.0, Mode::Train);
        let layout = PatchLayout { channels: self.config.out_channels(), width: inputs.sizes.patches.1, patch: self.config.patch_size };
        let (dy, sums) = self.engine.flow_loss(&out, data, layout, preconditioned);
        drop(out);
        (self.gradients(saved, &dy), sums)
    }
}

/// Most sizes that are recorded at a time.
const RECORDINGS: usize = 8;

/// Steps that a GPU has recorded. They hold memory that nothing else can use.
#[derive(Debug, Default)]
pub(super) struct Recorded(Mutex<Vec<Step>>);

/// Dimensions of latents and prompt, and whether outputs are preconditioned.
type Key = (Vec<usize>, Vec<usize>, bool);

#[derive(Debug)]
struct Step {
    key: Key,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Done once, not recorded yet.
    Seen,
    /// Recorded.
    Recorded(Box<RecordedStep>),
}

/// A recorded step with the places of its inputs and results.
#[derive(Debug)]
struct RecordedStep {
    recording: Recording,
    inputs: Inputs,
    data: FlowData,
    gradients: Gradients,
    sums: Buffer,
}

impl Recorded {
    /// Forgets all of them and gives their memory back to everybody.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
