//! A matrix that several tasks write, each its own part.

use std::marker::PhantomData;

/// A pointer to values that tasks write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    data: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Shared` is only a pointer and a length; `Shared::at` makes its callers keep parts disjoint.
unsafe impl Send for Shared<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Lends `data` to tasks.
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// The pointer to value `index`; `extent` values from there must exist (checked). Writing through it is up to the
    /// caller, who keeps tasks disjoint.
    pub(crate) fn at(&self, index: usize, extent: usize) -> *mut f32 {
        assert!(index + extent <= self.len, "should lie within the buffer");
        self.data.wrapping_add(index)
    }
}
