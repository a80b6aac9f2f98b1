//! Times on the device, between events on the stream.

use std::collections::BTreeMap;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent};

use super::driver::{Driver, check};
use super::error::must;

/// A point on the stream.
#[derive(Debug)]
pub struct Timer {
    driver: Arc<Driver>,
    event: Event,
}

impl Timer {
    pub(super) fn now(driver: &Arc<Driver>) -> Self {
        Self { driver: Arc::clone(driver), event: Event::now(driver) }
    }

    /// Milliseconds from this point to a later one; waits for both.
    pub fn milliseconds_to(&self, later: &Self) -> f32 {
        self.driver.synchronize();
        self.event.milliseconds_to(&later.event)
    }
}

#[derive(Debug)]
pub(super) struct Event(CUevent);

// SAFETY: the driver's handle may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(driver: &Driver) -> Self {
        driver.bind();
        let mut event = null_mut();
        // Who waits for it sleeps: the processor is needed for the next micro-batch.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: `event` outlives the call.
        must(check("make an event", unsafe { sys::cuEventCreate(&raw mut event, flags) }));
        Self(event)
    }

    pub(super) fn now(driver: &Driver) -> Self {
        let event = Self::new(driver);
        event.record(driver);
        event
    }

    fn record(&self, driver: &Driver) {
        driver.bind();
        // SAFETY: event and stream are valid.
        must(check("record an event", unsafe { sys::cuEventRecord(self.0, driver.stream()) }));
    }

    /// Waits until the stream has passed it.
    pub(super) fn wait(&self) {
        // SAFETY: the event was recorded.
        must(check("wait for a copy", unsafe { sys::cuEventSynchronize(self.0) }));
    }

    fn milliseconds_to(&self, later: &Self) -> f32 {
        let mut milliseconds = 0.0;
        // SAFETY: both events were recorded and have passed.
        must(check("read a time", unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.0, later.0) }));
        milliseconds
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `now`, used no more.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// What ran, between which events.
#[derive(Debug)]
pub(super) struct Profile {
    done: Vec<(String, Event, Event)>,
    /// Made before: the host would else fall behind the device.
    spare: Vec<Event>,
}

/// Events that are made before a profile.
const SPARE: usize = 8192;

impl Profile {
    pub(super) fn new(driver: &Driver) -> Self {
        Self { done: Vec::with_capacity(SPARE / 2), spare: (0..SPARE).map(|_| Event::new(driver)).collect() }
    }

    pub(super) fn now(&mut self, driver: &Driver) -> Event {
        let event = self.spare.pop().unwrap_or_else(|| Event::new(driver));
        event.record(driver);
        event
    }

    pub(super) fn add(&mut self, name: String, before: Event, after: Event) {
        self.done.push((name, before, after));
    }

    /// (name, calls, milliseconds), longest first. The stream must have passed all events.
    pub(super) fn sums(self) -> Vec<(String, usize, f64)> {
        let mut sums: BTreeMap<String, (usize, f64)> = BTreeMap::new();
        for (name, before, after) in self.done {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(before.milliseconds_to(&after)));
        }
        let mut sums: Vec<_> = sums.into_iter().map(|(name, (calls, time))| (name, calls, time)).collect();
        sums.sort_by(|a, b| b.2.total_cmp(&a.2));
        sums
    }
}
