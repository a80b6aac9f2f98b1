//! One micro-batch from inputs to gradients: forward, loss of flow matching, backward.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::run::{Inputs, Mode, check_dropout, unscaled};
use super::{Mmdit, MmditError};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Device, FlowData, FlowSample, PatchLayout};
use finetune_compute::nn::flow_matching::LossKind;
use finetune_compute::nn::{DropoutKey, Gradients};

/// What the transformer computes the velocity of.
#[derive(Debug, Clone, Copy)]
pub struct MmditInputs<'a> {
    /// Noisy latents [B, C, h, w].
    pub x: &'a HostTensor,
    /// `[B]` in 0..=1000.
    pub timestep: &'a HostTensor,
    /// [B, S, J].
    pub prompt_embeds: &'a HostTensor,
    /// [B, P].
    pub pooled: &'a HostTensor,
}

/// Each sample's loss, and the gradients of the LoRA parameters in canonical order.
pub type FlowResult = (Vec<f64>, Vec<Vec<f32>>);

/// The losses of a micro-batch on their way from the device.
#[derive(Debug)]
pub struct PendingLosses<D: Device> {
    sums: D::Arrival,
    samples: usize,
    /// Of each sample.
    values: usize,
}

impl<D: Device> PendingLosses<D> {
    /// Each sample's loss; waits for the device to have computed it, and for nothing that was asked later.
    pub fn receive(self, device: &D) -> Vec<f64> {
        let sums = device.receive(self.sums);
        sums.chunks_exact(sums.len() / self.samples).map(|parts| parts.iter().map(|p| f64::from(*p)).sum::<f64>() / self.values as f64).collect()
    }
}

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

impl<D: Device> Mmdit<D> {
    /// Each sample's loss and the gradients of the LoRA parameters in canonical order: [`Mmdit::forward`], the loss of flow matching and
    /// [`Mmdit::backward`]. The output stays on the device, and nothing waits for it before the end.
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn flow_step(&self, inputs: MmditInputs<'_>, dropout: Option<&DropoutKey>, target: &FlowTarget<'_>) -> Result<FlowResult, MmditError> {
        self.scaled_flow_step(inputs, dropout, target, &mut |gradients, scale, last| {
            let gradients = gradients.download(&self.device);
            (last || gradients.iter().flatten().all(|g| g.is_finite())).then(|| unscaled(gradients, scale))
        })
        .map(|(losses, gradients)| (losses.receive(&self.device), gradients))
    }

    /// [`Mmdit::flow_step`], whose gradients are added to `sum` on the device ([`finetune_compute::kernels::flat_offsets`] says where each lies).
    /// Nothing waits for the device, but in f16, where the gradients' size must be known.
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn flow_step_into(
        &self,
        inputs: MmditInputs<'_>,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        sum: &mut D::Buffer,
    ) -> Result<PendingLosses<D>, MmditError> {
        let add = &mut |gradients: &Gradients<D>, scale: f32, last: bool| {
            let (device, values) = (&self.device, gradients.values());
            (last || device.square_sum(values).is_finite()).then(|| device.add_scaled(sum, values, 1.0 / scale))
        };
        self.scaled_flow_step(inputs, dropout, target, add).map(|(losses, ())| losses)
    }

    /// Forgets recorded steps, which hold memory.
    pub fn clear_recorded(&self) {
        self.recorded.clear();
    }

    /// Forgets recorded steps and records no others: where there is too little memory for those of several sizes, each step has all of it to itself. Returns
    /// whether any was recorded.
    pub fn stop_recording(&self) -> bool {
        self.recorded.off.store(true, Ordering::Relaxed);
        self.recorded.clear() > 0
    }

    /// Steps with smaller and smaller gradients until `take` takes them. It is given them, what they were multiplied with, and
    /// whether there will be no others.
    #[expect(clippy::type_complexity, reason = "a callback, used here alone")]
    fn scaled_flow_step<T>(
        &self,
        inputs: MmditInputs<'_>,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        take: &mut dyn FnMut(&Gradients<D>, f32, bool) -> Option<T>,
    ) -> Result<(PendingLosses<D>, T), MmditError> {
        check_dropout(dropout, inputs.x)?;
        let mut scale = self.gradient_scale(samples(target, 1.0).iter().fold(0.0_f32, |most, s| most.max(s.factor.abs() as f32)));
        let mut tries = 0;
        loop {
            tries += 1;
            // A power of two that is 1 where the precision has enough small numbers.
            let last = scale == 1.0 || tries > SMALLER;
            let taken = &mut |gradients: &Gradients<D>| take(gradients, scale, last);
            if let (losses, Some(taken)) = self.try_flow_step(inputs, dropout, target, f64::from(scale), taken)? {
                return Ok((losses, taken));
            }
            scale /= 16.0;
        }
    }

    /// Gradients multiplied by `scale`. Where the device records, the second step of the same sizes is recorded and later ones replay it.
    fn try_flow_step<T>(
        &self,
        MmditInputs { x, timestep, prompt_embeds, pooled }: MmditInputs<'_>,
        dropout: Option<&DropoutKey>,
        target: &FlowTarget<'_>,
        scale: f64,
        take: &mut dyn FnMut(&Gradients<D>) -> T,
    ) -> Result<(PendingLosses<D>, T), MmditError> {
        let device = &self.device;
        let samples = samples(target, scale);
        let batch = samples.len();
        let mut outcome = |gradients: &Gradients<D>, sums: &D::Buffer| {
            (PendingLosses { sums: device.send(sums), samples: batch, values: target.x0.len() / batch }, take(gradients))
        };
        // Each step has its own dropout masks.
        let records = device.records() && dropout.is_none_or(|_| self.layout.dropout == 0.0) && !self.recorded.off.load(Ordering::Relaxed);
        let key = (x.shape().to_vec(), prompt_embeds.shape().to_vec(), target.kind.precondition_outputs);
        let mut recorded = self.recorded.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = recorded.iter().position(|step| step.key == key).filter(|_| records);
        if let Some(State::Recorded(step)) = seen.map(|i| &mut recorded[i].state) {
            let RecordedStep { recording, inputs, data, gradients, sums } = &mut **step;
            self.overwrite(inputs, x, timestep, prompt_embeds, pooled)?;
            device.overwrite_flow_data(data, target.x0, target.noise, &samples);
            device.replay(recording);
            return Ok(outcome(gradients, sums));
        }
        let inputs = self.upload(x, timestep, prompt_embeds, pooled)?;
        let data = device.flow_data(target.x0, target.noise, &samples);
        let Some(seen) = seen else {
            let (gradients, sums) = self.flow_operations(&inputs, &data, dropout, key.2);
            // A size beyond those that are recorded is done as it is: to record it in place of another costs more than it saves.
            if records && recorded.len() < RECORDINGS {
                recorded.push(Step { key, state: State::Seen });
            }
            return Ok(outcome(&gradients, &sums));
        };
        let ((gradients, sums), recording) = device.record(|| self.flow_operations(&inputs, &data, None, key.2));
        let outcome = outcome(&gradients, &sums);
        if let Some(recording) = recording {
            recorded[seen].state = State::Recorded(Box::new(RecordedStep { recording, inputs, data, gradients, sums }));
        }
        Ok(outcome)
    }

    /// Forward, loss and backward on the device: gradients, and the parts of the losses.
    fn flow_operations(&self, inputs: &Inputs<D>, data: &FlowData<D::Buffer>, dropout: Option<&DropoutKey>, preconditioned: bool) -> (Gradients<D>, D::Buffer) {
        let (out, saved) = self.run(inputs, dropout, 1.0, Mode::Train);
        let layout = PatchLayout { channels: self.config.out_channels(), width: inputs.sizes.patches.1, patch: self.config.patch_size };
        let (dy, sums) = self.device.flow_loss(&out, data, layout, preconditioned);
        drop(out);
        (self.gradients(saved, &dy), sums)
    }
}

/// Most sizes that are recorded: shapes of buckets, and their short batches.
const RECORDINGS: usize = 16;

/// Steps that a GPU has recorded. They hold memory that nothing else can use.
#[derive(Debug)]
pub(super) struct Recorded<D: Device> {
    steps: Mutex<Vec<Step<D>>>,
    off: AtomicBool,
}

impl<D: Device> Default for Recorded<D> {
    fn default() -> Self {
        Self { steps: Mutex::default(), off: AtomicBool::new(false) }
    }
}

/// Dimensions of latents and prompt, and whether outputs are preconditioned.
type Key = (Vec<usize>, Vec<usize>, bool);

#[derive(Debug)]
struct Step<D: Device> {
    key: Key,
    state: State<D>,
}

#[derive(Debug)]
enum State<D: Device> {
    /// Done once, not recorded yet.
    Seen,
    /// Recorded.
    Recorded(Box<RecordedStep<D>>),
}

/// A recorded step with the places of its inputs and results.
#[derive(Debug)]
struct RecordedStep<D: Device> {
    recording: D::Recording,
    inputs: Inputs<D>,
    data: FlowData<D::Buffer>,
    gradients: Gradients<D>,
    sums: D::Buffer,
}

impl<D: Device> Recorded<D> {
    /// Forgets all of them and gives their memory back to everybody. Returns how many there were.
    pub(super) fn clear(&self) -> usize {
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let recorded = steps.iter().filter(|step| matches!(step.state, State::Recorded(_))).count();
        steps.clear();
        recorded
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
