//! Attention of the image stream, joint with the context stream or alone, with its projections.

use super::{Gradients, Linear, LinearSaved, Pass};
use crate::kernels::{AttentionShape, Device, DeviceBuffer as _, Joint, LoraSource, NormStats, Qkv};

/// Projections of one stream.
#[derive(Debug)]
pub struct Projections<D: Device> {
    /// Query; `None` where this stream only answers (the last block's context: its output is discarded).
    pub q: Option<Linear<D>>,
    /// Key.
    pub k: Linear<D>,
    /// Value.
    pub v: Linear<D>,
    /// Output, where there is a query.
    pub out: Option<Linear<D>>,
    /// RMSNorm weights of queries and keys `[head_dim]`.
    pub norms: Option<(D::Buffer, D::Buffer)>,
    /// Query, key and value as one product, where the device is faster then; see [`Projections::fuse`].
    pub fused: Option<D::FusedLinear>,
}

impl<D: Device> Projections<D> {
    /// Fuses query, key and value into one product, if the device is faster then.
    pub fn fuse(&mut self, device: &D) {
        let mut layers: Vec<&mut Linear<D>> = self.q.iter_mut().collect();
        layers.extend([&mut self.k, &mut self.v]);
        self.fused = Linear::fuse(device, &mut layers);
    }

    /// Sets the fused layers' LoRA again, after it was set or taken away.
    pub fn fuse_lora(&mut self, device: &D) {
        let Some(mut fused) = self.fused.take() else { return };
        let layers: Vec<_> = self.each().map(|l| l.lora().map(|(factors, ..)| factors)).collect();
        device.fuse_lora(&mut fused, &layers);
        self.fused = Some(fused);
    }

    /// The fused layers, and where the parameters of those with LoRA lie.
    fn lora_sources(&self, source: &dyn Fn(usize, f32) -> LoraSource) -> Option<(&D::FusedLinear, Vec<LoraSource>)> {
        let sources: Vec<_> = self.each().filter_map(Linear::lora).map(|(_, slot, scale)| source(slot, scale)).collect();
        self.fused.as_ref().filter(|_| !sources.is_empty()).map(|fused| (fused, sources))
    }

    fn each(&self) -> impl Iterator<Item = &Linear<D>> {
        self.q.iter().chain([&self.k, &self.v])
    }
}

/// Attention over [image, context] tokens (joint), or over image tokens alone (`context` absent).
#[derive(Debug)]
pub struct Attention<D: Device> {
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The image's projections.
    pub image: Projections<D>,
    /// The context's.
    pub context: Option<Projections<D>>,
}

/// What RMSNorm keeps: its input and each head's reciprocal root.
type NormSaved<D> = Option<(<D as Device>::Buffer, NormStats<<D as Device>::Buffer>)>;

/// x Aᵀ of layers that were projected together, if there is LoRA.
#[derive(Debug)]
struct FusedSaved<D: Device> {
    t: Option<D::Buffer>,
}

#[derive(Debug)]
struct StreamSaved<D: Device> {
    /// Input [rows, D], if a projection of it has LoRA.
    x: Option<D::Buffer>,
    /// Whether it was discarded.
    discarded: bool,
    /// Whether query, key and value were projected together, and then what their LoRA keeps.
    fused_saved: Option<FusedSaved<D>>,
    q: Option<LinearSaved<D>>,
    k: LinearSaved<D>,
    v: LinearSaved<D>,
    q_norm: NormSaved<D>,
    k_norm: NormSaved<D>,
    out: Option<LinearSaved<D>>,
}

/// # Saved for backward
/// q, k, v and the attention's output [rows, D] of each stream, lse [batch, heads, tokens]; with RMSNorm also q and k before
/// it; inputs where a projection has LoRA.
#[derive(Debug)]
pub struct AttentionSaved<D: Device> {
    shape: AttentionShape,
    image: StreamSaved<D>,
    context: Option<StreamSaved<D>>,
    q: Joint<D::Buffer>,
    k: Joint<D::Buffer>,
    v: Joint<D::Buffer>,
    out: Joint<D::Buffer>,
    lse: D::Buffer,
}

impl<D: Device> AttentionSaved<D> {
    /// Discards the inputs: the caller restores them before the backward.
    pub fn discard_inputs(&mut self) {
        for stream in std::iter::once(&mut self.image).chain(&mut self.context) {
            stream.discarded = stream.x.take().is_some();
        }
    }

    /// Which inputs were discarded: the image's, the context's.
    pub fn discarded(&self) -> (bool, bool) {
        (self.image.discarded, self.context.as_ref().is_some_and(|context| context.discarded))
    }

    /// Restores discarded inputs.
    pub fn restore_inputs(&mut self, x: Option<D::Buffer>, c: Option<D::Buffer>) {
        for (stream, input) in std::iter::once(&mut self.image).chain(&mut self.context).zip([x, c]) {
            if input.is_some() {
                (stream.x, stream.discarded) = (input, false);
            }
        }
    }
}

/// q, k, v of a stream.
struct Projected<D: Device> {
    q: Option<D::Buffer>,
    k: D::Buffer,
    v: D::Buffer,
    saved: StreamSaved<D>,
}

impl<D: Device> Projections<D> {
    /// x [rows, D] -> q, k, v [rows, D], normalised.
    fn forward(&self, pass: Pass<'_, D>, rows: usize, x: D::Buffer) -> Projected<D> {
        let normalise = |value: D::Buffer, weight: Option<&D::Buffer>| match weight {
            None => (value, None),
            Some(weight) => {
                let (normal, stats) = pass.device.rms_norm(&value, weight);
                (normal, Some((value, stats)))
            }
        };
        // Dropout gives each layer an input of its own.
        let dropped = pass.dropout.is_some_and(|(_, p)| p > 0.0) && self.each().any(Linear::has_lora);
        let mut fused_saved = None;
        let (q, k, v, q_saved, k_saved, v_saved);
        if let Some(fused) = self.fused.as_ref().filter(|_| !dropped) {
            let (parts, t) = pass.device.fused_forward(rows, &x, fused, pass.lora_scale);
            let mut parts = parts.into_iter();
            q = self.q.as_ref().and_then(|_| parts.next());
            (k, v) = (parts.next().unwrap_or_else(|| pass.device.alloc(0)), parts.next().unwrap_or_else(|| pass.device.alloc(0)));
            (q_saved, k_saved, v_saved) = (q.as_ref().map(|_| LinearSaved::default()), LinearSaved::default(), LinearSaved::default());
            fused_saved = Some(FusedSaved { t });
        } else {
            (q, q_saved) = self.q.as_ref().map(|q| q.forward(pass, rows, &x)).unzip();
            (k, k_saved) = self.k.forward(pass, rows, &x);
            (v, v_saved) = self.v.forward(pass, rows, &x);
        }
        let (q, q_norm) = q.map(|q| normalise(q, self.norms.as_ref().map(|n| &n.0))).unzip();
        let (k, k_norm) = normalise(k, self.norms.as_ref().map(|n| &n.1));
        let x = Some(x).filter(|_| self.each().any(Linear::has_lora));
        Projected {
            q,
            k,
            v,
            saved: StreamSaved { x, discarded: false, fused_saved, q: q_saved, k: k_saved, v: v_saved, q_norm: q_norm.flatten(), k_norm, out: None },
        }
    }

    /// dx [rows, D] of the three projections together, if `need_input`.
    fn backward(
        &self,
        pass: Pass<'_, D>,
        rows: usize,
        saved: &StreamSaved<D>,
        mut d: Qkv<D::Buffer>,
        need_input: bool,
        gradients: &mut Gradients<D>,
    ) -> Option<D::Buffer> {
        let x = saved.x.as_ref();
        let mut dx = need_input.then(|| pass.device.alloc(d.k.len()));
        if let Some((q_weight, k_weight)) = &self.norms {
            if let Some((before, stats)) = &saved.k_norm {
                pass.device.rms_norm_backward(before, k_weight, stats, &mut d.k);
            }
            if let (Some((before, stats)), Some(dq)) = (&saved.q_norm, &mut d.q) {
                pass.device.rms_norm_backward(before, q_weight, stats, dq);
            }
        }
        if let (Some(fused), Some(FusedSaved { t })) = (&self.fused, &saved.fused_saved) {
            let targets: Vec<_> = self.each().filter_map(Linear::lora).map(|(_, slot, scale)| gradients.target(slot, scale)).collect();
            pass.device.fused_backward(rows, &d, fused, x.zip(t.as_ref()), dx.as_mut(), gradients.values_mut(), &targets);
            return dx;
        }
        self.k.backward(pass, rows, x, &saved.k, &d.k, dx.as_mut().map(|d| (d, false)), gradients);
        self.v.backward(pass, rows, x, &saved.v, &d.v, dx.as_mut().map(|d| (d, true)), gradients);
        if let (Some(q), Some(q_saved), Some(dq)) = (&self.q, &saved.q, &d.q) {
            q.backward(pass, rows, x, q_saved, dq, dx.as_mut().map(|d| (d, true)), gradients);
        }
        dx
    }
}

impl<D: Device> Attention<D> {
    /// Whether q, k or v of a stream has LoRA.
    fn projects_with_lora(&self) -> bool {
        self.image.each().chain(self.context.iter().flat_map(Projections::each)).any(Linear::has_lora)
    }

    /// Whether any projection has LoRA.
    pub fn has_lora(&self) -> bool {
        let outs = self.image.out.iter().chain(self.context.iter().filter_map(|c| c.out.as_ref()));
        self.projects_with_lora() || outs.into_iter().any(Linear::has_lora)
    }

    /// See [`Projections::fuse`].
    pub fn fuse(&mut self, device: &D) {
        [Some(&mut self.image), self.context.as_mut()].into_iter().flatten().for_each(|p| p.fuse(device));
    }

    /// See [`Projections::fuse_lora`].
    pub fn fuse_lora(&mut self, device: &D) {
        [Some(&mut self.image), self.context.as_mut()].into_iter().flatten().for_each(|p| p.fuse_lora(device));
    }

    /// The fused layers with LoRA, and where their parameters lie.
    pub fn fused_lora<'a>(&'a self, source: &'a dyn Fn(usize, f32) -> LoraSource) -> impl Iterator<Item = (&'a D::FusedLinear, Vec<LoraSource>)> {
        std::iter::once(&self.image).chain(&self.context).filter_map(move |p| p.lora_sources(source))
    }

    /// All linear layers.
    pub fn linears<'a>(&'a self, layers: &mut Vec<&'a Linear<D>>) {
        for stream in std::iter::once(&self.image).chain(&self.context) {
            layers.extend(stream.each().chain(&stream.out));
        }
    }

    /// Calls `f` on every linear layer.
    pub fn each_linear(&mut self, f: &mut dyn FnMut(&mut Linear<D>)) {
        for stream in [Some(&mut self.image), self.context.as_mut()].into_iter().flatten() {
            stream.q.iter_mut().for_each(&mut *f);
            f(&mut stream.k);
            f(&mut stream.v);
            stream.out.iter_mut().for_each(&mut *f);
        }
    }

    /// # Shapes
    /// x [batch · image tokens, D], c [batch · context tokens, D] -> the same; the context's output is absent where it has no
    /// query.
    pub fn forward(&self, pass: Pass<'_, D>, batch: usize, x: D::Buffer, c: Option<D::Buffer>) -> (D::Buffer, Option<D::Buffer>, AttentionSaved<D>) {
        let width = self.heads * self.head_dim;
        let (rows, context_rows) = (x.len() / width, c.as_ref().map_or(0, |c| c.len() / width));
        let image = self.image.forward(pass, rows, x);
        let context = self.context.as_ref().zip(c).map(|(p, c)| p.forward(pass, context_rows, c));
        let (mut image_saved, mut context_saved) = (image.saved, None);
        let (mut qc, mut kc, mut vc) = (None, None, None);
        if let Some(context) = context {
            (qc, kc, vc) = (context.q, Some(context.k), Some(context.v));
            context_saved = Some(context.saved);
        }
        let shape = AttentionShape {
            batch,
            heads: self.heads,
            head_dim: self.head_dim,
            image: rows / batch,
            context: context_rows / batch,
            context_queries: qc.is_some(),
        };
        let q = Joint { image: image.q.unwrap_or_else(|| pass.device.zeros(rows * width)), context: qc };
        let k = Joint { image: image.k, context: kc };
        let v = Joint { image: image.v, context: vc };
        let (out, lse) = pass.device.attention(&shape, &q, &k, &v);
        let project = |p: &Projections<D>, rows, o: &D::Buffer| p.out.as_ref().map(|out| out.forward(pass, rows, o));
        let (x, saved) = project(&self.image, rows, &out.image).unzip();
        image_saved.out = saved;
        let context_out = self.context.as_ref().zip(out.context.as_ref()).and_then(|(p, o)| project(p, context_rows, o));
        let (c, saved) = context_out.unzip();
        if let Some(s) = &mut context_saved {
            s.out = saved;
        }
        let x = x.unwrap_or_else(|| pass.device.copy(&out.image));
        (x, c, AttentionSaved { shape, image: image_saved, context: context_saved, q, k, v, out, lse })
    }

    /// # Backward
    /// From the gradients of both outputs to those of both inputs, where wanted (`need`: image, context).
    pub fn backward(
        &self,
        pass: Pass<'_, D>,
        saved: &AttentionSaved<D>,
        dx: &D::Buffer,
        dc: Option<&D::Buffer>,
        need: (bool, bool),
        gradients: &mut Gradients<D>,
    ) -> (Option<D::Buffer>, Option<D::Buffer>) {
        let shape = &saved.shape;
        let (rows, context_rows) = (shape.batch * shape.image, shape.batch * shape.context);
        let through = need.0 || need.1 || self.projects_with_lora();
        let mut out_backward = |p: &Projections<D>, s: &StreamSaved<D>, rows, out: &D::Buffer, dy: &D::Buffer| {
            let mut d_out = through.then(|| pass.device.alloc(out.len()));
            if let (Some(layer), Some(layer_saved)) = (&p.out, &s.out) {
                layer.backward(pass, rows, Some(out), layer_saved, dy, d_out.as_mut().map(|d| (d, false)), gradients);
            }
            d_out
        };
        let d_image = out_backward(&self.image, &saved.image, rows, &saved.out.image, dx);
        let d_context = match (&self.context, &saved.context, &saved.out.context, dc) {
            (Some(p), Some(s), Some(out), Some(dc)) => out_backward(p, s, context_rows, out, dc),
            _ => None,
        };
        let Some(d_image) = d_image else { return (None, None) };
        let d_out = Joint { image: d_image, context: d_context };
        // Packed where they come from one product, whose backward then is one, too.
        let width = shape.width();
        let packed = |stream: &StreamSaved<D>, rows, query| pass.device.qkv(rows, width, query, stream.fused_saved.is_some());
        let mut d = Joint {
            image: packed(&saved.image, rows, true),
            context: saved.context.as_ref().map(|context| packed(context, context_rows, shape.context_queries)),
        };
        pass.device.attention_backward(shape, (&saved.q, &saved.k, &saved.v), &saved.out, &saved.lse, &d_out, &mut d);
        let dx = self.image.backward(pass, rows, &saved.image, d.image, need.0, gradients);
        let dc = match (&self.context, &saved.context, d.context) {
            (Some(p), Some(s), Some(d)) => p.backward(pass, context_rows, s, d, need.1, gradients),
            _ => None,
        };
        (dx, dc)
    }
}
