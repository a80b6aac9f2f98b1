//! An NVIDIA GPU: cuBLASLt's products and own kernels on one stream, memory from one pool.
//!
//! Activations and frozen weights have the device's precision; statistics, modulations, sums and LoRA's gradients are f32. No result
//! depends on the order in which threads happen to run: there are no atomic additions. Nothing waits for the device
//! but [`Cuda::download_to`] and [`Arrival::receive`].
#![expect(unsafe_code, reason = "calls of the driver, of cuBLASLt and of kernels")]

mod attention;
mod device;
mod driver;
mod encode;
mod error;
mod fused;
mod fused_linear;
mod gemm;
mod graph;
mod int8;
mod linear;
mod ops;
mod picture;
mod pool;
mod skinny;
mod staging;
mod stream;
mod timer;
mod update;

use std::sync::Arc;

use cudarc::driver::sys;

pub(super) use encode::Matrix;
use fused_linear::DeviceFusedLinear;
pub(super) use graph::DeviceGraph;
pub(super) use linear::{DeviceLora, DeviceWeight};
pub use pool::Memory;
pub(super) use skinny::DeviceScatter;
pub use timer::Timer;
pub(super) use update::DeviceRanges;

use self::driver::{Driver, arguments, check};
use self::error::{CudaError, must};
use self::gemm::Blas;
use self::pool::DevicePool;
pub(super) use self::staging::Arrival;
use self::staging::Staging;
use super::Precision;

/// Type of values on the device.
pub(super) type Kind = Precision;

/// Threads per block of the kernels in `pointwise.cu` and `norm.cu`.
const BLOCK: usize = 256;

/// An NVIDIA GPU in a precision. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
    pool: Arc<DevicePool>,
    blas: Arc<Blas>,
    precision: Precision,
    staging: Arc<Staging>,
}

impl Cuda {
    /// Opens GPU `ordinal`.
    pub(super) fn open_driver(ordinal: i32, precision: Precision) -> Result<Self, CudaError> {
        let driver = Arc::new(Driver::open(ordinal)?);
        let pool = Arc::new(DevicePool::new(Arc::clone(&driver)));
        let blas = Arc::new(Blas::open(Arc::clone(&driver))?);
        let staging = Arc::new(Staging::new(Arc::clone(&driver)));
        Self { driver, pool, blas, precision: Precision::F32, staging }.with_precision(precision)
    }

    /// The same device, stream and memory, computing in another precision.
    pub(super) fn with_precision(&self, precision: Precision) -> Result<Self, CudaError> {
        let Self { driver, pool, blas, staging, .. } = self;
        if precision == Precision::Bf16 && driver.capability < (8, 0) {
            return Err(CudaError::Precision { precision, device: driver.name.clone(), capability: driver.capability });
        }
        Ok(Self { driver: Arc::clone(driver), pool: Arc::clone(pool), blas: Arc::clone(blas), precision, staging: Arc::clone(staging) })
    }

    /// Bytes (free, total) of the card.
    pub(super) fn memory(&self) -> (usize, usize) {
        self.driver.bind();
        let (mut free, mut total) = (0, 0);
        // SAFETY: both outlive the call.
        must(check("ask for free memory", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }));
        (free, total)
    }

    fn memory_of(&self, len: usize, kind: Kind) -> Memory {
        Memory::new(&self.pool, len, kind)
    }

    /// Zeros (all bits are).
    fn fill_memory(&self, memory: &Memory) {
        if memory.len() == 0 {
            return;
        }
        self.driver.bind();
        let bytes = memory.len() * memory.kind().bytes();
        // SAFETY: the memory is this buffer's own.
        must(check("fill memory", unsafe { sys::cuMemsetD8Async(memory.pointer(), 0, bytes, self.driver.stream()) }));
    }

    /// Bytes of the host in new memory of `len` values of this kind.
    fn upload_bytes(&self, bytes: &[u8], len: usize, kind: Kind) -> Memory {
        let memory = self.memory_of(len, kind);
        assert_eq!(bytes.len(), len * kind.bytes(), "should be the values' bytes");
        if len > 0 {
            // SAFETY: the memory has room for the bytes.
            unsafe { self.staging.upload(bytes, memory.pointer()) };
        }
        memory
    }

    fn upload_values(&self, values: &[f32]) -> Memory {
        // SAFETY: f32 has no padding; as many bytes as the slice has.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        self.upload_bytes(bytes, values.len(), Kind::F32)
    }

    /// Host values in this kind.
    fn upload_as(&self, values: &[f32], kind: Kind) -> Memory {
        let source = self.upload_values(values);
        self.convert(source, kind)
    }

    /// Values stored as f32, f16 or bf16 in this kind.
    fn upload_stored(&self, bytes: &[u8], stored: Kind, kind: Kind) -> Memory {
        let source = self.upload_bytes(bytes, bytes.len() / stored.bytes(), stored);
        self.convert(source, kind)
    }

    /// New values for a buffer; those of the host may change as soon as this returns.
    pub(super) fn overwrite(&self, target: &Memory, values: &[f32]) {
        assert_eq!(target.len(), values.len(), "should be alike");
        if target.kind() == Kind::F32 {
            // SAFETY: f32 has no padding; as many bytes as the slice has, for which the memory has room.
            unsafe { self.staging.upload(std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)), target.pointer()) };
            return;
        }
        let source = self.upload_values(values);
        self.convert_into(target, &source);
    }

    /// The values as this kind.
    fn convert(&self, source: Memory, kind: Kind) -> Memory {
        if source.kind() == kind {
            return source;
        }
        let target = self.memory_of(source.len(), kind);
        self.convert_into(&target, &source);
        target
    }

    fn convert_into(&self, target: &Memory, source: &Memory) {
        assert_eq!(target.len(), source.len(), "should be alike");
        let (to, from, count, tag) = (target.pointer(), source.pointer(), source.len() as i64, tag(source.kind()));
        let kind = target.kind();
        // SAFETY: both have `count` values.
        unsafe { self.driver.launch(("convert", any(kind)), (source.len().div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![to, from, count, tag]) };
    }

    /// The values on the host; waits for the device.
    pub(super) fn download(&self, buffer: &Memory) -> Vec<f32> {
        let mut values = vec![0.0_f32; buffer.len()];
        self.download_to(buffer, &mut [&mut values]);
        values
    }

    /// The first values to places on the host, one after another; waits for the device.
    pub(in crate::kernels) fn download_to(&self, memory: &Memory, places: &mut [&mut [f32]]) {
        let count: usize = places.iter().map(|place| place.len()).sum();
        assert!(count <= memory.len(), "should be as many");
        let converted;
        let source = if memory.kind() == Kind::F32 {
            memory
        } else {
            converted = self.memory_of(memory.len(), Kind::F32);
            self.convert_into(&converted, memory);
            &converted
        };
        let mut places: Vec<&mut [u8]> = places.iter_mut().map(|place| bytes_of(place)).collect();
        // SAFETY: the source has as many values.
        unsafe { self.staging.download(source.pointer(), &mut places) };
    }

    /// Begins to copy f32 values to the host.
    pub(in crate::kernels) fn send(&self, memory: &Memory) -> Arrival {
        assert_eq!(memory.kind(), Kind::F32, "should be f32");
        // SAFETY: the memory has as many values.
        unsafe { Staging::send(&self.staging, memory.pointer(), memory.len()) }
    }

    /// A copy on the device.
    pub(super) fn copy(&self, source: &Memory) -> Memory {
        let target = self.memory_of(source.len(), source.kind());
        self.copy_into(&target, source);
        target
    }

    fn copy_into(&self, target: &Memory, source: &Memory) {
        assert!(target.len() == source.len() && target.kind() == source.kind(), "should be alike");
        if source.len() > 0 {
            self.driver.bind();
            let bytes = source.len() * source.kind().bytes();
            // SAFETY: both have as many bytes.
            must(check("copy", unsafe { sys::cuMemcpyDtoDAsync_v2(target.pointer(), source.pointer(), bytes, self.driver.stream()) }));
        }
    }
}

/// The bytes of f32 values.
fn bytes_of(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as many bytes as the values have, and any bits are values.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(values)) }
}

/// A type as the kernels know it.
const fn tag(kind: Kind) -> i32 {
    match kind {
        Kind::F32 => 0,
        Kind::F16 => 1,
        Kind::Bf16 => 2,
    }
}

/// The suffix of kernels with single accesses.
fn any(kind: Kind) -> &'static str {
    match kind {
        Kind::F32 => "f32_any",
        Kind::F16 => "f16_any",
        Kind::Bf16 => "bf16_any",
    }
}

/// The suffix of kernels with accesses of 16 bytes, and how many values these are, if every one of these lengths and
/// distances is a multiple of that many; else of those with single accesses.
fn widest(kind: Kind, lengths: &[usize]) -> (&'static str, usize) {
    let values = 16 / kind.bytes();
    if lengths.iter().any(|len| !len.is_multiple_of(values)) {
        return (any(kind), 1);
    }
    let suffix = match kind {
        Kind::F32 => "f32",
        Kind::F16 => "f16",
        Kind::Bf16 => "bf16",
    };
    (suffix, values)
}
