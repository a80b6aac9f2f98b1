//! Attention by the kernels of `attention_*.cu`, whose headers state what they want.

use std::sync::LazyLock;

use super::driver::arguments;
use super::{Device, Kind, Memory};
use crate::kernels::{AttentionShape, Buffer, Joint};

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

/// Queries or keys per block, threads, shared memory.
type Launch = (usize, usize, usize);

/// The suffix of the kernels for a head width (on tensor cores, or for any width) and how forward, backward_q and
/// backward_kv are launched.
fn kernels(kind: Kind, head_dim: usize, capability: (i32, i32)) -> (&'static str, [Launch; 3]) {
    let hopper = [(192, 512, 69632), (128, 384, 69632), (128, 384, 69632)];
    let any = |tile, forward, backward| [(tile, 256, forward), (tile, 256, backward), (tile, 256, backward)];
    let (upto32, upto64, upto128) = (any(64, 41984, 50944), any(64, 41728, 58624), any(32, 35200, 51840));
    let tensor_cores =
        if capability < (8, 0) { [(64, 128, 16384), (64, 128, 16384), (64, 128, 16896)] } else { [(64, 128, 32768), (64, 128, 32768), (64, 128, 33792)] };
    match (kind, head_dim) {
        (Kind::F16, 64) if capability == HOPPER => ("f16_d64_hopper", hopper),
        (Kind::Bf16, 64) if capability == HOPPER => ("bf16_d64_hopper", hopper),
        (Kind::F16, 64) => ("f16_d64", tensor_cores),
        (Kind::Bf16, 64) => ("bf16_d64", tensor_cores),
        (Kind::F32, 0..=32) => ("f32_upto32", upto32),
        (Kind::F16, 0..=32) => ("f16_upto32", upto32),
        (Kind::Bf16, 0..=32) => ("bf16_upto32", upto32),
        (Kind::F32, 33..=64) => ("f32_upto64", upto64),
        (Kind::F16, 33..=64) => ("f16_upto64", upto64),
        (Kind::Bf16, 33..=64) => ("bf16_upto64", upto64),
        (Kind::F32, _) => ("f32_upto128", upto128),
        (Kind::F16, _) => ("f16_upto128", upto128),
        (Kind::Bf16, _) => ("bf16_upto128", upto128),
    }
}

fn operand(joint: &Joint<Buffer>, width: usize) -> Operand {
    let (image, image_stride) = joint.image.device().rows(width);
    let (context, context_stride) = joint.context.as_ref().map_or((0, 0), |c| c.device().rows(width));
    Operand { image, context, image_stride: image_stride as i64, context_stride: context_stride as i64 }
}

fn join([a, b, c]: [Option<Buffer>; 3], [d, e, f]: [Option<Buffer>; 3]) -> [(Option<Buffer>, Option<Buffer>); 3] {
    [(a, d), (b, e), (c, f)]
}

impl Device {
    fn parameters(shape: &AttentionShape, q: &Joint<Buffer>, k: &Joint<Buffer>, v: &Joint<Buffer>, out: &Joint<Buffer>, lse: &Memory) -> Parameters {
        let width = shape.width();
        let (image, context) = (shape.batch * shape.image * width, shape.batch * shape.context * width);
        let fits = |joint: &Joint<Buffer>, with_context: bool| {
            joint.image.len() == image && joint.context.as_ref().map_or(0, Buffer::len) == if with_context { context } else { 0 }
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

    /// The compute capability whose kernels are taken.
    fn generation(&self) -> (i32, i32) {
        if *PORTABLE { (8, 0) } else { self.driver.capability }
    }

    fn attend(&self, name: (&'static str, &'static str), (tile, threads, shared): Launch, shape: &AttentionShape, tokens: usize, parameters: Parameters) {
        let grid = (tokens.div_ceil(tile), shape.heads, shape.batch);
        // SAFETY: `parameters` has the kernel's layout; its operands were checked against the shape.
        unsafe { self.driver.launch(name, grid, threads, shared, arguments![parameters]) };
    }

    pub(in crate::kernels) fn attention(&self, shape: &AttentionShape, q: &Joint<Buffer>, k: &Joint<Buffer>, v: &Joint<Buffer>) -> (Joint<Buffer>, Buffer) {
        let kind = q.image.device().kind();
        let like = |b: &Buffer| Buffer::on_device(self.memory_of(b.len(), kind));
        let out = Joint { image: like(&q.image), context: q.context.as_ref().map(like) };
        let lse = self.memory_of(shape.batch * shape.heads * shape.keys(), Kind::F32);
        let parameters = Self::parameters(shape, q, k, v, &out, &lse);
        let (suffix, [launch, ..]) = kernels(kind, shape.head_dim, self.generation());
        self.attend(("attention_forward", suffix), launch, shape, parameters.queries as usize, parameters);
        (out, Buffer::on_device(lse))
    }

    /// Buffers as these are, of any content: where they are columns of one matrix, columns of another one.
    fn alike(&self, parts: [Option<&Buffer>; 3]) -> [Option<Buffer>; 3] {
        let place = |part: Option<&Buffer>| part.and_then(|b| b.device().place().map(|place| (place, b.len())));
        let whole = parts.iter().find_map(|part| place(*part)).map(|((_, width, stride), len)| self.memory_of(len / width * stride, self.precision));
        parts.map(|part| {
            let columns = place(part).zip(whole.as_ref()).map(|(((first, width, stride), _), whole)| whole.columns(first, width, stride));
            part.map(|part| Buffer::on_device(columns.unwrap_or_else(|| self.memory_of(part.len(), part.device().kind()))))
        })
    }

    pub(in crate::kernels) fn attention_backward(
        &self,
        shape: &AttentionShape,
        (q, k, v): (&Joint<Buffer>, &Joint<Buffer>, &Joint<Buffer>),
        out: &Joint<Buffer>,
        lse: &Buffer,
        d_out: &Joint<Buffer>,
    ) -> (Joint<Buffer>, Joint<Buffer>, Joint<Buffer>) {
        let (kind, width) = (q.image.device().kind(), shape.width());
        let image = self.alike([Some(&q.image), Some(&k.image), Some(&v.image)]);
        let context = self.alike([q.context.as_ref(), k.context.as_ref(), v.context.as_ref()]);
        let joint = |image: Option<Buffer>, context| Joint { image: image.unwrap_or_else(|| self.alloc(0)), context };
        let [(qi, qc), (ki, kc), (vi, vc)] = join(image, context);
        let (dq, dk, dv) = (joint(qi, qc), joint(ki, kc), joint(vi, vc));
        let rows = self.memory_of(2 * lse.len(), Kind::F32);
        let parameters = Parameters {
            d_out: operand(d_out, width),
            d_q: operand(&dq, width),
            d_k: operand(&dk, width),
            d_v: operand(&dv, width),
            rows: rows.pointer(),
            ..Self::parameters(shape, q, k, v, out, lse.device())
        };
        let (suffix, [_, by_queries, by_keys]) = kernels(kind, shape.head_dim, self.generation());
        self.attend(("attention_backward_q", suffix), by_queries, shape, parameters.queries as usize, parameters);
        self.attend(("attention_backward_kv", suffix), by_keys, shape, shape.keys(), parameters);
        (dq, dk, dv)
    }
}
