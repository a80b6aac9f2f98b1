//! Kernels for the CPU: AVX-512, AVX2 with FMA, or plain code, chosen at run time.
#![expect(unsafe_code, reason = "vector instructions, and tasks that write disjoint parts of one buffer")]
#![expect(clippy::inline_always, reason = "small functions must take the instruction set of their callers")]
#![expect(clippy::too_many_arguments, reason = "kernels take shapes beside their operands")]

mod adamw;
mod attention;
mod conv;
pub(super) mod device;
mod flow_loss;
mod gemm;
mod group_norm;
pub(super) mod linear;
mod memory;
mod microkernel;
mod norm;
mod pointwise;
mod self_attention;
mod share;
mod simd;

pub use device::Cpu;
pub use memory::HostBuffer;
