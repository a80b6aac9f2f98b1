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

/// Memory of the engine's device: f32 values. Returns to its engine's pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    data: Vec<f32>,
    pool: Arc<Pool>,
}

impl Buffer {
    /// `len` values, of any content.
    pub(super) fn new(pool: &Arc<Pool>, len: usize) -> Self {
        let data = pool.take(len).unwrap_or_else(|| vec![0.0; len]);
        Self { data, pool: Arc::clone(pool) }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    pub(super) fn host(&self) -> &[f32] {
        &self.data
    }

    pub(super) fn host_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.data.is_empty() {
            self.pool.give(std::mem::take(&mut self.data));
        }
    }
}
