//! Who is reconciled next: a queue in the manner of client-go's, where each job waits at most once, first come is first served, and what a change
//! asks for goes before what time alone asks for.
//!
//! Why not kube's own (`kube::runtime::controller::applier`): what has to wait for a free worker is held there in a hash set that is searched in the
//! set's order. Under load some jobs are overtaken again and again: with 2,000 jobs and 50 starts a second the unlucky ones waited 40 seconds where
//! the average was two (`docs/benchmarks.md`).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// One in so many turns belongs to what time asks for, however many changes wait. A job that starts is asked for by some three changes (its pod, its Job,
/// its own status) and once by its trainer: with one turn in four, that would never wait.
const TURNS: u64 = 16;

/// What to do with a job after its reconciliation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something changes.
    AwaitChange,
    /// Look at it again after this pause, or earlier if something changes.
    After(Duration),
}

/// Why a job is to be reconciled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Time has passed, a trainer has made progress, or everything was listed anew.
    Routine,
    /// Something that the job depends on has changed.
    Change,
}

/// What is known of a job that waits or is worked on.
#[derive(Debug, Default)]
struct Entry {
    /// Its place among those that are ready.
    ready: Option<(Urgency, u64)>,
    /// When it will be ready.
    timer: Option<(Instant, u64, Urgency)>,
    /// Whether a worker has it.
    running: bool,
    /// It became ready while a worker had it.
    again: Option<Urgency>,
}

/// A place in a line: its ticket, since when, and whose. A place whose ticket its job does not hold any more is passed over.
type Place<K> = (u64, Instant, K);

/// The queue. Times are given, never taken: it does nothing by itself.
#[derive(Debug)]
pub struct WorkQueue<K> {
    entries: HashMap<K, Entry>,
    changes: VecDeque<Place<K>>,
    routine: VecDeque<Place<K>>,
    timers: BTreeMap<(Instant, u64), K>,
    tickets: u64,
    taken: u64,
    ready: usize,
}

impl<K> Default for WorkQueue<K> {
    fn default() -> Self {
        Self { entries: HashMap::new(), changes: VecDeque::new(), routine: VecDeque::new(), timers: BTreeMap::new(), tickets: 0, taken: 0, ready: 0 }
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    /// Asks for `key` at `due`. The earliest time that was asked for counts, and the highest urgency; a job that is ready stays where it is in its line,
    /// unless that is the routine's and something has changed.
    pub fn ask(&mut self, key: K, urgency: Urgency, due: Instant, now: Instant) {
        let entry = self.entries.entry(key.clone()).or_default();
        if entry.ready.is_some() {
            self.make_ready(key, urgency, now);
            return;
        }
        if let Some((at, ticket, before)) = entry.timer {
            if at <= due {
                entry.timer = Some((at, ticket, before.max(urgency)));
                return;
            }
            // A change does not become routine because time asks for the job, too.
            self.timers.remove(&(at, ticket));
        }
        let urgency = entry.timer.map_or(urgency, |(_, _, before)| before.max(urgency));
        self.tickets += 1;
        entry.timer = Some((due, self.tickets, urgency));
        self.timers.insert((due, self.tickets), key);
    }

    /// Takes the next job that is ready and that no worker has, with the time that it has waited since it was ready.
    pub fn take(&mut self, now: Instant) -> Option<(K, Duration)> {
        self.expire(now);
        self.taken += 1;
        let lines = if self.taken.is_multiple_of(TURNS) { [&mut self.routine, &mut self.changes] } else { [&mut self.changes, &mut self.routine] };
        for line in lines {
            while let Some((ticket, since, key)) = line.pop_front() {
                let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.ready.is_some_and(|(_, current)| current == ticket)) else { continue };
                entry.ready = None;
                entry.running = true;
                self.ready -= 1;
                return Some((key, now.saturating_duration_since(since)));
            }
        }
        None
    }

    /// Gives back a job that was taken.
    pub fn done(&mut self, key: &K, next: Next, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.running = false;
        if let Some(urgency) = entry.again.take() {
            self.make_ready(key.clone(), urgency, now);
        } else if let Next::After(pause) = next {
            self.ask(key.clone(), Urgency::Routine, now + pause, now);
        } else if entry.timer.is_none() {
            self.entries.remove(key);
        }
    }

    /// When the next job becomes ready by the passing of time.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first_key_value().map(|((at, _), _)| *at)
    }

    /// How many are ready and wait for a worker.
    pub fn ready(&self) -> usize {
        self.ready
    }

    /// Those whose time has come become ready, in the order of their times.
    fn expire(&mut self, now: Instant) {
        while let Some(first) = self.timers.first_entry().filter(|first| first.key().0 <= now) {
            let at = first.key().0;
            let key = first.remove();
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            let Some((_, _, urgency)) = entry.timer.take() else { continue };
            if entry.running {
                entry.again = entry.again.max(Some(urgency));
            } else {
                self.make_ready(key, urgency, at);
            }
        }
    }

    /// Puts a job at the end of its line. One that is ready waits once: it changes lines if it is urgent now and was not.
    fn make_ready(&mut self, key: K, urgency: Urgency, since: Instant) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        match entry.ready {
            Some((before, _)) if before >= urgency => return,
            Some(_) => {}
            None => self.ready += 1,
        }
        self.tickets += 1;
        entry.ready = Some((urgency, self.tickets));
        let line = if urgency == Urgency::Change { &mut self.changes } else { &mut self.routine };
        line.push_back((self.tickets, since, key));
    }
}

#[cfg(test)]
mod tests {
    use super::Urgency::{Change, Routine};
    use super::*;

    struct Bench {
        queue: WorkQueue<&'static str>,
        start: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { queue: WorkQueue::default(), start: Instant::now() }
        }

        fn at(&self, millis: u64) -> Instant {
            self.start + Duration::from_millis(millis)
        }

        fn ask(&mut self, key: &'static str, urgency: Urgency, due: u64, now: u64) {
            let (due, now) = (self.at(due), self.at(now));
            self.queue.ask(key, urgency, due, now);
        }

        fn take(&mut self, now: u64) -> Option<&'static str> {
            let now = self.at(now);
            self.queue.take(now).map(|(key, _)| key)
        }

        fn done(&mut self, key: &'static str, next: Next, now: u64) {
            let now = self.at(now);
            self.queue.done(&key, next, now);
        }
    }

    #[test]
    fn first_come_is_first_served_and_each_waits_once() {
        let mut bench = Bench::new();
        for (key, due) in [("a", 50), ("b", 51), ("a", 52), ("c", 49)] {
            bench.ask(key, Change, due, 0);
        }
        assert_eq!(bench.take(48), None, "it is not time yet");
        assert_eq!(bench.queue.next_timer(), Some(bench.at(49)));
        assert_eq!([bench.take(60), bench.take(60), bench.take(60), bench.take(60)], [Some("c"), Some("a"), Some("b"), None]);
    }

    #[test]
    fn nobody_is_overtaken_forever() {
        // A worker that is slower than what is asked for; every job is asked for again and again.
        let keys: Vec<&'static str> = (0..100).map(|number| &*Box::leak(number.to_string().into_boxed_str())).collect();
        let mut bench = Bench::new();
        let mut last_seen: HashMap<&str, u64> = HashMap::new();
        let mut longest = 0;
        for turn in 0..2_000_u64 {
            for key in &keys {
                bench.ask(key, Change, turn, turn);
            }
            let key = bench.take(turn).unwrap();
            longest = longest.max(turn - last_seen.insert(key, turn).unwrap_or(0));
            bench.done(key, Next::After(Duration::ZERO), turn);
        }
        assert_eq!(last_seen.len(), 100);
        assert!(longest <= 101, "one waited {longest} turns");
    }

    #[test]
    fn changes_go_before_routine_but_routine_has_its_turns() {
        let mut bench = Bench::new();
        for key in ["r1", "r2"] {
            bench.ask(key, Routine, 0, 0);
        }
        let changes = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9", "c10", "c11", "c12", "c13", "c14", "c15", "c16", "c17"];
        for key in changes {
            bench.ask(key, Change, 0, 0);
        }
        let order: Vec<_> = std::iter::from_fn(|| bench.take(0)).collect();
        assert_eq!(order, [&changes[..15], &["r1"], &changes[15..], &["r2"]].concat());
    }

    #[test]
    fn a_change_makes_a_waiting_job_urgent() {
        let mut bench = Bench::new();
        bench.ask("a", Routine, 0, 0);
        bench.ask("b", Routine, 0, 0);
        bench.queue.expire(bench.at(0));
        assert_eq!(bench.queue.ready(), 2);
        bench.ask("b", Change, 51, 1);
        assert_eq!(bench.queue.ready(), 2, "it waits once");
        assert_eq!([bench.take(1), bench.take(1), bench.take(1)], [Some("b"), Some("a"), None]);
        assert_eq!(bench.queue.ready(), 0);
    }

    #[test]
    fn a_timer_gives_way_to_an_earlier_request_and_keeps_its_urgency() {
        let mut bench = Bench::new();
        bench.ask("a", Routine, 30_000, 0);
        bench.ask("a", Change, 150, 100);
        assert_eq!(bench.queue.next_timer(), Some(bench.at(150)));
        bench.ask("a", Change, 180, 130);
        assert_eq!(bench.queue.next_timer(), Some(bench.at(150)), "later requests do not put it off");
        assert_eq!(bench.take(150), Some("a"));
        bench.done("a", Next::After(Duration::from_millis(40)), 160);
        assert_eq!(bench.queue.next_timer(), Some(bench.at(200)));
        assert_eq!(bench.take(199), None);
        assert_eq!(bench.take(200), Some("a"));
        bench.done("a", Next::AwaitChange, 210);
        assert!(bench.queue.entries.is_empty() && bench.queue.timers.is_empty(), "nothing is kept of a job that waits for nothing");
    }

    #[test]
    fn a_job_is_never_taken_twice_and_what_was_asked_meanwhile_is_not_lost() {
        let mut bench = Bench::new();
        bench.ask("a", Change, 0, 0);
        assert_eq!(bench.take(0), Some("a"));
        bench.ask("a", Change, 5, 1);
        assert_eq!(bench.take(10), None, "a worker has it");
        bench.done("a", Next::After(Duration::from_mins(1)), 20);
        assert_eq!(bench.take(20), Some("a"));
        bench.ask("a", Change, 70, 21);
        bench.done("a", Next::AwaitChange, 30);
        assert_eq!(bench.take(69), None);
        assert_eq!(bench.take(70), Some("a"), "a request whose time comes after the end of the work");
    }

    #[test]
    fn what_is_asked_for_twice_while_a_worker_has_it_waits_once() {
        let mut bench = Bench::new();
        bench.ask("a", Routine, 0, 0);
        assert_eq!(bench.take(0), Some("a"));
        bench.ask("a", Routine, 5, 1);
        assert_eq!(bench.take(10), None);
        bench.ask("a", Change, 70, 20);
        bench.done("a", Next::AwaitChange, 30);
        bench.ask("b", Change, 60, 30);
        bench.queue.expire(bench.at(70));
        assert_eq!(bench.queue.ready(), 2);
        assert_eq!([bench.take(70), bench.take(70), bench.take(70)], [Some("b"), Some("a"), None], "the change counts, and its time");
        assert_eq!(bench.queue.ready(), 0);
    }

    #[test]
    fn the_time_in_line_is_told() {
        let mut bench = Bench::new();
        bench.ask("a", Change, 50, 0);
        bench.queue.expire(bench.at(50));
        assert_eq!(bench.queue.take(bench.at(80)), Some(("a", Duration::from_millis(30))));
    }
}
