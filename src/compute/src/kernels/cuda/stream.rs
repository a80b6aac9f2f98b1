//! Weights that pass through the device layer by layer: while one layer is computed with, the next is copied to the other of two places, on
//! a stream of its own and by way of page-locked memory.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use cudarc::driver::sys::{self, CUevent, CUstream};
use rayon::prelude::*;

use super::driver::{Driver, arguments, check};
use super::encode::Matrix;
use super::error::must;
use super::{BLOCK, Cuda, Kind, Memory, any, tag};
use crate::kernels::LayerSource;

/// Bytes of each of the two page-locked buffers.
const STAGING: usize = 32 << 20;
/// Bytes that one thread copies at a time.
const PIECE: usize = 1 << 20;

/// Called with each layer's index and matrices.
pub(super) type OnLayer<'a, E> = &'a mut dyn FnMut(usize, &[Matrix<'_>]) -> Result<(), E>;

/// A driver's object that is destroyed with its holder.
struct Event(CUevent);
struct Stream(CUstream);
struct Locked(*mut u8);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}
// SAFETY: as above.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: plain memory.
unsafe impl Send for Locked {}

impl Event {
    fn new(driver: &Driver) -> Self {
        driver.bind();
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` outlives the call; 2: without timing.
        must(check("make an event", unsafe { sys::cuEventCreate(&raw mut event, 2) }));
        Self(event)
    }

    fn record(&self, driver: &Driver, stream: CUstream) {
        driver.bind();
        // SAFETY: both are valid.
        must(check("record an event", unsafe { sys::cuEventRecord(self.0, stream) }));
    }

    /// Later work on `stream` waits for it.
    fn holds(&self, driver: &Driver, stream: CUstream) {
        driver.bind();
        // SAFETY: both are valid.
        must(check("wait for an event", unsafe { sys::cuStreamWaitEvent(stream, self.0, 0) }));
    }

    /// Waits for it here.
    fn wait(&self, driver: &Driver) {
        driver.bind();
        // SAFETY: the event is valid.
        must(check("copy to the device", unsafe { sys::cuEventSynchronize(self.0) }));
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: used no more.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: used no more; the driver finishes what is on it first.
        let _ = unsafe { sys::cuStreamSynchronize(self.0) };
        // SAFETY: as above.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: allocated by the driver; the copies from it are done.
        let _ = unsafe { sys::cuMemFreeHost(self.0.cast()) };
    }
}

/// Copies by way of page-locked memory.
struct Uploader<'a> {
    driver: &'a Driver,
    stream: &'a Stream,
    staging: [(Locked, Event); 2],
    turn: usize,
}

impl<'a> Uploader<'a> {
    fn new(driver: &'a Driver, stream: &'a Stream) -> Self {
        let staging = [(); 2].map(|()| {
            driver.bind();
            let mut place = std::ptr::null_mut();
            // SAFETY: `place` outlives the call.
            must(check("lock memory", unsafe { sys::cuMemAllocHost_v2(&raw mut place, STAGING) }));
            (Locked(place.cast()), Event::new(driver))
        });
        Self { driver, stream, staging, turn: 0 }
    }

    /// Puts the bytes at `to` on the device.
    fn copy(&mut self, bytes: &[u8], to: u64) {
        for (index, piece) in bytes.chunks(STAGING).enumerate() {
            let (place, event) = &self.staging[self.turn];
            self.turn = 1 - self.turn;
            event.wait(self.driver);
            // SAFETY: as large as STAGING, and the last copy from it is done.
            let staged = unsafe { std::slice::from_raw_parts_mut(place.0, piece.len()) };
            staged.par_chunks_mut(PIECE).zip(piece.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
            let target = to + (index * STAGING) as u64;
            self.driver.bind();
            // SAFETY: the caller's target has room; the staged bytes stay until the event.
            must(check("copy to the device", unsafe { sys::cuMemcpyHtoDAsync_v2(target, place.0.cast(), piece.len(), self.stream.0) }));
            event.record(self.driver, self.stream.0);
        }
    }
}

impl Drop for Uploader<'_> {
    /// The staging memory must outlive the copies from it.
    fn drop(&mut self) {
        // SAFETY: the stream is valid.
        let _ = unsafe { sys::cuStreamSynchronize(self.stream.0) };
    }
}

/// One of the two places: memory of each matrix, and the events of its being free and filled.
struct Place {
    memories: Vec<Memory>,
    free: Event,
    filled: Event,
}

impl Cuda {
    /// Calls `work(index, matrices)` for each layer in order, with its matrices in the device's precision. `work` only puts work on the
    /// engine's stream; the memory of the matrices is used again after it.
    ///
    /// # Errors
    /// What `work` returns.
    pub(in crate::kernels) fn stream_layers<E>(&self, layers: usize, source: &dyn LayerSource, work: OnLayer<'_, E>) -> Result<(), E> {
        if layers == 0 {
            return Ok(());
        }
        let (driver, precision) = (&*self.driver, self.precision);
        driver.bind();
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` outlives the call; 1: does not wait for the default stream.
        must(check("make a stream", unsafe { sys::cuStreamCreate(&raw mut stream, 1) }));
        let stream = Stream(stream);
        let first = source.matrices(0);
        let places: Vec<Place> = (0..2.min(layers))
            .map(|_| {
                let memories = first.iter().map(|m| self.memory_of(m.outputs() * m.inputs, m.kind)).collect();
                let place = Place { memories, free: Event::new(driver), filled: Event::new(driver) };
                place.free.record(driver, driver.stream());
                place
            })
            .collect();
        let (free, frees): (SyncSender<usize>, Receiver<usize>) = sync_channel(2);
        let (filled, fills): (SyncSender<usize>, Receiver<usize>) = sync_channel(2);
        for at in 0..places.len() {
            let _ = free.send(at);
        }
        let result = std::thread::scope(|scope| {
            let copier = scope.spawn(|| {
                let filled = filled;
                let frees = frees;
                let mut uploader = Uploader::new(driver, &stream);
                for index in 0..layers {
                    // The other side has stopped.
                    let Ok(at) = frees.recv() else { return };
                    let place = &places[at];
                    place.free.holds(driver, stream.0);
                    for (matrix, memory) in source.matrices(index).iter().zip(&place.memories) {
                        let parts: Vec<&[u8]> = matrix.parts.iter().filter_map(|part| Some(part.stored()?.1)).collect();
                        let bytes: usize = parts.iter().map(|part| part.len()).sum();
                        assert!(bytes == memory.len() * memory.kind().bytes() && matrix.kind == memory.kind(), "should be alike in every layer");
                        let mut offset = 0;
                        for part in parts {
                            uploader.copy(part, memory.pointer() + offset);
                            offset += part.len() as u64;
                        }
                    }
                    place.filled.record(driver, stream.0);
                    source.done(index);
                    source.will_need(index + 2);
                    if filled.send(at).is_err() {
                        return;
                    }
                }
            });
            let mut result = Ok(());
            for index in 0..layers {
                let Ok(at) = fills.recv() else { break };
                let place = &places[at];
                place.filled.holds(driver, driver.stream());
                let converted: Vec<Option<Memory>> = place.memories.iter().map(|memory| self.converted(memory, precision)).collect();
                let matrices: Vec<Matrix<'_>> = (first.iter().zip(&place.memories).zip(&converted))
                    .map(|((shape, memory), converted)| Matrix {
                        pointer: converted.as_ref().map_or(memory.pointer(), Memory::pointer),
                        kind: precision,
                        outputs: shape.outputs(),
                        inputs: shape.inputs,
                        owner: std::marker::PhantomData,
                    })
                    .collect();
                result = work(index, &matrices);
                place.free.record(driver, driver.stream());
                if result.is_err() {
                    break;
                }
                let _ = free.send(at);
            }
            drop(free);
            drop(fills);
            if let Err(cause) = copier.join() {
                std::panic::resume_unwind(cause);
            }
            result
        });
        // The places go back to the pool, whose blocks the device's stream alone may use.
        // SAFETY: the stream is valid.
        must(check("copy to the device", unsafe { sys::cuStreamSynchronize(stream.0) }));
        result
    }

    /// The values in another type: in place where both are of one size, else in memory of their own. `None`: where they were.
    fn converted(&self, memory: &Memory, precision: Kind) -> Option<Memory> {
        if memory.kind() == precision {
            return None;
        }
        let own = (memory.kind().bytes() != precision.bytes()).then(|| self.memory_of(memory.len(), precision));
        let to = own.as_ref().map_or(memory.pointer(), Memory::pointer);
        let (from, count, tag) = (memory.pointer(), memory.len() as i64, tag(memory.kind()));
        let grid = (memory.len().div_ceil(BLOCK), 1, 1);
        // SAFETY: both have `count` values; in place each thread reads its value before it writes it.
        unsafe { self.driver.launch(("convert", any(precision)), grid, BLOCK, 0, arguments![to, from, count, tag]) };
        own
    }
}
