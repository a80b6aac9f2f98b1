//! Host memory that is used again: a step asks for the same sizes over and over, and fresh pages cost more than many kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Freed memory by length.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Mutex<HashMap<usize, Vec<Vec<f32>>>>,
}

impl Pool {
    fn take(&self, len: usize) -> Option<Vec<f32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&len)?.pop()
    }

    fn give(&self, data: Vec<f32>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).entry(data.len()).or_default().push(data);
    }

    /// Returns the kept memory to the system.
    pub(super) fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Memory of the engine's device: f32 values on the CPU, the engine's precision (or f32) on a GPU. Returns to its engine's
/// pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(HostMemory),
    #[cfg(feature = "cuda")]
    Device(super::cuda::Memory),
}

impl Buffer {
    /// `len` values on the host, of any content.
    pub(super) fn new(pool: &Arc<Pool>, len: usize) -> Self {
        let data = pool.take(len).unwrap_or_else(|| vec![0.0; len]);
        Self { storage: Storage::Host(HostMemory { data, pool: Some(Arc::clone(pool)) }) }
    }

    /// These values, whose memory goes back to the system: large, and of sizes that seldom come again.
    pub(super) fn unpooled(data: Vec<f32>) -> Self {
        Self { storage: Storage::Host(HostMemory { data, pool: None }) }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn on_device(memory: super::cuda::Memory) -> Self {
        Self { storage: Storage::Device(memory) }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match &self.storage {
            Storage::Host(memory) => memory.data.len(),
            #[cfg(feature = "cuda")]
            Storage::Device(memory) => memory.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn host(&self) -> &[f32] {
        match &self.storage {
            Storage::Host(memory) => &memory.data,
            #[cfg(feature = "cuda")]
            Storage::Device(_) => unreachable!("a GPU's buffer in an operation of the CPU"),
        }
    }

    pub(super) fn host_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::Host(memory) => &mut memory.data,
            #[cfg(feature = "cuda")]
            Storage::Device(_) => unreachable!("a GPU's buffer in an operation of the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn device(&self) -> &super::cuda::Memory {
        match &self.storage {
            Storage::Device(memory) => memory,
            Storage::Host(_) => unreachable!("a CPU's buffer in an operation of the GPU"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn into_device(self) -> super::cuda::Memory {
        match self.storage {
            Storage::Device(memory) => memory,
            Storage::Host(_) => unreachable!("a CPU's buffer in an operation of the GPU"),
        }
    }
}

#[derive(Debug)]
struct HostMemory {
    data: Vec<f32>,
    pool: Option<Arc<Pool>>,
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.as_ref().filter(|_| !self.data.is_empty()) {
            pool.give(std::mem::take(&mut self.data));
        }
    }
}
