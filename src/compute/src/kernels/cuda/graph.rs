//! Work that is recorded once and put on the stream again as a whole: a thousand launches cost the host as much as one.
//!
//! What is recorded keeps its addresses: blocks that it takes come from, and go back to, a part of the pool that only
//! recorded work uses (the arena). Works that are played one after another may share it: nothing in it outlives a play but what
//! the recording returned.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraphExec, CUstreamCaptureMode};

use super::driver::{Driver, check};
use super::error::{CudaError, must};
use super::{Cuda, DevicePool};

/// Recorded work.
#[derive(Debug)]
pub struct DeviceGraph {
    driver: Arc<Driver>,
    pool: Arc<DevicePool>,
    executable: CUgraphExec,
}

// SAFETY: the driver's handle may be used from any thread; plays are ordered by the stream.
unsafe impl Send for DeviceGraph {}

/// Gives blocks to the arena as long as it lives.
struct Arena<'a>(&'a DevicePool);

impl<'a> Arena<'a> {
    fn open(pool: &'a DevicePool) -> Self {
        pool.record(true);
        Self(pool)
    }
}

impl Drop for Arena<'_> {
    fn drop(&mut self) {
        self.0.record(false);
    }
}

impl Cuda {
    /// Records `work`, without doing it. It must neither upload nor download, and have been done before with these sizes.
    pub(in crate::kernels) fn capture<T>(&self, work: impl FnOnce() -> T) -> (T, DeviceGraph) {
        self.driver.bind();
        // Counts from here on, so that what fails gives its blocks back.
        let mut graph = DeviceGraph { driver: Arc::clone(&self.driver), pool: Arc::clone(&self.pool), executable: null_mut() };
        self.pool.keep_arena();
        let arena = Arena::open(&self.pool);
        // Relaxed: memory that the pool lacks may be allocated meanwhile.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is valid.
        must(check("begin a recording", unsafe { sys::cuStreamBeginCapture_v2(self.driver.stream(), mode) }));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let mut plan = null_mut();
        // SAFETY: `plan` outlives the call.
        let ended = check("end a recording", unsafe { sys::cuStreamEndCapture(self.driver.stream(), &raw mut plan) });
        drop(arena);
        let result = match result {
            Ok(result) => result,
            Err(cause) => std::panic::resume_unwind(cause),
        };
        must(ended);
        // SAFETY: the plan was just made, the executable's place outlives the call.
        must(check("prepare a recording", unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph.executable, plan, 0) }));
        // SAFETY: the executable does not need the plan that it was made from.
        must(check("drop a recording's plan", unsafe { sys::cuGraphDestroy(plan) }));
        (result, graph)
    }

    /// Puts recorded work on the stream.
    pub(in crate::kernels) fn replay(&self, graph: &DeviceGraph) {
        self.driver.bind();
        // SAFETY: the executable is valid, and so is the memory that it names: its arena lives as long as it.
        must(check("play a recording", unsafe { sys::cuGraphLaunch(graph.executable, self.driver.stream()) }));
    }
}

impl Drop for DeviceGraph {
    fn drop(&mut self) {
        if !self.executable.is_null() {
            self.driver.settle();
            // SAFETY: made by `capture`, and not running.
            let _: Result<(), CudaError> = check("drop a recording", unsafe { sys::cuGraphExecDestroy(self.executable) });
        }
        self.pool.leave_arena();
    }
}
