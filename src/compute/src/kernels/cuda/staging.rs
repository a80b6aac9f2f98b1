//! Copies by way of page-locked memory: those to the device then run beside the host's work, both at the bus's speed.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use rayon::prelude::*;

use super::driver::{Driver, check};
use super::error::{CudaError, must};
use super::timer::Event;

/// Bytes of each of the two halves. One is filled while the other is copied.
const HALF: usize = 16 << 20;

/// Bytes per task of a copy within the host.
const PIECE: usize = 512 << 10;

#[derive(Debug, Default)]
struct Halves {
    /// Address of both halves; 0 before the first upload.
    pointer: usize,
    /// Which half is being filled, and how far.
    current: usize,
    used: usize,
    /// When the copies from each half are done.
    done: [Option<Event>; 2],
}

/// Page-locked memory of one device's stream.
#[derive(Debug)]
pub(super) struct Staging {
    driver: Arc<Driver>,
    halves: Mutex<Halves>,
    /// Address of the memory for downloads; 0 before the first.
    back: Mutex<usize>,
    /// Places for what is sent that are not in use: address and bytes.
    places: Mutex<Vec<(usize, usize)>>,
}

impl Staging {
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self { driver, halves: Mutex::default(), back: Mutex::default(), places: Mutex::default() }
    }

    /// Puts a copy of `bytes` to `target` on the stream; `bytes` may change as soon as this returns.
    ///
    /// # Safety
    /// `target` has room for the bytes.
    pub(super) unsafe fn upload(&self, bytes: &[u8], target: u64) {
        let mut halves = self.halves.lock().unwrap_or_else(PoisonError::into_inner);
        self.driver.bind();
        if halves.pointer == 0 {
            halves.pointer = lock_host_memory(2 * HALF);
        }
        for (i, part) in bytes.chunks(HALF).enumerate() {
            if halves.used + part.len() > HALF {
                let current = halves.current;
                halves.done[current] = Some(Event::now(&self.driver));
                halves.current = 1 - current;
                halves.used = 0;
                if let Some(done) = halves.done[1 - current].take() {
                    done.wait();
                }
            }
            let source = (halves.pointer + halves.current * HALF + halves.used) as *mut u8;
            // SAFETY: this part of the half is not in use: copies from it are done, and the lock is held.
            let place = unsafe { std::slice::from_raw_parts_mut(source, part.len()) };
            place.par_chunks_mut(PIECE).zip(part.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
            halves.used += part.len().next_multiple_of(64);
            // SAFETY: as the caller vouches; the source stays as it is until its half's event has passed.
            let result = unsafe { sys::cuMemcpyHtoDAsync_v2(target + (i * HALF) as u64, source.cast(), part.len(), self.driver.stream()) };
            must(check("copy to the device", result));
        }
    }
}

impl Staging {
    /// Copies from the device to places that follow each other there, and waits for it. While one half goes to its places the next is on
    /// its way.
    ///
    /// # Safety
    /// `source` has as many bytes as all of them.
    pub(super) unsafe fn download(&self, source: u64, places: &mut [&mut [u8]]) {
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        self.driver.bind();
        if *back == 0 {
            *back = lock_host_memory(2 * HALF);
        }
        let mut loads: Vec<Load<'_>> = Vec::new();
        for piece in places.iter_mut().flat_map(|place| place.chunks_mut(PIECE)) {
            match loads.last_mut() {
                Some(load) if load.bytes + piece.len() <= HALF => load.push(piece),
                _ => loads.push(Load { bytes: piece.len(), pieces: vec![(0, piece)] }),
            }
        }
        let (mut arriving, mut offset) = (None, 0);
        for (i, load) in loads.into_iter().enumerate() {
            let half = *back + i % 2 * HALF;
            // SAFETY: as the caller vouches; the half has room, and what was in it has gone to its places.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(half as *mut c_void, source + offset, load.bytes, self.driver.stream()) };
            must(check("copy to the host", result));
            offset += load.bytes as u64;
            let before = arriving.replace((half, Event::now(&self.driver), load));
            before.into_iter().for_each(|(half, event, load)| load.settle(half, &event));
        }
        arriving.into_iter().for_each(|(half, event, load)| load.settle(half, &event));
    }
}

impl Staging {
    /// Puts a copy of `count` f32 values to the host on the stream.
    ///
    /// # Safety
    /// `source` has as many values.
    pub(super) unsafe fn send(staging: &Arc<Self>, source: u64, count: usize) -> Arrival {
        let bytes = count * size_of::<f32>();
        let mut places = staging.places.lock().unwrap_or_else(PoisonError::into_inner);
        let free = places.iter().position(|(_, room)| *room >= bytes).map(|at| places.swap_remove(at));
        drop(places);
        staging.driver.bind();
        let room = bytes.max(1).next_multiple_of(PAGE);
        let place = free.unwrap_or_else(|| (lock_host_memory(room), room));
        if bytes > 0 {
            // SAFETY: as the caller vouches; the place has room and is nobody else's.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(place.0 as *mut c_void, source, bytes, staging.driver.stream()) };
            must(check("copy to the host", result));
        }
        Arrival { staging: Arc::clone(staging), place, count, arrived: Event::now(&staging.driver) }
    }
}

/// Bytes that places for what is sent are multiples of.
const PAGE: usize = 4 << 10;

/// Values on their way to the host.
#[derive(Debug)]
pub struct Arrival {
    staging: Arc<Staging>,
    place: (usize, usize),
    count: usize,
    arrived: Event,
}

impl Arrival {
    /// The values; waits for them.
    pub(in crate::kernels) fn receive(self) -> Vec<f32> {
        self.arrived.wait();
        // SAFETY: the copy is done; the place is aligned and holds as many values.
        unsafe { std::slice::from_raw_parts(self.place.0 as *const f32, self.count) }.to_vec()
    }
}

impl Drop for Arrival {
    /// The place is used again for what is sent later, which comes after this on the stream.
    fn drop(&mut self) {
        self.staging.places.lock().unwrap_or_else(PoisonError::into_inner).push(self.place);
    }
}

/// What one half brings: pieces with their distance from its beginning.
struct Load<'a> {
    bytes: usize,
    pieces: Vec<(usize, &'a mut [u8])>,
}

impl<'a> Load<'a> {
    fn push(&mut self, piece: &'a mut [u8]) {
        let first = self.bytes;
        self.bytes += piece.len();
        self.pieces.push((first, piece));
    }

    /// Brings the pieces to their places, once the half is there.
    fn settle(self, half: usize, arrived: &Event) {
        arrived.wait();
        // SAFETY: the copy is done; it filled as many bytes.
        let half = unsafe { std::slice::from_raw_parts(half as *const u8, self.bytes) };
        self.pieces.into_par_iter().for_each(|(first, place)| place.copy_from_slice(&half[first..first + place.len()]));
    }
}

/// Address of page-locked memory.
fn lock_host_memory(bytes: usize) -> usize {
    let mut pointer = std::ptr::null_mut();
    // SAFETY: `pointer` outlives the call.
    must(check("lock host memory", unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) }));
    pointer as usize
}

impl Drop for Staging {
    fn drop(&mut self) {
        let pointer = self.halves.get_mut().unwrap_or_else(PoisonError::into_inner).pointer;
        let back = *self.back.get_mut().unwrap_or_else(PoisonError::into_inner);
        let places = std::mem::take(self.places.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.driver.settle();
        for pointer in places.into_iter().map(|(pointer, _)| pointer).chain([pointer, back]).filter(|pointer| *pointer != 0) {
            // SAFETY: allocated by `lock_host_memory`, and no copy is under way.
            let _: Result<(), CudaError> = check("free host memory", unsafe { sys::cuMemFreeHost(pointer as *mut c_void) });
        }
    }
}
