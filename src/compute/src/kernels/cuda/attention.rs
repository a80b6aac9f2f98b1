//! Attention by the kernels of `attention_*.cu`, whose headers state what they want.

use std::sync::LazyLock;

use super::driver::arguments;
use super::{Cuda, Kind, Memory};
use crate::kernels::{AttentionShape, Joint, Qkv};

/// `AttentionOperand` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Operand {
    image: u64,
    context: u64,
    image_stride: i64,
    context_stride: i64,
}

/// `AttentionParameters` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Parameters {
    q: Operand,
    k: Operand,
    v: Operand,
    out: Operand,
    d_out: Operand,
    d_q: Operand,
    d_k: Operand,
    d_v: Operand,
    lse: u64,
    rows: u64,
    heads: i32,
    head_dim: i32,
    image: i32,
    context: i32,
    queries: i32,
    scale: f32,
}

/// The cards whose own kernels exist beside those for all cards.
const HOPPER: (i32, i32) = (9, 0);

/// `FINETUNE_PORTABLE_KERNELS` set: a Hopper card takes the kernels of the others, to measure and to compare.
static PORTABLE: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FINETUNE_PORTABLE_KERNELS").is_some());

/// The three kernels.
#[derive(Clone, Copy)]
enum Part {
    Forward,
    BackwardQ,
    BackwardKv,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "attention_forward",
            Self::BackwardQ => "attention_backward_q",
            Self::BackwardKv => "attention_backward_kv",
        }
    }

    /// Of the three values, this kernel's.
    fn of<T: Copy>(self, values: [T; 3]) -> T {
        values[self as usize]
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Launch {
    /// Of the kernel's name.
    suffix: &'static str,
    /// Queries or keys per block.
    rows: usize,
    threads: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// The kernel for a head width (on tensor cores, or for any width) and a card.
fn launch(part: Part, kind: Kind, head_dim: usize, capability: (i32, i32)) -> Launch {
    let any = |suffixes: [&'static str; 3], rows, forward, backward| {
        let suffix = match kind {
            Kind::F32 => suffixes[0],
            Kind::F16 => suffixes[1],
            Kind::Bf16 => suffixes[2],
        };
        Launch { suffix, rows, threads: 256, shared: part.of([forward, backward, backward]) }
    };
    match (kind, head_dim) {
        (Kind::F16 | Kind::Bf16, 64) => {
            let shared = if capability < (8, 0) { [16384, 16384, 16896] } else { [32768, 32768, 33792] };
            Launch { suffix: if kind == Kind::F16 { "f16_d64" } else { "bf16_d64" }, rows: 64, threads: 128, shared: part.of(shared) }
        }
        (_, 0..=32) => any(["f32_upto32", "f16_upto32", "bf16_upto32"], 64, 41984, 50944),
        (_, 33..=64) => any(["f32_upto64", "f16_upto64", "bf16_upto64"], 64, 41728, 58624),
        _ => any(["f32_upto128", "f16_upto128", "bf16_upto128"], 32, 35200, 51840),
    }
}

/// The kernel of head width 64 for a Hopper card: one large block per multiprocessor, or two small ones (`pair`).
///
/// The blocks of a round take about the same time, so the number of rounds decides. Pairs cost a little more per row (as
/// measured on an H200), but where their last round has one block per multiprocessor, that one has it for itself.
fn launch_on_hopper(part: Part, kind: Kind, blocks_of: impl Fn(usize) -> usize, multiprocessors: usize) -> Launch {
    let half = kind == Kind::F16;
    let (rows, threads, shared) = part.of([(256, 640, 135_168), (192, 512, 118_784), (128, 384, 69632)]);
    let large = Launch { suffix: if half { "f16_d64_hopper" } else { "bf16_d64_hopper" }, rows, threads, shared };
    let (rows, threads, shared) = part.of([(128, 384, 84992), (64, 256, 69632), (64, 256, 69632)]);
    let pair = Launch { suffix: if half { "f16_d64_hopper_pair" } else { "bf16_d64_hopper_pair" }, rows, threads, shared };
    let blocks = blocks_of(pair.rows);
    let last = match blocks % (2 * multiprocessors) {
        0 => 0.0,
        rest if rest <= multiprocessors => 0.65,
        _ => 1.0,
    };
    let rounds_of_pairs = (blocks / (2 * multiprocessors)) as f64 + last;
    let rounds = blocks_of(large.rows).div_ceil(multiprocessors);
    let more = part.of([1.03, 1.15, 1.06]);
    if more * rounds_of_pairs * (2 * pair.rows) as f64 <= (rounds * large.rows) as f64 { pair } else { large }
}

/// An operand of both streams, each rows of `width` values or columns of a wider matrix.
fn streams(image: Option<&Memory>, context: Option<&Memory>, width: usize) -> Operand {
    let place = |buffer: Option<&Memory>| buffer.map_or((0, 0), |b| b.rows(width));
    let ((image, image_stride), (context, context_stride)) = (place(image), place(context));
    Operand { image, context, image_stride: image_stride as i64, context_stride: context_stride as i64 }
}

fn operand(joint: &Joint<Memory>, width: usize) -> Operand {
    streams(Some(&joint.image), joint.context.as_ref(), width)
}

impl Cuda {
    fn parameters(shape: &AttentionShape, q: &Joint<Memory>, k: &Joint<Memory>, v: &Joint<Memory>, out: &Joint<Memory>, lse: &Memory) -> Parameters {
        let width = shape.width();
        let (image, context) = (shape.batch * shape.image * width, shape.batch * shape.context * width);
        let fits = |joint: &Joint<Memory>, with_context: bool| {
            joint.image.len() == image && joint.context.as_ref().map_or(0, Memory::len) == if with_context { context } else { 0 }
        };
        let asks = shape.context_queries && shape.context > 0;
        assert!(fits(q, asks) && fits(k, true) && fits(v, true) && fits(out, asks), "should be [batch · tokens, width]");
        assert!(shape.head_dim <= 128, "should be a head of at most 128 values");
        let none = Operand::default();
        Parameters {
            q: operand(q, width),
            k: operand(k, width),
            v: operand(v, width),
            out: operand(out, width),
            d_out: none,
            d_q: none,
            d_k: none,
            d_v: none,
            lse: lse.pointer(),
            rows: 0,
            heads: shape.heads as i32,
            head_dim: shape.head_dim as i32,
            image: shape.image as i32,
            context: shape.context as i32,
            queries: if asks { shape.keys() } else { shape.image } as i32,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
        }
    }

    fn attend(&self, part: Part, kind: Kind, shape: &AttentionShape, parameters: &Parameters) {
        let tokens = if matches!(part, Part::BackwardKv) { shape.keys() } else { parameters.queries as usize };
        let blocks_of = |rows: usize| tokens.div_ceil(rows) * shape.heads * shape.batch;
        let driver = &self.driver;
        let launch = if driver.capability == HOPPER && !*PORTABLE && shape.head_dim == 64 && kind != Kind::F32 {
            launch_on_hopper(part, kind, blocks_of, driver.multiprocessors)
        } else {
            launch(part, kind, shape.head_dim, driver.capability)
        };
        let grid = (tokens.div_ceil(launch.rows), shape.heads, shape.batch);
        // SAFETY: `parameters` has the kernel's layout; its operands were checked against the shape.
        unsafe { driver.launch((part.name(), launch.suffix), grid, launch.threads, launch.shared, arguments![*parameters]) };
    }

    pub(in crate::kernels) fn attention(&self, shape: &AttentionShape, q: &Joint<Memory>, k: &Joint<Memory>, v: &Joint<Memory>) -> (Joint<Memory>, Memory) {
        let kind = q.image.kind();
        let like = |b: &Memory| self.memory_of(b.len(), kind);
        let out = Joint { image: like(&q.image), context: q.context.as_ref().map(like) };
        let lse = self.memory_of(shape.batch * shape.heads * shape.keys(), Kind::F32);
        let parameters = Self::parameters(shape, q, k, v, &out, &lse);
        self.attend(Part::Forward, kind, shape, &parameters);
        (out, lse)
    }

    pub(in crate::kernels) fn attention_backward(
        &self,
        shape: &AttentionShape,
        (q, k, v): (&Joint<Memory>, &Joint<Memory>, &Joint<Memory>),
        out: &Joint<Memory>,
        lse: &Memory,
        d_out: &Joint<Memory>,
        gradients: &Joint<Qkv<Memory>>,
    ) {
        let (kind, width) = (q.image.kind(), shape.width());
        let own = |part: fn(&Qkv<Memory>) -> Option<&Memory>| streams(part(&gradients.image), gradients.context.as_ref().and_then(part), width);
        let rows = self.memory_of(2 * lse.len(), Kind::F32);
        let parameters = Parameters {
            d_out: operand(d_out, width),
            d_q: own(|g| g.q.as_ref()),
            d_k: own(|g| Some(&g.k)),
            d_v: own(|g| Some(&g.v)),
            rows: rows.pointer(),
            ..Self::parameters(shape, q, k, v, out, lse)
        };
        self.attend(Part::BackwardQ, kind, shape, &parameters);
        self.attend(Part::BackwardKv, kind, shape, &parameters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows per block for SD3's 24 heads on an H200 (132 multiprocessors), as its measurements want.
    #[test]
    fn hopper_blocks_fill_their_last_round() {
        let rows = |part, batch: usize, tokens: usize| launch_on_hopper(part, Kind::Bf16, |rows| tokens.div_ceil(rows) * 24 * batch, 132).rows;
        for (batch, tokens, expected) in [(4, 1178, [256, 64, 64]), (1, 1178, [256, 64, 128]), (1, 4250, [128, 192, 128]), (4, 4250, [256, 192, 128])] {
            let chosen = [Part::Forward, Part::BackwardQ, Part::BackwardKv].map(|part| rows(part, batch, tokens));
            assert_eq!(chosen, expected, "{batch} x {tokens}");
        }
    }
}
