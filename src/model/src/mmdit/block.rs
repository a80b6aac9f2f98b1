//! One joint transformer block: AdaLayerNormZero modulation, joint attention (and in some blocks of SD3.5 a second one of
//! the image alone), feed-forward of both streams.

use finetune_compute::kernels::{Device, DeviceBuffer as _, Modulation, NormStats};
use finetune_compute::nn::{Attention, AttentionSaved, FeedForward, FeedForwardSaved, Gradients, Linear, Pass};

/// Which gradients a block must produce besides those of its own LoRA.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent answers")]
pub(super) struct Needs {
    /// Of its image input.
    pub(super) x: bool,
    /// Of its context input.
    pub(super) c: bool,
    /// Of its image modulation.
    pub(super) modulation: bool,
    /// Of its context modulation.
    pub(super) context_modulation: bool,
}

/// Modulation vectors of a block, as [`Block::modulation`] gives them, or their gradients.
#[derive(Debug)]
pub(super) struct BlockModulation<D: Device> {
    /// [batch, 6D] (9D with a second attention), in f32.
    pub(super) image: D::Buffer,
    /// [batch, 6D] (2D in the last block), in f32.
    pub(super) context: D::Buffer,
}

/// A joint transformer block.
#[derive(Debug)]
pub(super) struct Block<D: Device> {
    pub(super) width: usize,
    /// The context ends here: it is attended to, and its output is discarded.
    pub(super) last: bool,
    pub(super) norm1: Linear<D>,
    pub(super) norm1_context: Linear<D>,
    pub(super) attention: Attention<D>,
    pub(super) attention2: Option<Attention<D>>,
    pub(super) feed_forward: FeedForward<D>,
    pub(super) feed_forward_context: Option<FeedForward<D>>,
    pub(super) needs: Needs,
}

/// The feed-forward half of a stream.
#[derive(Debug)]
struct MlpSaved<D: Device> {
    /// Its residual input [rows, D].
    x: D::Buffer,
    stats: NormStats<D::Buffer>,
    inner: FeedForwardSaved<D>,
    /// Its output before the gate, if the gate's gradient is wanted.
    y: Option<D::Buffer>,
}

/// Of the second attention: its norm's statistics, what it keeps, and its output if the gate's gradient is wanted.
type SecondSaved<D> = (NormStats<<D as Device>::Buffer>, AttentionSaved<D>, Option<<D as Device>::Buffer>);

/// # Saved for backward
/// Inputs of the four LayerNorms with their statistics, what attention and feed-forward keep, and where modulation is
/// trained the outputs of the branches.
#[derive(Debug)]
pub(super) struct BlockSaved<D: Device> {
    x: D::Buffer,
    x_stats: NormStats<D::Buffer>,
    c: D::Buffer,
    c_stats: NormStats<D::Buffer>,
    attention: AttentionSaved<D>,
    attention_y: Option<D::Buffer>,
    attention_yc: Option<D::Buffer>,
    second: Option<SecondSaved<D>>,
    mlp: MlpSaved<D>,
    context_mlp: Option<MlpSaved<D>>,
}

impl<D: Device> BlockSaved<D> {
    /// Discards the modulated inputs of attention, one D of eleven: [`Block::recompute_inputs`] computes them again.
    pub(super) fn discard_inputs(&mut self) {
        self.attention.discard_inputs();
        if let Some((_, second, _)) = &mut self.second {
            second.discard_inputs();
        }
    }
}

/// Chunks of the modulation, in units of D: shift, scale, gate of attention, then of the feed-forward, then of the second attention.
const SHIFT: usize = 0;
const SCALE: usize = 1;
const GATE: usize = 2;
const SHIFT_MLP: usize = 3;
const SCALE_MLP: usize = 4;
const GATE_MLP: usize = 5;
const SHIFT_2: usize = 6;
const SCALE_2: usize = 7;
const GATE_2: usize = 8;

impl<D: Device> Block<D> {
    /// Calls `f` on every linear layer but those of the modulation.
    pub(super) fn each_linear(&mut self, f: &mut dyn FnMut(&mut Linear<D>)) {
        self.attention.each_linear(f);
        if let Some(attention) = &mut self.attention2 {
            attention.each_linear(f);
        }
        self.feed_forward.each_linear(f);
        if let Some(feed_forward) = &mut self.feed_forward_context {
            feed_forward.each_linear(f);
        }
    }

    /// All linear layers but those of the modulation.
    pub(super) fn each_linear_ref<'a>(&'a self, layers: &mut Vec<&'a Linear<D>>) {
        std::iter::once(&self.attention).chain(&self.attention2).for_each(|a| a.linears(layers));
        for feed_forward in std::iter::once(&self.feed_forward).chain(&self.feed_forward_context) {
            layers.extend([&feed_forward.up, &feed_forward.down]);
        }
    }

    fn image_modulation<'a>(&self, m: &'a D::Buffer, batch: usize, rows: usize) -> Modulation<'a, D::Buffer> {
        Modulation { values: m, stride: self.norm1.outputs(), tokens: rows / batch, width: self.width }
    }

    fn context_modulation<'a>(&self, m: &'a D::Buffer, batch: usize, rows: usize) -> Modulation<'a, D::Buffer> {
        Modulation { values: m, stride: self.norm1_context.outputs(), tokens: rows / batch, width: self.width }
    }

    /// Offsets of the context's shift and scale before attention: the last block has (scale, shift), the others (shift, scale).
    fn context_offsets(&self) -> (usize, usize) {
        if self.last { (self.width, 0) } else { (SHIFT * self.width, SCALE * self.width) }
    }

    /// # Shapes
    /// x [batch · N, D], c [batch · S, D], modulation as [`BlockModulation`] -> x, and c unless this is the last block.
    pub(super) fn forward(
        &self,
        pass: Pass<'_, D>,
        batch: usize,
        x: D::Buffer,
        c: D::Buffer,
        modulation: &BlockModulation<D>,
    ) -> (D::Buffer, Option<D::Buffer>, BlockSaved<D>) {
        let (device, d) = (pass.device, self.width);
        let m = self.image_modulation(&modulation.image, batch, x.len() / d);
        let mc = self.context_modulation(&modulation.context, batch, c.len() / d);
        let (context_shift, context_scale) = self.context_offsets();

        let (xn, x_stats) = device.modulate(&x, m, SHIFT * d, SCALE * d);
        let (cn, c_stats) = device.modulate(&c, mc, context_shift, context_scale);
        let (y, yc, attention) = self.attention.forward(pass, batch, xn, Some(cn));
        let (x2, mlp, second);
        if let Some(attention2) = &self.attention2 {
            let x1 = device.gate_residual(&x, &y, m, GATE * d);
            let (xn, stats) = device.modulate(&x, m, SHIFT_2 * d, SCALE_2 * d);
            let (y2, _, saved) = attention2.forward(pass, batch, xn, None);
            (x2, mlp) = mlp_forward(pass, &self.feed_forward, m, (&x1, &y2, GATE_2), self.needs.modulation);
            second = Some((stats, saved, Some(y2).filter(|_| self.needs.modulation)));
        } else {
            (x2, mlp) = mlp_forward(pass, &self.feed_forward, m, (&x, &y, GATE), self.needs.modulation);
            second = None;
        }
        let mut context_mlp = None;
        let mut c2 = None;
        if let (Some(feed_forward), Some(yc)) = (&self.feed_forward_context, &yc) {
            let (out, saved) = mlp_forward(pass, feed_forward, mc, (&c, yc, GATE), self.needs.context_modulation);
            (c2, context_mlp) = (Some(out), Some(saved));
        }
        let saved = BlockSaved {
            x,
            x_stats,
            c,
            c_stats,
            attention,
            attention_y: Some(y).filter(|_| self.needs.modulation),
            attention_yc: yc.filter(|_| self.needs.context_modulation),
            second,
            mlp,
            context_mlp,
        };
        (x2, c2, saved)
    }

    /// Recomputes the inputs of attention that [`BlockSaved::discard_inputs`] has discarded: the same bits.
    pub(super) fn recompute_inputs(&self, pass: Pass<'_, D>, batch: usize, saved: &mut BlockSaved<D>, modulation: &BlockModulation<D>) {
        let (device, d) = (pass.device, self.width);
        let m = self.image_modulation(&modulation.image, batch, saved.x.len() / d);
        let mc = self.context_modulation(&modulation.context, batch, saved.c.len() / d);
        let (context_shift, context_scale) = self.context_offsets();
        let (image, context) = saved.attention.discarded();
        let xn = image.then(|| device.modulate(&saved.x, m, SHIFT * d, SCALE * d).0);
        let cn = context.then(|| device.modulate(&saved.c, mc, context_shift, context_scale).0);
        saved.attention.restore_inputs(xn, cn);
        if let Some((_, second, _)) = &mut saved.second {
            let xn = second.discarded().0.then(|| device.modulate(&saved.x, m, SHIFT_2 * d, SCALE_2 * d).0);
            second.restore_inputs(xn, None);
        }
    }

    /// # Backward
    /// `dx` and `dc` turn from the gradients of the outputs into those of the inputs where [`Needs`] asks for them (else
    /// their content is of no use); in the last block `dc` comes in as zeros. Gradients of the modulation are added to
    /// `d_modulation`.
    #[expect(clippy::too_many_arguments, reason = "what the forward had, and the gradients")]
    pub(super) fn backward(
        &self,
        pass: Pass<'_, D>,
        batch: usize,
        saved: &BlockSaved<D>,
        modulation: &BlockModulation<D>,
        dx: &mut D::Buffer,
        dc: &mut D::Buffer,
        d_modulation: &mut BlockModulation<D>,
        gradients: &mut Gradients<D>,
    ) {
        let (device, d, needs) = (pass.device, self.width, self.needs);
        let m = self.image_modulation(&modulation.image, batch, dx.len() / d);
        let mc = self.context_modulation(&modulation.context, batch, dc.len() / d);
        // Whether anything is wanted below the feed-forwards.
        let below = needs != Needs::default() || self.attention.has_lora() || self.attention2.as_ref().is_some_and(Attention::has_lora);

        let trained = needs.modulation.then_some(&mut d_modulation.image);
        let gated = mlp_backward(pass, &self.feed_forward, m, &saved.mlp, dx, trained, below, gradients);
        let mut gated_context = None;
        if let (Some(feed_forward), Some(mlp)) = (&self.feed_forward_context, &saved.context_mlp) {
            let trained = needs.context_modulation.then_some(&mut d_modulation.context);
            gated_context = mlp_backward(pass, feed_forward, mc, mlp, dc, trained, below, gradients);
        }
        if !below {
            return;
        }

        let need = (needs.x || needs.modulation, needs.c || needs.context_modulation);
        let dy = gated.unwrap_or_else(|| device.gate_backward(dx, m, GATE * d, saved.attention_y.as_ref().map(|y| (y, &mut d_modulation.image))));
        let dyc = (!self.last).then(|| {
            let trained = saved.attention_yc.as_ref().map(|y| (y, &mut d_modulation.context));
            gated_context.unwrap_or_else(|| device.gate_backward(dc, mc, GATE * d, trained))
        });
        let (dxn, dcn) = self.attention.backward(pass, &saved.attention, &dy, dyc.as_ref(), need, gradients);
        let mut dxn2 = None;
        if let (Some(attention2), Some((stats, inner, y))) = (&self.attention2, &saved.second) {
            let dy = device.gate_backward(dx, m, GATE_2 * d, y.as_ref().map(|y| (y, &mut d_modulation.image)));
            dxn2 = attention2.backward(pass, inner, &dy, None, (need.0, false), gradients).0.map(|g| (g, stats));
        }
        if let Some(dxn) = dxn {
            let trained = needs.modulation.then_some(&mut d_modulation.image);
            device.modulate_backward(&saved.x, &saved.x_stats, m, SHIFT * d, SCALE * d, &dxn, needs.x.then_some(&mut *dx), trained);
        }
        if let Some((dxn, stats)) = dxn2 {
            let trained = needs.modulation.then_some(&mut d_modulation.image);
            device.modulate_backward(&saved.x, stats, m, SHIFT_2 * d, SCALE_2 * d, &dxn, needs.x.then_some(&mut *dx), trained);
        }
        if let Some(dcn) = dcn {
            let (shift, scale) = self.context_offsets();
            let trained = needs.context_modulation.then_some(&mut d_modulation.context);
            device.modulate_backward(&saved.c, &saved.c_stats, mc, shift, scale, &dcn, needs.c.then_some(&mut *dc), trained);
        }
    }
}

/// `x + gate_mlp · ff(LN(x) (1 + scale_mlp) + shift_mlp)` of x = residual + gate · branch.
fn mlp_forward<D: Device>(
    pass: Pass<'_, D>,
    feed_forward: &FeedForward<D>,
    m: Modulation<'_, D::Buffer>,
    (residual, branch, gate): (&D::Buffer, &D::Buffer, usize),
    keep_branch: bool,
) -> (D::Buffer, MlpSaved<D>) {
    let (x, normal, stats) = pass.device.gate_modulate(residual, branch, m, gate * m.width, SHIFT_MLP * m.width, SCALE_MLP * m.width);
    let (y, inner) = feed_forward.forward(pass, x.len() / m.width, normal);
    let out = pass.device.gate_residual(&x, &y, m, GATE_MLP * m.width);
    (out, MlpSaved { x, stats, inner, y: Some(y).filter(|_| keep_branch) })
}

/// Adds the branch's part to `dx` if `below`. Returns attention's gate · dx where no gradient of the modulation is wanted.
#[expect(clippy::too_many_arguments, reason = "what the forward had, and the gradients")]
fn mlp_backward<D: Device>(
    pass: Pass<'_, D>,
    feed_forward: &FeedForward<D>,
    m: Modulation<'_, D::Buffer>,
    saved: &MlpSaved<D>,
    dx: &mut D::Buffer,
    mut d_modulation: Option<&mut D::Buffer>,
    below: bool,
    gradients: &mut Gradients<D>,
) -> Option<D::Buffer> {
    let trained = saved.y.as_ref().zip(d_modulation.as_deref_mut());
    let dy = pass.device.gate_backward(dx, m, GATE_MLP * m.width, trained);
    let d_normal = feed_forward.backward(pass, dx.len() / m.width, &saved.inner, &dy, below, gradients);
    let (shift, scale) = (SHIFT_MLP * m.width, SCALE_MLP * m.width);
    match (d_normal, d_modulation) {
        (Some(d_normal), None) => Some(pass.device.modulate_gate_backward(&saved.x, &saved.stats, m, shift, scale, &d_normal, dx, GATE * m.width)),
        (Some(d_normal), trained) => {
            pass.device.modulate_backward(&saved.x, &saved.stats, m, shift, scale, &d_normal, Some(dx), trained);
            None
        }
        (None, _) => None,
    }
}
