//! Operations that a GPU does in fewer steps than the layers would: layers with one input together, GELU within a product,
//! the loss where the output is. On the CPU they do not exist or are made of the plain ones.

use super::Buffer;
use super::engine::{Backend, Engine, on_gpu};
use super::operands::{FrozenMatrix, LoraMatrix, Modulation, NormStats, Qkv};

/// Layers with the same input as one product: their weights lie below each other. Only a GPU's engine makes it.
#[derive(Debug)]
pub struct FusedLinear {
    #[cfg(feature = "cuda")]
    weights: super::cuda::DeviceFusedLinear,
    #[cfg(feature = "cuda")]
    lora: Option<super::cuda::DeviceFusedLora>,
}

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

/// What a loss compares with: latents and noise [B, n], and each sample's numbers.
#[derive(Debug)]
pub struct FlowData {
    pub(super) x0: Buffer,
    pub(super) noise: Buffer,
    pub(super) samples: Buffer,
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read on a GPU"))]
    pub(super) batch: usize,
}

/// Operations that were recorded on a GPU.
#[derive(Debug)]
pub struct Recording {
    #[cfg(feature = "cuda")]
    graph: super::cuda::DeviceGraph,
}

/// As the kernel reads them: the factor in f64, sigma and weight in f32.
fn words(samples: &[FlowSample]) -> Vec<f32> {
    let halves = |factor: f64| [factor.to_bits() as u32, (factor.to_bits() >> 32) as u32].map(f32::from_bits);
    samples.iter().flat_map(|s| halves(s.factor).into_iter().chain([s.sigma, s.weight])).collect()
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

/// Where every LoRA parameter goes on the device. Only a GPU's engine makes it.
#[derive(Debug)]
pub struct LoraScatter {
    #[cfg(feature = "cuda")]
    scatter: super::cuda::DeviceScatter,
}

/// Tensors of a flat buffer begin at multiples of this many values.
const ALIGNMENT: usize = 64;

/// Where tensors of these lengths begin in a flat buffer, and where the last one ends.
pub fn flat_offsets(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut offsets = vec![0];
    offsets.extend(lengths.scan(0, |end, len| {
        *end += len.next_multiple_of(ALIGNMENT);
        Some(*end)
    }));
    offsets
}

/// Tensors of parameters, as their gradients, in f32. On a GPU they are parts of one flat buffer: what is written to a part is in it.
#[derive(Debug)]
pub struct FlatBuffer {
    pub(super) parts: Vec<Buffer>,
    pub(super) whole: Option<Buffer>,
}

impl FlatBuffer {
    /// The tensors, in order.
    pub fn parts(&self) -> &[Buffer] {
        &self.parts
    }

    /// The tensors, to be written.
    pub fn parts_mut(&mut self) -> &mut [Buffer] {
        &mut self.parts
    }

    /// All of them on a GPU: parts begin at [`flat_offsets`], zeros between them.
    pub fn whole(&self) -> Option<&Buffer> {
        self.whole.as_ref()
    }
}

/// Where a layer's parameters lie among all: A's first value, B's first value, and the scale that B carries.
pub type LoraSource = (usize, usize, f32);

#[cfg_attr(not(feature = "cuda"), expect(unused_variables, clippy::needless_pass_by_value, reason = "used with the feature"))]
impl Engine {
    /// Lays the weights [out, in] and biases of layers with the same input together, if that makes them faster here.
    pub fn fuse(&self, weights: &mut [&mut FrozenMatrix], biases: &mut [&mut Buffer]) -> Option<FusedLinear> {
        match &self.backend {
            Backend::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => {
                let mut weights: Vec<_> = weights.iter_mut().map(|w| w.device_mut()).collect();
                gpu.fuse(&mut weights, biases).map(|weights| FusedLinear { weights, lora: None })
            }
        }
    }

    /// Sets the LoRA of fused layers: of those that have any.
    pub fn fuse_lora(&self, fused: &mut FusedLinear, layers: &[Option<&LoraMatrix>]) {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend {
            let layers: Vec<_> = layers.iter().map(|l| l.map(LoraMatrix::device)).collect();
            fused.lora = gpu.fuse_lora(&fused.weights, &layers);
        }
    }

    /// Where the parameters of all layers with LoRA go, and of the fused layers that they are part of (those with LoRA, in order), so
    /// that [`Engine::scatter_lora`] sets them at once. `None`: this engine sets them one by one.
    pub fn lora_scatter(
        &self,
        layers: &[(&LoraMatrix, LoraSource)],
        fused_layers: &[(&FusedLinear, Vec<LoraSource>)],
        parameters: usize,
    ) -> Option<LoraScatter> {
        match &self.backend {
            Backend::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => {
                let layers: Vec<_> = layers.iter().map(|(lora, source)| (lora.device(), *source)).collect();
                let fused_layers: Vec<_> =
                    fused_layers.iter().filter_map(|(fused, sources)| Some((&fused.weights, fused.lora.as_ref()?, sources.clone()))).collect();
                Some(LoraScatter { scatter: gpu.lora_scatter(&layers, &fused_layers, parameters) })
            }
        }
    }

    /// Sets all parameters, which begin at [`flat_offsets`].
    pub fn scatter_lora(&self, scatter: &LoraScatter, parameters: &[f32]) {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend {
            gpu.scatter_lora(&scatter.scatter, &super::UpdateOps(gpu).upload(parameters));
        }
    }

    /// As [`Engine::scatter_lora`], from a buffer of f32 on the device.
    pub fn scatter_lora_from(&self, scatter: &LoraScatter, parameters: &Buffer) {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend {
            gpu.scatter_lora(&scatter.scatter, parameters);
        }
    }

    /// `y = x Wᵀ + bias + s · scale · (x Aᵀ) Bᵀ` of all layers: y of each, and t = s · x Aᵀ for the backward. s = 0 leaves LoRA out.
    pub fn fused_forward(&self, rows: usize, x: &Buffer, fused: &FusedLinear, lora_scale: f32) -> (Vec<Buffer>, Option<Buffer>) {
        match &self.backend {
            Backend::Cpu(_) => unreachable!("a GPU's layers in an operation of the CPU"),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => gpu.fused_forward(rows, x, &fused.weights, fused.lora.as_ref().filter(|_| lora_scale != 0.0).map(|l| (l, lora_scale))),
        }
    }

    /// Memory for the gradients of a stream's query (if there is one), key and value [rows, width]. `packed`: as columns of one matrix, which
    /// [`Engine::fused_backward`] takes.
    pub fn qkv(&self, rows: usize, width: usize, query: bool, packed: bool) -> Qkv {
        if packed {
            on_gpu!(self, gpu => gpu.packed_qkv(rows, width, query));
        }
        let part = || self.alloc(rows * width);
        Qkv::separate(query.then(part), part(), part())
    }

    /// The backward of [`Engine::fused_forward`] (with s = 1): assigns dx, adds LoRA's gradients to those given for each layer that has
    /// LoRA (A's, B's, the layer's scale). `dy`: the gradients of the results, packed. `lora`: the forward's x and t.
    pub fn fused_backward(
        &self,
        rows: usize,
        dy: &Qkv,
        fused: &FusedLinear,
        lora: Option<(&Buffer, &Buffer)>,
        dx: Option<&mut Buffer>,
        gradients: &[(&Buffer, &Buffer, f32)],
    ) {
        #[cfg(feature = "cuda")]
        if let (Backend::Cuda(gpu), Some(dy)) = (&self.backend, &dy.packed) {
            let lora = fused.lora.as_ref().zip(lora).map(|(l, (x, t))| (l, x, t));
            gpu.fused_backward(rows, dy, &fused.weights, lora, dx, gradients);
        }
    }

    /// [`Engine::gate_residual`] and [`Engine::modulate`] of its result: (x + gate · branch, its modulation, the statistics).
    pub fn gate_modulate(&self, x: &Buffer, branch: &Buffer, m: Modulation<'_>, gate: usize, shift: usize, scale: usize) -> (Buffer, Buffer, NormStats) {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend
            && let Some((out, y, stats)) = gpu.gate_modulate(x, branch, m, gate, shift, scale)
        {
            return (out, y, NormStats(stats));
        }
        let out = self.gate_residual(x, branch, m, gate);
        let (y, stats) = self.modulate(&out, m, shift, scale);
        (out, y, stats)
    }

    /// [`Engine::modulate_backward`] into dx, then `gate · dx` as [`Engine::gate_backward`] gives it.
    #[expect(clippy::too_many_arguments, reason = "the forward's operands, their gradients and where they lie")]
    pub fn modulate_gate_backward(
        &self,
        x: &Buffer,
        stats: &NormStats,
        m: Modulation<'_>,
        shift: usize,
        scale: usize,
        dy: &Buffer,
        dx: &mut Buffer,
        gate: usize,
    ) -> Buffer {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend
            && let Some(gated) = gpu.modulate_backward_gated(x, &stats.0, m, scale, dy, dx, Some(gate))
        {
            return gated;
        }
        self.modulate_backward(x, stats, m, shift, scale, dy, Some(&mut *dx), None);
        self.gate_backward(dx, m, gate, None)
    }

    /// `h = x Wᵀ + bias` and its GELU. `None`: this engine does it in two steps.
    pub fn linear_gelu(&self, rows: usize, x: &Buffer, weight: &FrozenMatrix, bias: &Buffer) -> Option<(Buffer, Buffer)> {
        match &self.backend {
            Backend::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => gpu.linear_gelu(rows, x, weight.device(), bias),
        }
    }

    /// The loss of flow matching on an output of patches, where it is: its gradient, and per sample Σ weight · difference² in parts
    /// (pairs of f32 whose sum is the part). A GPU's operation.
    pub fn flow_loss(&self, out: &Buffer, target: &FlowData, layout: PatchLayout, preconditioned: bool) -> (Buffer, Buffer) {
        match &self.backend {
            Backend::Cpu(_) => unreachable!("a GPU's operation on the CPU"),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => gpu.flow_loss(out, target, layout, preconditioned),
        }
    }

    /// What [`Engine::flow_loss`] compares with, on the device.
    pub fn flow_data(&self, x0: &[f32], noise: &[f32], samples: &[FlowSample]) -> FlowData {
        FlowData { x0: self.upload_f32(x0), noise: self.upload_f32(noise), samples: self.upload_f32(&words(samples)), batch: samples.len() }
    }

    /// New values of the same sizes.
    pub fn overwrite_flow_data(&self, data: &FlowData, x0: &[f32], noise: &[f32], samples: &[FlowSample]) {
        self.overwrite(&data.x0, x0);
        self.overwrite(&data.noise, noise);
        self.overwrite(&data.samples, &words(samples));
    }

    /// A copy of host values on the device in f32, whatever the precision.
    pub fn upload_f32(&self, values: &[f32]) -> Buffer {
        match &self.backend {
            Backend::Cpu(_) => self.upload(values),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => super::UpdateOps(gpu).upload(values),
        }
    }

    /// New values for a buffer of a GPU, as [`Engine::upload`] would have made it.
    pub fn overwrite(&self, buffer: &Buffer, values: &[f32]) {
        match &self.backend {
            Backend::Cpu(_) => unreachable!("a GPU's operation on the CPU"),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => gpu.overwrite(buffer, values),
        }
    }

    /// Whether [`Engine::record`] can be used: on a GPU whose kernels are not being timed.
    pub fn records(&self) -> bool {
        match &self.backend {
            Backend::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => !gpu.is_profiling(),
        }
    }

    /// Records operations without doing them, so that [`Engine::replay`] does them at once. They must neither upload nor download, and
    /// must have been done before with the same sizes. What they return has its values after each replay.
    pub fn record<T>(&self, operations: impl FnOnce() -> T) -> (T, Recording) {
        match &self.backend {
            Backend::Cpu(_) => unreachable!("a GPU's operation on the CPU"),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => {
                let (result, graph) = gpu.capture(operations);
                (result, Recording { graph })
            }
        }
    }

    /// Does what was recorded.
    pub fn replay(&self, recording: &Recording) {
        #[cfg(feature = "cuda")]
        if let Backend::Cuda(gpu) = &self.backend {
            gpu.replay(&recording.graph);
        }
    }

    /// Zeros in f32 for parameters of these lengths.
    pub fn flat_zeros(&self, lengths: &[usize]) -> FlatBuffer {
        on_gpu!(self, gpu => gpu.flat_zeros(lengths));
        FlatBuffer { parts: lengths.iter().map(|len| self.zeros(*len)).collect(), whole: None }
    }

    /// Copies of the parts on the host: on a GPU by one copy of all.
    pub fn download_parts(&self, buffer: &FlatBuffer) -> Vec<Vec<f32>> {
        match &buffer.whole {
            None => buffer.parts.iter().map(|part| self.download(part)).collect(),
            Some(whole) => {
                let values = self.download(whole);
                let offsets = flat_offsets(buffer.parts.iter().map(Buffer::len));
                buffer.parts.iter().zip(offsets).map(|(part, offset)| values[offset..offset + part.len()].to_vec()).collect()
            }
        }
    }
}
