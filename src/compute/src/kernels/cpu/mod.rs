//! Kernels for the CPU: AVX-512, AVX2 with FMA, or plain code, chosen at run time.
#![expect(unsafe_code, reason = "vector instructions, and tasks that write disjoint parts of one buffer")]
#![expect(clippy::inline_always, reason = "small functions must take the instruction set of their callers")]
#![expect(clippy::too_many_arguments, reason = "kernels take shapes beside their operands")]

pub(super) mod attention;
pub(super) mod conv;
pub(super) mod gemm;
pub(super) mod group_norm;
pub(super) mod linear;
mod microkernel;
pub(super) mod norm;
pub(super) mod pointwise;
pub(super) mod self_attention;
mod share;
pub(super) mod simd;
