//! Where the time of an attempt went.

use std::time::{Duration, Instant};

/// The stages of an attempt with their times. Several that do the same thing count as one.
#[derive(Debug, Clone, Default)]
pub struct Stages {
    ended: Vec<(&'static str, Duration)>,
    open: Option<(&'static str, Instant)>,
}

impl Stages {
    /// A stage begins; the one before it ends.
    pub fn begin(&mut self, what: &'static str) {
        self.end();
        self.open = Some((what, Instant::now()));
    }

    fn end(&mut self) {
        let Some((what, began)) = self.open.take() else { return };
        match self.ended.iter_mut().find(|(known, _)| *known == what) {
            Some((_, time)) => *time += began.elapsed(),
            None => self.ended.push((what, began.elapsed())),
        }
    }

    /// Every stage so far with its time, in the order of their beginnings.
    pub fn times(&self) -> Vec<(&'static str, Duration)> {
        let mut all = self.clone();
        all.end();
        all.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_twice_is_one_stage() {
        let mut stages = Stages::default();
        for what in ["fetch", "train", "fetch"] {
            stages.begin(what);
        }
        let names: Vec<&str> = stages.times().into_iter().map(|(what, _)| what).collect();
        assert_eq!(names, ["fetch", "train"]);
        assert!(Stages::default().times().is_empty());
    }
}
