//! Host memory that is used again: a step asks for the same sizes over and over, and fresh pages cost more than many kernels.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use crate::kernels::DeviceBuffer;

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

/// Memory of the CPU: f32 values.
#[derive(Debug)]
pub struct HostBuffer {
    data: Vec<f32>,
    pool: Option<Arc<Pool>>,
}

impl HostBuffer {
    /// `len` values of any content.
    pub(super) fn new(pool: &Arc<Pool>, len: usize) -> Self {
        Self { data: pool.take(len).unwrap_or_else(|| vec![0.0; len]), pool: Some(Arc::clone(pool)) }
    }

    /// These values, whose memory goes back to the system: large, and of sizes that seldom come again.
    pub(super) fn unpooled(data: Vec<f32>) -> Self {
        Self { data, pool: None }
    }
}

impl DeviceBuffer for HostBuffer {
    fn len(&self) -> usize {
        self.data.len()
    }
}

impl Deref for HostBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.as_ref().filter(|_| !self.data.is_empty()) {
            pool.give(std::mem::take(&mut self.data));
        }
    }
}
