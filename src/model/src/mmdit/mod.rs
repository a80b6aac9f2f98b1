//! The transformer of Stable Diffusion 3 and 3.5 (MMDiT; Esser et al., "Scaling Rectified Flow Transformers for
//! High-Resolution Image Synthesis", 2024) with diffusers' names, LoRA on any linear module, and an explicit backward.
//!
//! Shapes: `B` samples, `C` latent channels, `h x w` latent pixels, `N` image tokens (patches), `S` prompt tokens,
//! `D` width, `J` width of prompt embeddings, `P` width of pooled embeddings.

mod block;
mod config;
mod embed;
mod flow;
mod load;
mod run;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use self::block::{Block, Needs};
pub use self::config::{MmditConfig, TIMESTEP_FEATURES};
use self::embed::{Embedder, Positions};
use self::flow::Recorded;
pub use self::flow::{FlowResult, FlowTarget, MmditInputs, PendingLosses};
pub use self::run::Saved;

use super::lora::{LoraError, LoraLayout, LoraSpec};
use super::weights::{Weights, WeightsError};
use finetune_common::tensor::ShapeError;
use finetune_compute::kernels::{Device, DeviceError, WeightFormat, flat_offsets};
use finetune_compute::nn::Linear;
use finetune_compute::optim::Param;

/// Why the transformer cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum MmditError {
    /// The configuration cannot be read.
    #[error("failed to read {path}")]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The configuration is not JSON or lacks a field.
    #[error("failed to understand {path}")]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A model of another kind.
    #[error("failed to use this transformer: {field} is {value}, supported is {expected}")]
    Unsupported {
        /// The field of config.json.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is supported.
        expected: String,
    },
    /// A weight cannot be used.
    #[error("failed to load transformer weight {name:?}: {problem}")]
    Weight {
        /// The weight.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// An input does not fit.
    #[error("failed to run the transformer: {input} has shape {got:?}, expected {expected}")]
    Input {
        /// The input.
        input: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What fits.
        expected: String,
    },
    /// The LoRA does not fit.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// The device cannot be used, or stopped.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A weight is missing or has another shape.
    #[error(transparent)]
    Weights(Box<WeightsError>),
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl From<WeightsError> for MmditError {
    fn from(error: WeightsError) -> Self {
        Self::Weights(Box::new(error))
    }
}

/// The transformer.
#[derive(Debug)]
pub struct Mmdit<D: Device> {
    device: D,
    /// The same device in f32, for what makes the modulations of a sample: one number that is wrong there is wrong in all its tokens.
    /// Computed in bf16 they make most of the error of LoRA's gradients.
    in_f32: D,
    config: MmditConfig,
    layout: LoraLayout,
    patch: Linear<D>,
    positions: Positions<D>,
    timestep: Embedder<D>,
    pooled: Embedder<D>,
    context_embedder: Linear<D>,
    blocks: Vec<Block<D>>,
    norm_out: Linear<D>,
    /// The layers that make all modulations as one product, where the device is faster then: the blocks' in order, then the last norm's.
    modulation: Option<D::FusedLinear>,
    proj_out: Linear<D>,
    recompute: Vec<bool>,
    recorded: Recorded<D>,
    /// Where the device wants the LoRA parameters, if it takes all at once: those of `device`, those of `in_f32`.
    scatter: Option<(D::LoraScatter, D::LoraScatter)>,
    /// Weights stay in their file.
    in_file: bool,
}

impl<D: Device> Mmdit<D> {
    /// Loads the frozen weights. Those of large models stay in their stored type, memory-mapped, and are converted in
    /// passing.
    ///
    /// # Errors
    /// If a weight is missing or does not fit the configuration.
    pub fn load(weights: Arc<Weights>, config: MmditConfig, device: &D) -> Result<Self, MmditError> {
        Self::load_as(weights, config, device, WeightFormat::Float)
    }

    /// As [`Mmdit::load`], with the weights of the blocks' attentions and feed-forwards in this format. Those of embedders and modulations, the first and
    /// the last layer and all biases stay numbers: they are few, or what they make reaches every token.
    ///
    /// # Errors
    /// If a weight is missing or does not fit the configuration.
    #[expect(clippy::needless_pass_by_value, reason = "the model keeps the memory map alive as long as it needs it")]
    pub fn load_as(weights: Arc<Weights>, config: MmditConfig, device: &D, format: WeightFormat) -> Result<Self, MmditError> {
        // A GPU converts what is stored as it arrives.
        let convert = D::IS_HOST && load::converts_once(&config);
        load::load(&weights, config, device.clone(), format, convert)
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> &D {
        &self.device
    }

    /// The configuration.
    pub fn config(&self) -> &MmditConfig {
        &self.config
    }

    /// The LoRA modules; empty before one is attached.
    pub fn layout(&self) -> &LoraLayout {
        &self.layout
    }

    /// Selects the modules that carry LoRA (without effect until [`Mmdit::set_lora`]); returns their layout.
    ///
    /// # Errors
    /// If a target matches no module.
    pub fn attach_lora(&mut self, spec: &LoraSpec) -> Result<&LoraLayout, MmditError> {
        self.attach_layout(LoraLayout::new(spec, &self.config.linear_sites())?)
    }

    /// As [`Mmdit::attach_lora`] for a LoRA file's layout ([`super::lora::LoraState::resolve`]). An empty layout takes the
    /// LoRA away.
    ///
    /// # Errors
    /// If a module is not this model's.
    pub fn attach_layout(&mut self, layout: LoraLayout) -> Result<&LoraLayout, MmditError> {
        let sites = self.config.linear_sites();
        if let Some(stranger) = layout.modules.iter().find(|m| sites.get(m.site.ordinal) != Some(&m.site)) {
            return Err(LoraError::Key { key: stranger.site.name.clone(), problem: "it names no linear module of this transformer".into() }.into());
        }
        self.layout = layout;
        self.recorded.clear();
        self.scatter = None;
        self.each_linear(&mut |_, linear| linear.clear_lora());
        // Zeros first, so that the layers know what they carry.
        let zeros: Vec<Param> =
            self.layout.parameters().into_iter().map(|(name, shape)| Param { value: vec![0.0; shape.iter().product()], name, shape }).collect();
        self.set_lora(&zeros)?;
        self.scatter = self.lora_scatter();
        let needs = self.gradient_needs();
        self.blocks.iter_mut().zip(needs).for_each(|(block, needs)| block.needs = needs);
        Ok(&self.layout)
    }

    /// Sets the LoRA parameters, which must be the layout's in canonical order.
    ///
    /// # Errors
    /// Names the first parameter that does not fit.
    pub fn set_lora(&mut self, params: &[Param]) -> Result<(), MmditError> {
        self.layout.check(params)?;
        let starts = flat_offsets(params.iter().map(|p| p.value.len()));
        let mut all = vec![0.0; starts[params.len()]];
        params.iter().zip(starts).for_each(|(p, start)| all[start..start + p.value.len()].copy_from_slice(&p.value));
        if self.scatter.is_some() {
            self.set_lora_from(&self.device.upload_f32(&all));
        } else {
            self.set_each_lora(&all);
        }
        Ok(())
    }

    /// As [`Mmdit::set_lora`], from f32 values on the device that lie as [`flat_offsets`] says.
    pub fn set_lora_from(&mut self, values: &D::Buffer) {
        match &self.scatter {
            Some((scatter, in_f32)) => {
                self.device.scatter_lora(scatter, values);
                self.in_f32.scatter_lora(in_f32, values);
            }
            None => self.set_each_lora(&self.device.download(values)),
        }
    }

    /// Sets one layer after another.
    fn set_each_lora(&mut self, values: &[f32]) {
        let lengths: Vec<usize> = self.layout.parameters().iter().map(|(_, shape)| shape.iter().product()).collect();
        let starts = flat_offsets(lengths.iter().copied());
        let part = |i: usize| &values[starts[i]..starts[i] + lengths[i]];
        let layout = std::mem::take(&mut self.layout);
        let mut slots = vec![None; self.config.linear_sites().len()];
        layout.modules.iter().enumerate().for_each(|(slot, module)| slots[module.site.ordinal] = Some((slot, module)));
        self.each_linear(&mut |device, linear| {
            if let Some((slot, module)) = slots.get(linear.ordinal()).copied().flatten() {
                linear.set_lora(device, slot, module.rank, module.scale() as f32, part(2 * slot), part(2 * slot + 1));
            }
        });
        for block in &mut self.blocks {
            block.attention.fuse_lora(&self.device);
            if let Some(attention) = &mut block.attention2 {
                attention.fuse_lora(&self.device);
            }
        }
        self.layout = layout;
    }

    /// Where the device wants the parameters, if it takes all at once.
    fn lora_scatter(&self) -> Option<(D::LoraScatter, D::LoraScatter)> {
        let starts = flat_offsets(self.layout.parameters().iter().map(|(_, shape)| shape.iter().product()));
        let source = |slot: usize, scale: f32| (starts[2 * slot], starts[2 * slot + 1], scale);
        // Layers lend their factors one after another.
        let fused_layers: Vec<_> =
            self.blocks.iter().flat_map(|b| std::iter::once(&b.attention).chain(&b.attention2)).flat_map(|a| a.fused_lora(&source)).collect();
        let (mut layers, mut in_f32) = (vec![&self.context_embedder, &self.proj_out], vec![&self.norm_out]);
        for embedder in [&self.timestep, &self.pooled] {
            in_f32.extend([&embedder.linear_1, &embedder.linear_2]);
        }
        for block in &self.blocks {
            in_f32.extend([&block.norm1, &block.norm1_context]);
            block.each_linear_ref(&mut layers);
        }
        let total = starts[starts.len() - 1];
        let [layers, in_f32] = [layers, in_f32].map(|layers| {
            let with_lora = layers.into_iter().filter_map(Linear::lora);
            with_lora.map(|(factors, slot, scale)| (factors, source(slot, scale))).collect::<Vec<_>>()
        });
        self.device.lora_scatter(&layers, &fused_layers, total).zip(self.in_f32.lora_scatter(&in_f32, &[], total))
    }

    /// Which blocks are recomputed in the backward pass instead of keeping their activations: one flag per block, missing
    /// ones are false. Results are bit-identical. Default: none.
    pub fn set_recompute(&mut self, blocks: &[bool]) {
        self.recorded.clear();
        self.recompute = (0..self.blocks.len()).map(|i| blocks.get(i).copied().unwrap_or(false)).collect();
    }

    /// Gives memory that was kept for the next step back: to the system, and to whatever else is to be done on a GPU, where a recorded step holds
    /// all that it needs.
    pub fn trim(&self) {
        self.recorded.clear();
        self.device.trim();
    }

    fn each_linear(&mut self, f: &mut dyn FnMut(&D, &mut Linear<D>)) {
        let (device, in_f32) = (&self.device, &self.in_f32);
        for embedder in [&mut self.timestep, &mut self.pooled] {
            f(in_f32, &mut embedder.linear_1);
            f(in_f32, &mut embedder.linear_2);
        }
        f(device, &mut self.context_embedder);
        for block in &mut self.blocks {
            f(in_f32, &mut block.norm1);
            f(in_f32, &mut block.norm1_context);
            block.each_linear(&mut |linear| f(device, linear));
        }
        f(in_f32, &mut self.norm_out);
        f(device, &mut self.proj_out);
    }

    /// Which gradients each block must pass on, from where the LoRA is.
    fn gradient_needs(&mut self) -> Vec<Needs> {
        let conditioning = self.timestep.has_lora() || self.pooled.has_lora();
        let mut below = (false, self.context_embedder.has_lora());
        let mut all = Vec::with_capacity(self.blocks.len());
        for block in &mut self.blocks {
            let modulation = conditioning || block.norm1.has_lora();
            let context_modulation = conditioning || block.norm1_context.has_lora();
            all.push(Needs { x: below.0, c: below.1, modulation, context_modulation });
            let mut trained = modulation || context_modulation || below.0 || below.1;
            block.each_linear(&mut |linear| trained |= linear.has_lora());
            below = (trained, trained);
        }
        all
    }
}
