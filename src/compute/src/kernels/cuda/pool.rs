//! Device memory that is used again. A step asks for the same sizes over and over; after the first it calls no allocator.
//!
//! All work is on one stream, so a block that is given back may be handed out at once: what is asked later runs later.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::Kind;
use super::driver::{Driver, check};
use super::error::{CudaError, must};

/// Blocks are multiples of this many bytes; larger ones of [`LARGE`].
const SMALL: usize = 512;
const LARGE: usize = 128 << 10;

#[derive(Debug, Default)]
struct Blocks {
    /// Free blocks by size.
    free: BTreeMap<usize, Vec<u64>>,
    /// Free blocks that only recorded work may use.
    arena: BTreeMap<usize, Vec<u64>>,
    /// Whether work is being recorded.
    recording: bool,
    /// Recorded works that there are.
    recorded: usize,
    used: usize,
    cached: usize,
    peak: usize,
    cap: Option<usize>,
}

/// The pool of one device.
#[derive(Debug)]
pub(super) struct DevicePool {
    driver: Arc<Driver>,
    blocks: Mutex<Blocks>,
}

impl DevicePool {
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self { driver, blocks: Mutex::default() }
    }

    /// Bytes that the pool may hold, in use and cached.
    pub(super) fn set_cap(&self, bytes: usize) {
        self.lock().cap = Some(bytes);
    }

    /// The most bytes in use at once so far.
    pub(super) fn peak(&self) -> usize {
        self.lock().peak
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least `bytes`, and its size.
    fn take(&self, bytes: usize) -> Result<(u64, usize, bool), CudaError> {
        let size = if bytes < LARGE { bytes.max(1).next_multiple_of(SMALL) } else { bytes.next_multiple_of(LARGE) };
        let mut blocks = self.lock();
        let recording = blocks.recording;
        let taken = if recording { take_from(&mut blocks.arena, size) } else { None };
        let taken = taken.or_else(|| take_from(&mut blocks.free, size));
        let (block, size) = if let Some((block, size)) = taken {
            blocks.cached -= size;
            (block, size)
        } else {
            let cap = blocks.cap.unwrap_or(usize::MAX);
            if blocks.used + blocks.cached + size > cap {
                self.release(&mut blocks)?;
            }
            let refused = CudaError::OutOfMemory { asked: size, used: blocks.used, cap };
            if blocks.used + size > cap {
                return Err(refused);
            }
            let block = if let Some(block) = self.allocate(size) {
                block
            } else {
                self.release(&mut blocks)?;
                self.allocate(size).ok_or(refused)?
            };
            (block, size)
        };
        blocks.used += size;
        blocks.peak = blocks.peak.max(blocks.used);
        Ok((block, size, recording))
    }

    /// Whether blocks that are taken from now on belong to recorded work.
    pub(super) fn record(&self, recording: bool) {
        self.lock().recording = recording;
    }

    /// There is one recorded work more.
    pub(super) fn keep_arena(&self) {
        self.lock().recorded += 1;
    }

    /// There is one recorded work less. After the last one its blocks are free for all.
    pub(super) fn leave_arena(&self) {
        let mut blocks = self.lock();
        blocks.recorded -= 1;
        if blocks.recorded == 0 {
            for (size, list) in std::mem::take(&mut blocks.arena) {
                blocks.free.entry(size).or_default().extend(list);
            }
        }
    }

    fn allocate(&self, size: usize) -> Option<u64> {
        self.driver.bind();
        let mut block = 0;
        // SAFETY: `block` outlives the call.
        (unsafe { sys::cuMemAlloc_v2(&raw mut block, size) } == CUresult::CUDA_SUCCESS).then_some(block)
    }

    /// Gives all cached blocks back to the driver.
    fn release(&self, blocks: &mut Blocks) -> Result<(), CudaError> {
        self.driver.bind();
        for block in std::mem::take(&mut blocks.free).into_values().flatten() {
            // SAFETY: nothing refers to a cached block; the driver waits for work that may still use it.
            check("free memory", unsafe { sys::cuMemFree_v2(block) })?;
        }
        blocks.cached = blocks.arena.iter().map(|(size, list)| size * list.len()).sum();
        Ok(())
    }

    /// Gives all cached blocks back to the driver.
    pub(super) fn trim(&self) {
        must(self.release(&mut self.lock()));
    }
}

/// A free block of at least this size and not much more.
fn take_from(free: &mut BTreeMap<usize, Vec<u64>>, size: usize) -> Option<(u64, usize)> {
    let (&size, list) = free.range_mut(size..=size + size / 8).next()?;
    let block = list.pop();
    if list.is_empty() {
        free.remove(&size);
    }
    block.map(|block| (block, size))
}

impl Drop for DevicePool {
    fn drop(&mut self) {
        self.driver.settle();
        let _: Result<(), CudaError> = self.release(&mut self.lock());
    }
}

/// A block that returns to the pool when dropped.
#[derive(Debug)]
struct Block {
    pointer: u64,
    size: usize,
    /// Whether recorded work took it.
    recorded: bool,
    pool: Arc<DevicePool>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut blocks = self.pool.lock();
        blocks.used -= self.size;
        blocks.cached += self.size;
        let arena = self.recorded && (blocks.recorded > 0 || blocks.recording);
        let list = if arena { &mut blocks.arena } else { &mut blocks.free };
        list.entry(self.size).or_default().push(self.pointer);
    }
}

/// Values of one type on the device, or columns of a wider matrix of such values. Keeps its block from the pool as long as it
/// lives.
#[derive(Debug)]
pub struct Memory {
    pointer: u64,
    len: usize,
    kind: Kind,
    /// Columns of a matrix: how many, and from one row to the next.
    columns: Option<(usize, usize)>,
    block: Option<Arc<Block>>,
}

impl Memory {
    /// `len` values of any content.
    pub(super) fn new(pool: &Arc<DevicePool>, len: usize, kind: Kind) -> Self {
        if len == 0 {
            return Self { pointer: 0, len, kind, columns: None, block: None };
        }
        let (pointer, size, recorded) = must(pool.take(len * kind.bytes()));
        Self { pointer, len, kind, columns: None, block: Some(Arc::new(Block { pointer, size, recorded, pool: Arc::clone(pool) })) }
    }

    /// The values from `start` on, as a part of the same memory.
    pub(super) fn part(&self, start: usize, len: usize) -> Self {
        assert!(self.columns.is_none() && start + len <= self.len, "should lie within");
        Self { pointer: self.at(start), len, kind: self.kind, columns: None, block: self.block.clone() }
    }

    /// `width` columns from `start` on of this matrix with rows of `stride` values, as a part of the same memory.
    pub(super) fn columns(&self, start: usize, width: usize, stride: usize) -> Self {
        assert!(self.columns.is_none() && start + width <= stride && self.len.is_multiple_of(stride), "should lie within");
        let pointer = self.at(start);
        Self { pointer, len: self.len / stride * width, kind: self.kind, columns: Some((width, stride)), block: self.block.clone() }
    }

    /// If these are columns: (the first, how many, from one row to the next).
    pub(super) fn place(&self) -> Option<(usize, usize, usize)> {
        let ((width, stride), block) = (self.columns?, self.block.as_ref()?);
        Some(((self.pointer - block.pointer) as usize / self.kind.bytes(), width, stride))
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Their type.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Address of the first value; all follow without gaps.
    pub(super) fn pointer(&self) -> u64 {
        assert!(self.columns.is_none(), "should be whole rows");
        self.pointer
    }

    /// Address of the first value, and from one row of `width` values to the next.
    pub(super) fn rows(&self, width: usize) -> (u64, usize) {
        let (columns, stride) = self.columns.unwrap_or((width, width));
        assert_eq!(columns, width, "should be rows of this width");
        (self.pointer, stride)
    }

    /// Address of the value at `offset`.
    pub(super) fn at(&self, offset: usize) -> u64 {
        assert!(self.columns.is_none() && offset <= self.len, "should lie within");
        self.pointer + (offset * self.kind.bytes()) as u64
    }
}
