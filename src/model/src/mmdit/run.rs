//! The whole transformer, forward and backward.

use std::sync::Arc;

use super::block::{BlockModulation, BlockSaved};
use super::embed::{self, EmbedderSaved};
use super::{Mmdit, MmditError};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Device, DeviceBuffer as _, Modulation, NormStats, Precision};
use finetune_compute::nn::{DropoutKey, Gradients, LinearSaved, Pass};

/// Sizes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    /// Latent pixels (height, width).
    pixels: (usize, usize),
    /// Patches (height, width).
    pub(super) patches: (usize, usize),
    context: usize,
}

/// Inputs that the host makes.
pub(super) struct HostInputs {
    sizes: Sizes,
    patches: Vec<f32>,
    features: Vec<f32>,
}

/// Inputs on the device.
#[derive(Debug)]
pub(super) struct Inputs<D: Device> {
    pub(super) sizes: Sizes,
    positions: Arc<D::Buffer>,
    /// [B · N, C · p · p].
    patches: D::Buffer,
    /// Of the timesteps [B, 256].
    features: D::Buffer,
    pooled: D::Buffer,
    prompt: D::Buffer,
}

/// What a block leaves for its backward.
#[derive(Debug)]
enum Kept<D: Device> {
    /// Nothing: no gradient passes through it.
    Nothing,
    /// Its activations.
    Activations(Box<BlockSaved<D>>),
    /// Its inputs, from which it is computed again.
    Inputs(D::Buffer, D::Buffer),
}

/// What [`Mmdit::forward`] keeps for [`Mmdit::backward`]. Memory is given back piece by piece during the backward.
#[derive(Debug)]
pub struct Saved<D: Device> {
    pub(super) sizes: Sizes,
    dropout: Option<DropoutKey>,
    timestep: EmbedderSaved<D>,
    pooled: EmbedderSaved<D>,
    /// Timestep and pooled embedding together [batch, D], and its SiLU.
    conditioning: (D::Buffer, D::Buffer),
    /// Prompt embeddings, if the context embedder has LoRA.
    prompt: Option<D::Buffer>,
    context_embedder: LinearSaved<D>,
    modulations: Vec<BlockModulation<D>>,
    modulation_layers: Vec<(LinearSaved<D>, LinearSaved<D>)>,
    blocks: Vec<Kept<D>>,
    /// The last block's output, statistics and modulation of the final norm.
    x: D::Buffer,
    stats: NormStats<D::Buffer>,
    norm_out: D::Buffer,
    norm_out_layer: LinearSaved<D>,
    /// The final norm's output, if the projection has LoRA.
    normal: Option<D::Buffer>,
    proj_out: LinearSaved<D>,
}

/// Whether a forward keeps what a backward needs, and which blocks it leaves out.
#[derive(Clone, Copy)]
pub(super) enum Mode<'a> {
    Train,
    Only { skip_blocks: &'a [usize] },
}

impl<D: Device> Mmdit<D> {
    /// Predicts the velocity for training.
    ///
    /// `x` `[B, C, h, w]` noisy latents, `timestep` `[B]` in 0..=1000, `prompt_embeds` `[B, S, J]`, `pooled` `[B, P]`.
    /// `dropout`: names the LoRA dropout masks; `None` switches dropout off. Returns the velocity [B, C, h, w].
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn forward(
        &self,
        x: &HostTensor,
        timestep: &HostTensor,
        prompt_embeds: &HostTensor,
        pooled: &HostTensor,
        dropout: Option<&DropoutKey>,
    ) -> Result<(HostTensor, Saved<D>), MmditError> {
        check_dropout(dropout, x)?;
        let inputs = self.upload(x, timestep, prompt_embeds, pooled)?;
        let (out, saved) = self.run(&inputs, dropout, 1.0, Mode::Train);
        Ok((self.velocity(&out, saved.sizes)?, saved))
    }

    /// The output [B · h/p · w/p, p · p · C] as velocity [B, C, h, w] on the host.
    fn velocity(&self, out: &D::Buffer, Sizes { batch, pixels, .. }: Sizes) -> Result<HostTensor, MmditError> {
        let (channels, p) = (self.config.out_channels(), self.config.patch_size);
        let velocity = embed::unpatchify(&self.device.download(out), batch, channels, pixels, p);
        Ok(HostTensor::new(velocity, [batch, channels, pixels.0, pixels.1])?)
    }

    /// Predicts the velocity without keeping anything, with the LoRA scaled by `lora_scale` (0: the base model) and
    /// without the blocks in `skip_blocks` (skip-layer guidance).
    ///
    /// # Errors
    /// If an input does not fit.
    pub fn forward_only(
        &self,
        x: &HostTensor,
        timestep: &HostTensor,
        prompt_embeds: &HostTensor,
        pooled: &HostTensor,
        lora_scale: f64,
        skip_blocks: &[usize],
    ) -> Result<HostTensor, MmditError> {
        let inputs = self.upload(x, timestep, prompt_embeds, pooled)?;
        let (out, saved) = self.run(&inputs, None, lora_scale as f32, Mode::Only { skip_blocks });
        self.velocity(&out, saved.sizes)
    }

    fn sizes(&self, x: &HostTensor, timestep: &HostTensor, prompt_embeds: &HostTensor, pooled: &HostTensor) -> Result<Sizes, MmditError> {
        let config = &self.config;
        let refuse = |input, tensor: &HostTensor, expected: String| Err(MmditError::Input { input, got: tensor.shape().to_vec(), expected });
        let (p, most) = (config.patch_size, config.pos_embed_max_size * config.patch_size);
        let &[batch, channels, height, width] = x.shape() else {
            return refuse("the noisy latent", x, "four dimensions".into());
        };
        let fits = |side: usize| side > 0 && side.is_multiple_of(p) && side <= most;
        if batch == 0 || channels != config.in_channels || !fits(height) || !fits(width) {
            return refuse("the noisy latent", x, format!("[batch, {}, height, width] with sides that are multiples of {p} up to {most}", config.in_channels));
        }
        if timestep.shape() != [batch] {
            return refuse("the timestep", timestep, format!("[{batch}]"));
        }
        let context = match *prompt_embeds.shape() {
            [b, tokens, width] if b == batch && tokens > 0 && width == config.joint_attention_dim => tokens,
            _ => return refuse("the prompt embedding", prompt_embeds, format!("[{batch}, tokens, {}]", config.joint_attention_dim)),
        };
        if pooled.shape() != [batch, config.pooled_projection_dim] {
            return refuse("the pooled prompt embedding", pooled, format!("[{batch}, {}]", config.pooled_projection_dim));
        }
        Ok(Sizes { batch, pixels: (height, width), patches: (height / p, width / p), context })
    }

    /// For the blocks, and for what makes modulations.
    fn passes<'a>(&'a self, dropout: Option<&'a DropoutKey>, lora_scale: f32) -> (Pass<'a, D>, Pass<'a, D>) {
        let pass = Pass { device: &self.device, lora_scale, dropout: dropout.map(|key| (key, self.layout.dropout)) };
        (pass, Pass { device: &self.in_f32, ..pass })
    }

    /// Asks for weights of block `i` that stay in their file to be read before they are used.
    fn read_ahead(&self, i: usize, part: &str) {
        if self.in_file && i < self.blocks.len() {
            self.positions.weights.will_need(&format!("transformer_blocks.{i}.{part}"));
        }
    }

    /// Whether a backward passes through block `i`.
    fn is_trained(&self, i: usize) -> bool {
        let needs = self.blocks[i].needs;
        needs.x || needs.c || needs.modulation || needs.context_modulation || self.has_lora(i)
    }

    /// Whether a layer that makes modulations has LoRA.
    fn modulation_has_lora(&self) -> bool {
        self.norm_out.has_lora() || self.blocks.iter().any(|b| b.norm1.has_lora() || b.norm1_context.has_lora())
    }

    fn has_lora(&self, i: usize) -> bool {
        let block = &self.blocks[i];
        block.attention.has_lora()
            || block.attention2.as_ref().is_some_and(finetune_compute::nn::Attention::has_lora)
            || block.feed_forward.has_lora()
            || block.feed_forward_context.as_ref().is_some_and(finetune_compute::nn::FeedForward::has_lora)
    }

    /// The inputs as the device wants them.
    pub(super) fn host_inputs(&self, x: &HostTensor, timestep: &HostTensor, prompt_embeds: &HostTensor, pooled: &HostTensor) -> Result<HostInputs, MmditError> {
        let sizes = self.sizes(x, timestep, prompt_embeds, pooled)?;
        let (channels, p) = (self.config.in_channels, self.config.patch_size);
        Ok(HostInputs {
            sizes,
            patches: embed::patchify(x.values(), sizes.batch, channels, sizes.pixels, p),
            features: embed::timestep_features(timestep.values()),
        })
    }

    /// The inputs on the device.
    pub(super) fn upload(&self, x: &HostTensor, timestep: &HostTensor, prompt_embeds: &HostTensor, pooled: &HostTensor) -> Result<Inputs<D>, MmditError> {
        let (device, host) = (&self.device, self.host_inputs(x, timestep, prompt_embeds, pooled)?);
        let positions = self.positions.crop(device, &self.config, host.sizes.patches.0, host.sizes.patches.1);
        let positions = positions.ok_or_else(|| MmditError::Weight { name: embed::POSITIONS.into(), problem: "it cannot be read".into() })?;
        Ok(Inputs {
            sizes: host.sizes,
            positions,
            patches: device.upload(&host.patches),
            features: self.in_f32.upload(&host.features),
            pooled: self.in_f32.upload(pooled.values()),
            prompt: device.upload(prompt_embeds.values()),
        })
    }

    /// As [`Mmdit::upload`], in the place of inputs of the same sizes.
    pub(super) fn overwrite(
        &self,
        inputs: &mut Inputs<D>,
        x: &HostTensor,
        timestep: &HostTensor,
        prompt_embeds: &HostTensor,
        pooled: &HostTensor,
    ) -> Result<(), MmditError> {
        let host = self.host_inputs(x, timestep, prompt_embeds, pooled)?;
        self.device.overwrite(&mut inputs.patches, &host.patches);
        self.device.overwrite(&mut inputs.features, &host.features);
        self.device.overwrite(&mut inputs.pooled, pooled.values());
        self.device.overwrite(&mut inputs.prompt, prompt_embeds.values());
        Ok(())
    }

    pub(super) fn run(&self, inputs: &Inputs<D>, dropout: Option<&DropoutKey>, lora_scale: f32, mode: Mode<'_>) -> (D::Buffer, Saved<D>) {
        let (config, device, in_f32) = (&self.config, &self.device, &self.in_f32);
        let sizes = inputs.sizes;
        let Sizes { batch, patches, .. } = sizes;
        let (pass, f32_pass) = self.passes(dropout, lora_scale);
        let d = config.width();

        let (mut x, _) = self.patch.forward(pass, batch * patches.0 * patches.1, &inputs.patches);
        device.add(&mut x, &inputs.positions);

        let (mut conditioning, timestep_saved) = self.timestep.forward(f32_pass, batch, in_f32.copy(&inputs.features));
        let (pooled, pooled_saved) = self.pooled.forward(f32_pass, batch, in_f32.copy(&inputs.pooled));
        in_f32.add(&mut conditioning, &pooled);
        let activated = in_f32.silu(&conditioning);

        let (c, context_saved) = self.context_embedder.forward(pass, batch * sizes.context, &inputs.prompt);
        let prompt = self.context_embedder.has_lora().then(|| device.copy(&inputs.prompt));

        // All modulations of the step at once, outside what is recomputed.
        let (mut modulations, mut modulation_layers) = (Vec::new(), Vec::new());
        (0..self.blocks.len()).for_each(|i| self.read_ahead(i, "norm1"));
        self.read_ahead(0, "");
        let together = self.modulation.as_ref().filter(|_| !self.modulation_has_lora());
        let mut parts = together.map(|fused| in_f32.fused_forward(batch, &activated, fused, 0.0).0.into_iter());
        let mut modulate = |layer: &finetune_compute::nn::Linear<D>| match parts.as_mut().and_then(Iterator::next) {
            Some(part) => (part, LinearSaved::default()),
            None => layer.forward(f32_pass, batch, &activated),
        };
        for block in &self.blocks {
            let (image, saved) = modulate(&block.norm1);
            let (context, context_saved) = modulate(&block.norm1_context);
            modulations.push(BlockModulation { image, context });
            modulation_layers.push((saved, context_saved));
        }
        let (norm_out, norm_out_layer) = modulate(&self.norm_out);

        let mut c = Some(c);
        let mut kept = Vec::with_capacity(self.blocks.len());
        // Where memory is so short that blocks are computed again, the others keep less, too.
        let short = self.recompute.contains(&true);
        for (i, block) in self.blocks.iter().enumerate() {
            let Some(context) = c.take() else { break };
            self.read_ahead(i + 1, "");
            let (keep, recompute) = match mode {
                Mode::Only { skip_blocks } if skip_blocks.contains(&i) => {
                    c = Some(context);
                    continue;
                }
                Mode::Only { .. } => (false, false),
                Mode::Train => (self.is_trained(i), self.recompute[i]),
            };
            let inputs = (keep && recompute).then(|| Kept::Inputs(device.copy(&x), device.copy(&context)));
            let (next, next_context, mut saved) = block.forward(pass, batch, x, context, &modulations[i]);
            (x, c) = (next, next_context);
            kept.push(match inputs {
                Some(inputs) => inputs,
                None if keep => {
                    if short {
                        saved.discard_inputs();
                    }
                    Kept::Activations(Box::new(saved))
                }
                None => Kept::Nothing,
            });
        }

        let rows = batch * patches.0 * patches.1;
        let m = Modulation { values: &norm_out, stride: 2 * d, tokens: rows / batch, width: d };
        let (normal, stats) = device.modulate(&x, m, d, 0);
        let (out, proj_out) = self.proj_out.forward(pass, rows, &normal);
        let saved = Saved {
            sizes,
            dropout: dropout.cloned(),
            timestep: timestep_saved,
            pooled: pooled_saved,
            conditioning: (conditioning, activated),
            prompt,
            context_embedder: context_saved,
            modulations,
            modulation_layers,
            blocks: kept,
            x,
            stats,
            norm_out,
            norm_out_layer,
            normal: Some(normal).filter(|_| self.proj_out.has_lora()),
            proj_out,
        };
        (out, saved)
    }

    /// Gradients of the LoRA parameters in canonical order, given d(loss)/d(velocity) [B, C, h, w].
    ///
    /// # Errors
    /// If `d_velocity` does not fit.
    pub fn backward(&self, saved: Saved<D>, d_velocity: &HostTensor) -> Result<Vec<Vec<f32>>, MmditError> {
        let Sizes { batch, pixels, .. } = saved.sizes;
        let (channels, p) = (self.config.out_channels(), self.config.patch_size);
        if d_velocity.shape() != [batch, channels, pixels.0, pixels.1] {
            let expected = format!("{:?}", [batch, channels, pixels.0, pixels.1]);
            return Err(MmditError::Input { input: "the velocity's gradient", got: d_velocity.shape().to_vec(), expected });
        }
        let mut patches = embed::unpatchify_backward(d_velocity.values(), batch, channels, pixels, p);
        let scale = self.gradient_scale(patches.iter().fold(0.0_f32, |most, d| most.max(d.abs())));
        if scale != 1.0 {
            patches.iter_mut().for_each(|d| *d *= scale);
        }
        Ok(unscaled(self.gradients(saved, &self.device.upload(&patches)).download(&self.device), scale))
    }

    /// What gradients are multiplied with on their way through the model: a power of two that brings `most`, the largest of the
    /// output's, near 1 where the precision has few small numbers; else 1.
    pub(super) fn gradient_scale(&self, most: f32) -> f32 {
        if self.device.precision() == Precision::F16 && most.is_normal() { (-most.log2().floor()).clamp(-60.0, 60.0).exp2() } else { 1.0 }
    }

    /// Gradients of the LoRA parameters, given those of the output's patches.
    pub(super) fn gradients(&self, mut saved: Saved<D>, dy: &D::Buffer) -> Gradients<D> {
        let (config, device, in_f32) = (&self.config, &self.device, &self.in_f32);
        let Sizes { batch, patches, context, .. } = saved.sizes;
        let dropout = saved.dropout.take();
        let (pass, f32_pass) = self.passes(dropout.as_ref(), 1.0);
        let (d, rows) = (config.width(), batch * patches.0 * patches.1);
        let mut gradients = Gradients::zeros(device, self.layout.parameters().iter().map(|(_, shape)| shape.iter().product()));

        // Output: projection, final norm.
        let conditioning_trained = self.timestep.has_lora() || self.pooled.has_lora();
        let norm_out_trained = conditioning_trained || self.norm_out.has_lora();
        let blocks_trained = (0..self.blocks.len()).any(|i| self.is_trained(i));
        let through = blocks_trained || norm_out_trained;
        let mut d_normal = through.then(|| device.alloc(rows * d));
        self.proj_out.backward(pass, rows, saved.normal.as_ref(), &saved.proj_out, dy, d_normal.as_mut().map(|b| (b, false)), &mut gradients);
        let Some(d_normal) = d_normal else { return gradients };
        let mut dx = device.zeros(rows * d);
        let mut d_norm_out = norm_out_trained.then(|| in_f32.zeros(batch * 2 * d));
        let m = Modulation { values: &saved.norm_out, stride: 2 * d, tokens: rows / batch, width: d };
        device.modulate_backward(&saved.x, &saved.stats, m, d, 0, &d_normal, Some(&mut dx), d_norm_out.as_mut());
        drop(d_normal);

        // Blocks, last first; the context's gradient begins in the last.
        let mut dc = device.zeros(batch * context * d);
        let mut d_activated = conditioning_trained.then(|| in_f32.zeros(batch * d));
        let activated = &saved.conditioning.1;
        for (i, block) in self.blocks.iter().enumerate().rev() {
            if i > 0 && self.is_trained(i - 1) {
                self.read_ahead(i - 1, "");
            }
            let modulation = &saved.modulations[i];
            let mut d_modulation = BlockModulation {
                image: in_f32.zeros(if block.needs.modulation { modulation.image.len() } else { 0 }),
                context: in_f32.zeros(if block.needs.context_modulation { modulation.context.len() } else { 0 }),
            };
            let activations = match saved.blocks.pop() {
                Some(Kept::Activations(mut activations)) => {
                    block.recompute_inputs(pass, batch, &mut activations, modulation);
                    activations
                }
                Some(Kept::Inputs(x, c)) => Box::new(block.forward(pass, batch, x, c, modulation).2),
                Some(Kept::Nothing) | None => break,
            };
            block.backward(pass, batch, &activations, modulation, &mut dx, &mut dc, &mut d_modulation, &mut gradients);
            let (image, context) = &saved.modulation_layers[i];
            let mut conditioned = |linear: &finetune_compute::nn::Linear<D>, layer: &LinearSaved<D>, dm: &D::Buffer, wanted: bool| {
                if wanted {
                    linear.backward(f32_pass, batch, Some(activated), layer, dm, d_activated.as_mut().map(|b| (b, true)), &mut gradients);
                }
            };
            conditioned(&block.norm1, image, &d_modulation.image, block.needs.modulation);
            conditioned(&block.norm1_context, context, &d_modulation.context, block.needs.context_modulation);
        }

        // Input: context embedder, conditioning.
        if let Some(prompt) = &saved.prompt {
            self.context_embedder.backward(pass, batch * context, Some(prompt), &saved.context_embedder, &dc, None, &mut gradients);
        }
        if let Some(dm) = &d_norm_out {
            let d_activated = d_activated.as_mut().map(|b| (b, true));
            self.norm_out.backward(f32_pass, batch, Some(activated), &saved.norm_out_layer, dm, d_activated, &mut gradients);
        }
        if let Some(mut d_conditioning) = d_activated {
            in_f32.silu_backward(&saved.conditioning.0, &mut d_conditioning);
            self.timestep.backward(f32_pass, batch, &saved.timestep, &d_conditioning, &mut gradients);
            self.pooled.backward(f32_pass, batch, &saved.pooled, &d_conditioning, &mut gradients);
        }
        gradients
    }
}

/// Every sample needs a name of its own.
pub(super) fn check_dropout(dropout: Option<&DropoutKey>, x: &HostTensor) -> Result<(), MmditError> {
    match dropout.filter(|key| key.samples.len() != x.samples()) {
        Some(key) => Err(MmditError::Input { input: "dropout key", got: vec![key.samples.len()], expected: "one name per sample".into() }),
        None => Ok(()),
    }
}

/// Takes the scale of [`Mmdit::gradient_scale`] away again.
pub(super) fn unscaled(mut gradients: Vec<Vec<f32>>, scale: f32) -> Vec<Vec<f32>> {
    if scale != 1.0 {
        gradients.iter_mut().flatten().for_each(|g| *g /= scale);
    }
    gradients
}
