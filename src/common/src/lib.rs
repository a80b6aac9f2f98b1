//! What several layers need and none of them owns: digests, YAML, counter-based random numbers, mapped files, listening.

pub mod digest;
pub mod listen;
pub mod mmap;
pub mod rng;
pub mod tensor;
pub mod yaml;
