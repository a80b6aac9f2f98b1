//! From files to layers.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::block::{Block, Needs};
use super::config::MmditConfig;
use super::embed::{Embedder, POSITIONS, Positions};
use super::{Mmdit, MmditError};
use crate::weights::{View, Weights};
use finetune_compute::kernels::{Device, Precision, StoredMatrix, WeightFormat};
use finetune_compute::nn::{Attention, FeedForward, Linear, Projections};

/// Models up to so many values are converted to f32 once; the weights of larger ones are converted in passing.
const CONVERT_ONCE: usize = 200_000_000;

/// A weight in its file.
struct InFile {
    weights: Arc<Weights>,
    name: String,
}

impl StoredMatrix for InFile {
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        // Name, shape and type were checked when the layer was made.
        let view = self.weights.view(&self.name);
        assert!(view.is_ok(), "should be a checked weight");
        if let Ok(view) = view {
            view.read_block(rows, columns, out);
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        self.weights.view(&self.name).ok()?.raw()
    }
}

/// Makes layers from checked weights.
struct Loader<'a, D: Device> {
    weights: &'a Arc<Weights>,
    config: &'a MmditConfig,
    device: &'a D,
    /// The same device in f32.
    in_f32: &'a D,
    /// Whether weights become f32 once on the host.
    convert: bool,
    /// How the blocks' weights are kept, but for those that make modulations.
    format: WeightFormat,
    /// Places of the linear modules in [`MmditConfig::linear_sites`].
    ordinals: HashMap<String, usize>,
}

impl<D: Device> Loader<'_, D> {
    fn view(&self, name: &str, shape: &[usize]) -> Result<View<'_>, MmditError> {
        Ok(self.weights.view_of_shape(name, shape)?)
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, MmditError> {
        let view = self.view(name, shape)?;
        view.to_f32().ok_or_else(|| MmditError::Weight { name: name.to_owned(), problem: format!("stored as {}, which is not a supported float", view.dtype) })
    }

    fn vector(&self, name: &str, len: usize) -> Result<D::Buffer, MmditError> {
        Ok(self.device.upload(&self.values(name, &[len])?))
    }

    /// The linear module `name` of [`MmditConfig::linear_sites`].
    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear<D>, MmditError> {
        let weight = format!("{name}.weight");
        let frozen = if self.convert {
            self.device.frozen(outputs, inputs, &self.values(&weight, &[outputs, inputs])?)
        } else {
            self.device.frozen_stored(outputs, inputs, self.stored(weight, &[outputs, inputs])?)
        };
        self.with_bias(name, self.device, inputs, outputs, frozen)
    }

    /// As [`Loader::linear`], computed in f32.
    fn f32_linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear<D>, MmditError> {
        let (weight, device, model) = (format!("{name}.weight"), self.in_f32, self.device.precision());
        let frozen = if self.convert {
            device.frozen(outputs, inputs, &self.values(&weight, &[outputs, inputs])?)
        } else {
            let stored = self.stored(weight, &[outputs, inputs])?;
            if device.precision() == model { device.frozen_stored(outputs, inputs, stored) } else { device.frozen_kept(outputs, inputs, stored, model) }
        };
        self.with_bias(name, device, inputs, outputs, frozen)
    }

    /// As [`Loader::linear`], whose weight is kept in the format that was asked for.
    fn block_linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear<D>, MmditError> {
        match self.format {
            WeightFormat::Float => self.linear(name, inputs, outputs),
            WeightFormat::Int8 => {
                let frozen = self.device.frozen_int8(outputs, inputs, self.stored(format!("{name}.weight"), &[outputs, inputs])?);
                self.with_bias(name, self.device, inputs, outputs, frozen)
            }
        }
    }

    /// A weight in its file, with a type that can be read.
    fn stored(&self, name: String, shape: &[usize]) -> Result<Arc<InFile>, MmditError> {
        let view = self.view(&name, shape)?;
        if !view.read_f32(0, &mut [0.0]) {
            return Err(MmditError::Weight { name, problem: format!("stored as {}, which is not a supported float", view.dtype) });
        }
        Ok(Arc::new(InFile { weights: Arc::clone(self.weights), name }))
    }

    fn with_bias(&self, name: &str, device: &D, inputs: usize, outputs: usize, frozen: D::Weight) -> Result<Linear<D>, MmditError> {
        let bias = device.upload(&self.values(&format!("{name}.bias"), &[outputs])?);
        let no_place = || MmditError::Weight { name: name.to_owned(), problem: "not a linear module of this configuration".to_owned() };
        let ordinal = self.ordinals.get(name).copied().ok_or_else(no_place)?;
        Ok(Linear::new(ordinal, inputs, outputs, frozen, Some(bias)))
    }

    fn square(&self, name: &str) -> Result<Linear<D>, MmditError> {
        let d = self.config.width();
        self.block_linear(name, d, d)
    }

    fn embedder(&self, name: &str, inputs: usize) -> Result<Embedder<D>, MmditError> {
        let d = self.config.width();
        Ok(Embedder { linear_1: self.f32_linear(&format!("{name}.linear_1"), inputs, d)?, linear_2: self.f32_linear(&format!("{name}.linear_2"), d, d)? })
    }

    /// RMSNorm weights of queries and keys.
    #[expect(clippy::type_complexity, reason = "two buffers, where the model has them")]
    fn norms(&self, q: &str, k: &str) -> Result<Option<(D::Buffer, D::Buffer)>, MmditError> {
        let dim = self.config.attention_head_dim;
        let norm = |name: &str| self.vector(&format!("{name}.weight"), dim);
        self.config.qk_norm.as_ref().map(|_| Ok((norm(q)?, norm(k)?))).transpose()
    }

    fn joint_attention(&self, name: &str, last: bool) -> Result<Attention<D>, MmditError> {
        let part = |part: &str| format!("{name}.{part}");
        let (q, k, v) = (self.square(&part("to_q"))?, self.square(&part("to_k"))?, self.square(&part("to_v"))?);
        let (kc, vc, qc) = (self.square(&part("add_k_proj"))?, self.square(&part("add_v_proj"))?, self.square(&part("add_q_proj"))?);
        let out = self.square(&part("to_out.0"))?;
        let out_context = if last { None } else { Some(self.square(&part("to_add_out"))?) };
        let norms = self.norms(&part("norm_q"), &part("norm_k"))?;
        let context_norms = self.norms(&part("norm_added_q"), &part("norm_added_k"))?;
        Ok(Attention {
            heads: self.config.num_attention_heads,
            head_dim: self.config.attention_head_dim,
            image: Projections { q: Some(q), k, v, out: Some(out), norms, fused: None },
            context: Some(Projections { q: if last { None } else { Some(qc) }, k: kc, v: vc, out: out_context, norms: context_norms, fused: None }),
        })
    }

    fn image_attention(&self, name: &str) -> Result<Attention<D>, MmditError> {
        let part = |part: &str| format!("{name}.{part}");
        let (q, k, v) = (self.square(&part("to_q"))?, self.square(&part("to_k"))?, self.square(&part("to_v"))?);
        let out = self.square(&part("to_out.0"))?;
        let norms = self.norms(&part("norm_q"), &part("norm_k"))?;
        let image = Projections { q: Some(q), k, v, out: Some(out), norms, fused: None };
        Ok(Attention { heads: self.config.num_attention_heads, head_dim: self.config.attention_head_dim, image, context: None })
    }

    fn feed_forward(&self, name: &str) -> Result<FeedForward<D>, MmditError> {
        let d = self.config.width();
        Ok(FeedForward { up: self.block_linear(&format!("{name}.net.0.proj"), d, 4 * d)?, down: self.block_linear(&format!("{name}.net.2"), 4 * d, d)? })
    }

    /// What makes the modulations of a block: of the picture, of the text.
    fn modulations(&self, layer: usize) -> Result<(Linear<D>, Linear<D>), MmditError> {
        let (d, dual, last) = (self.config.width(), self.config.is_dual(layer), self.config.is_last(layer));
        let part = |part: &str| format!("transformer_blocks.{layer}.{part}");
        let norm1 = self.f32_linear(&part("norm1.linear"), d, if dual { 9 * d } else { 6 * d })?;
        Ok((norm1, self.f32_linear(&part("norm1_context.linear"), d, if last { 2 * d } else { 6 * d })?))
    }

    fn block(&self, layer: usize, (norm1, norm1_context): (Linear<D>, Linear<D>)) -> Result<Block<D>, MmditError> {
        let (dual, last) = (self.config.is_dual(layer), self.config.is_last(layer));
        let part = |part: &str| format!("transformer_blocks.{layer}.{part}");
        let mut block = Block {
            width: self.config.width(),
            last,
            norm1,
            norm1_context,
            attention: self.joint_attention(&part("attn"), last)?,
            attention2: if dual { Some(self.image_attention(&part("attn2"))?) } else { None },
            feed_forward: self.feed_forward(&part("ff"))?,
            feed_forward_context: if last { None } else { Some(self.feed_forward(&part("ff_context"))?) },
            needs: Needs::default(),
        };
        block.attention.fuse(self.device);
        if let Some(attention) = &mut block.attention2 {
            attention.fuse(self.device);
        }
        Ok(block)
    }
}

/// Whether a model of this size is converted to f32 once.
pub(super) fn converts_once(config: &MmditConfig) -> bool {
    config.linear_sites().iter().map(|s| s.in_features * s.out_features).sum::<usize>() <= CONVERT_ONCE
}

/// Loads the transformer: see [`Mmdit::load`]. `convert`: weights become f32 at once, else whenever they are used; those in 8 bits never do.
pub(super) fn load<D: Device>(weights: &Arc<Weights>, config: MmditConfig, device: D, format: WeightFormat, convert: bool) -> Result<Mmdit<D>, MmditError> {
    config.check()?;
    let d = config.width();
    let in_f32 = device.in_precision(Precision::F32)?;
    let ordinals = config.linear_sites().into_iter().map(|site| (site.name, site.ordinal)).collect();
    let loader = Loader { weights, config: &config, device: &device, in_f32: &in_f32, convert, format, ordinals };

    // First, and before the blocks need memory: while they are laid together they are there twice.
    let mut modulations = (0..config.num_layers).map(|layer| loader.modulations(layer)).collect::<Result<Vec<_>, _>>()?;
    let mut norm_out = loader.f32_linear("norm_out.linear", d, 2 * d)?;
    let mut layers: Vec<&mut Linear<D>> = modulations.iter_mut().flat_map(|(norm1, norm1_context)| [norm1, norm1_context]).collect();
    layers.push(&mut norm_out);
    let modulation = Linear::fuse(&in_f32, &mut layers);
    if !D::IS_HOST {
        device.trim();
    }

    let p = config.patch_size;
    let inputs = config.in_channels * p * p;
    let patch = device.frozen(d, inputs, &loader.values("pos_embed.proj.weight", &[d, config.in_channels, p, p])?);
    let patch = Linear::new(usize::MAX, inputs, d, patch, Some(loader.vector("pos_embed.proj.bias", d)?));
    let side = config.pos_embed_max_size;
    if !loader.view(POSITIONS, &[1, side * side, d])?.read_f32(0, &mut [0.0]) {
        return Err(MmditError::Weight { name: POSITIONS.into(), problem: "not stored as a supported float".into() });
    }
    let timestep = loader.embedder("time_text_embed.timestep_embedder", super::TIMESTEP_FEATURES)?;
    let pooled = loader.embedder("time_text_embed.text_embedder", config.pooled_projection_dim)?;
    let context_embedder = loader.linear("context_embedder", config.joint_attention_dim, d)?;
    let blocks = modulations.into_iter().enumerate().map(|(layer, modulations)| loader.block(layer, modulations)).collect::<Result<Vec<_>, _>>()?;
    let proj_out = loader.linear("proj_out", d, config.patch_out())?;
    let recompute = vec![false; config.num_layers];
    let positions = Positions { weights: Arc::clone(weights), kept: std::sync::Mutex::default() };
    if !D::IS_HOST {
        // What queries, keys and values had before they were laid together.
        device.trim();
    }
    Ok(Mmdit {
        device,
        in_f32,
        config,
        layout: crate::lora::LoraLayout::default(),
        patch,
        positions,
        timestep,
        pooled,
        context_embedder,
        blocks,
        norm_out,
        modulation,
        proj_out,
        recompute,
        scatter: None,
        recorded: super::flow::Recorded::default(),
        in_file: !convert && D::IS_HOST,
    })
}
