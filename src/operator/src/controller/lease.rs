//! Leader election by a `coordination.k8s.io` Lease.
//!
//! # Expected flow
//! [`Elector::acquire`] waits until this process holds the Lease and returns a [`Leadership`]; [`Elector::hold`] renews it and returns only when
//! it is lost. Then the process must end: [`Leadership::is_valid`] is checked before every write, so that a process that was frozen past its
//! deadline writes nothing on waking up.
//!
//! # Guarantees
//! - Every change of the Lease is a replace at a known resource version, so of two candidates that saw the same expired Lease one is refused.
//! - Another holder's expiry is judged by this process's own monotonic clock since the record last changed, never by the times in the record:
//!   clocks of two nodes need not agree.
//! - `lease duration > renew deadline > retry period`: the holder stops before anybody else starts.
//!
//! # Why no crate
//! `kube-leader-election` 0.44 needs kube 4 and `kubert` 0.25 kube 1. `kube-lease-manager` 0.13 fits kube 5, but it takes an expired Lease by a
//! patch without a resource version (two candidates can both believe that they hold it) and compares the record's times with the local clock.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt as _};
use tokio::time::Instant;

/// Why leadership could not be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The Lease could not be renewed in time, or another process holds it now.
    #[error("failed to keep the lease {name:?}: {why}")]
    Lost {
        /// Name of the Lease.
        name: String,
        /// Who or what took it.
        why: String,
    },
    /// The intervals contradict each other.
    #[error("failed to accept the lease intervals: duration {duration:?} must exceed the renew deadline {renew:?}, and that the retry period {retry:?}")]
    Intervals {
        /// Lease duration.
        duration: Duration,
        /// Renew deadline.
        renew: Duration,
        /// Retry period.
        retry: Duration,
    },
}

/// How long leadership lasts and how often it is renewed.
#[derive(Debug, Clone, Copy)]
pub struct Intervals {
    /// How long others wait after the last renewal that they saw.
    pub duration: Duration,
    /// How long the holder goes on without a successful renewal.
    pub renew_deadline: Duration,
    /// Time between two attempts.
    pub retry: Duration,
}

impl Intervals {
    /// Checks `duration > renew_deadline > retry > 0`.
    pub fn checked(self) -> Result<Self, LeaseError> {
        if self.duration > self.renew_deadline && self.renew_deadline > self.retry && !self.retry.is_zero() && self.duration.as_secs() >= 1 {
            Ok(self)
        } else {
            Err(LeaseError::Intervals { duration: self.duration, renew: self.renew_deadline, retry: self.retry })
        }
    }
}

impl Default for Intervals {
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), renew_deadline: Duration::from_secs(10), retry: Duration::from_secs(2) }
    }
}

/// Until when this process may write. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Leadership {
    /// `None`: leader election is off, always valid.
    valid_until: Option<Arc<Mutex<Instant>>>,
}

impl Leadership {
    /// Leadership without an election.
    pub fn without_election() -> Self {
        Self::default()
    }

    fn until(instant: Instant) -> Self {
        Self { valid_until: Some(Arc::new(Mutex::new(instant))) }
    }

    fn extend(&self, instant: Instant) {
        if let Some(valid_until) = &self.valid_until {
            *valid_until.lock().unwrap_or_else(PoisonError::into_inner) = instant;
        }
    }

    /// Whether the last successful renewal is recent enough to write.
    pub fn is_valid(&self) -> bool {
        self.valid_until.as_ref().is_none_or(|until| Instant::now() < *until.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What this process last saw of the Lease, and when it first saw that.
#[derive(Debug, Clone, Default)]
struct Observed {
    /// Empty when the Lease has not been seen.
    resource_version: String,
    spec: LeaseSpec,
    since: Option<Instant>,
    /// The Lease as the API server returned it to our last write, until the next one is tried: the holder renews it without looking first.
    ours: Option<Lease>,
}

/// What one attempt has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// This process holds the Lease since the attempt began, at that time.
    Held(Instant),
    /// Another process holds it.
    Others,
    /// It changed between our look and our write. By another process, or by an earlier write of ours whose answer did not come in time: only
    /// another look can tell.
    Contended,
}

/// What to do about the Lease now.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Create,
    Take,
    Renew,
    Wait,
}

/// The pure core: `lease` is the live object, `observed.since` is when its record was last seen to change.
fn decide(lease: Option<&Lease>, observed: &Observed, identity: &str, now: Instant) -> Decision {
    let Some(spec) = lease.map(|lease| lease.spec.clone().unwrap_or_default()) else { return Decision::Create };
    match spec.holder_identity.as_deref() {
        None | Some("") => Decision::Take,
        Some(holder) if holder == identity => Decision::Renew,
        Some(_) => {
            let duration = Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0));
            match observed.since {
                Some(since) if now.duration_since(since) > duration => Decision::Take,
                _ => Decision::Wait,
            }
        }
    }
}

/// Competes for one Lease.
#[derive(Debug, Clone)]
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    intervals: Intervals,
}

impl Elector {
    /// `client` must be one without retries of its own (`Config::default_retry = false`): a renewal that hangs is a lost one.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str, intervals: Intervals) -> Result<Self, LeaseError> {
        Ok(Self { api: Api::namespaced(client, namespace), name: name.to_owned(), identity: identity.to_owned(), intervals: intervals.checked()? })
    }

    /// Waits until this process holds the Lease.
    pub async fn acquire(&self) -> Leadership {
        let mut observed = Observed::default();
        loop {
            match self.attempt(&mut observed).await {
                Ok(Attempt::Held(since)) => {
                    tracing::info!(lease = %self.name, identity = %self.identity, "holds the leader lease");
                    return Leadership::until(since + self.intervals.renew_deadline);
                }
                Ok(Attempt::Others | Attempt::Contended) => {}
                Err(error) => tracing::warn!(lease = %self.name, error = &error as &dyn std::error::Error, "failed to reach the leader lease"),
            }
            tokio::time::sleep(jittered(self.intervals.retry)).await;
        }
    }

    /// Renews until the Lease is lost; never returns otherwise.
    pub async fn hold(&self, leadership: &Leadership) -> LeaseError {
        let mut observed = Observed::default();
        let mut last = Instant::now();
        let mut why = String::from("no renewal succeeded in time");
        // Counted from where an attempt begins: after one that took longer the next follows at once, so that a single answer that never comes
        // does not use up what a slow API server has left of the deadline.
        let mut next = last + self.intervals.retry;
        loop {
            tokio::time::sleep_until(next).await;
            next = Instant::now() + self.intervals.retry;
            match self.attempt(&mut observed).await {
                Ok(Attempt::Held(since)) => {
                    last = since;
                    leadership.extend(since + self.intervals.renew_deadline);
                }
                Ok(Attempt::Contended) => "it changed while it was renewed".clone_into(&mut why),
                Ok(Attempt::Others) => {
                    let holder = observed.spec.holder_identity.clone().unwrap_or_default();
                    return LeaseError::Lost { name: self.name.clone(), why: format!("{holder:?} holds it") };
                }
                Err(error) => {
                    tracing::warn!(lease = %self.name, error = &error as &dyn std::error::Error, "failed to renew the leader lease");
                    why = error.to_string();
                }
            }
            if last.elapsed() >= self.intervals.renew_deadline {
                return LeaseError::Lost { name: self.name.clone(), why };
            }
        }
    }

    /// Gives the Lease up, so that another process need not wait for it to expire. It may take as long as a renewal, as in client-go.
    pub async fn release(&self) {
        let released = async {
            let Some(mut lease) = self.api.get_opt(&self.name).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(self.identity.as_str()) {
                spec.holder_identity = Some(String::new());
                spec.lease_duration_seconds = Some(1);
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match tokio::time::timeout(self.intervals.renew_deadline, released).await {
            Ok(Ok(())) => tracing::info!(lease = %self.name, "released the leader lease"),
            Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to release the leader lease"),
            Err(_elapsed) => tracing::warn!("failed to release the leader lease in time"),
        }
    }

    /// One attempt to hold the Lease, bounded in time. One write where the Lease is as our last write left it, else a look and at most one write.
    async fn attempt(&self, observed: &mut Observed) -> Result<Attempt, AttemptError> {
        let budget = self.intervals.renew_deadline / 2;
        tokio::time::timeout(budget, self.attempt_unbounded(observed)).await.map_err(|_elapsed| AttemptError::TimedOut(budget))?
    }

    async fn attempt_unbounded(&self, observed: &mut Observed) -> Result<Attempt, AttemptError> {
        let started = Instant::now();
        // Taken, not borrowed: after a write without an answer nobody knows which version the API server has.
        if let Some(ours) = observed.ours.take()
            && let Attempt::Held(_) = self.replace(ours, observed, started).await?
        {
            return Ok(Attempt::Held(started));
        }
        let lease = self.api.get_opt(&self.name).await?;
        if let Some(lease) = &lease {
            let resource_version = lease.resource_version().unwrap_or_default();
            if observed.since.is_none() || observed.resource_version != resource_version {
                *observed = Observed { resource_version, spec: lease.spec.clone().unwrap_or_default(), since: Some(Instant::now()), ours: None };
            }
        }
        match decide(lease.as_ref(), observed, &self.identity, Instant::now()) {
            Decision::Wait => Ok(Attempt::Others),
            Decision::Create => {
                let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
                let created = self.api.create(&PostParams::default(), &Lease { metadata, spec: Some(self.record(None)) }).await;
                Self::written(created, observed, started)
            }
            Decision::Take | Decision::Renew => self.replace(lease.unwrap_or_default(), observed, started).await,
        }
    }

    /// Replaces the Lease at the resource version that `lease` has.
    async fn replace(&self, mut lease: Lease, observed: &mut Observed, started: Instant) -> Result<Attempt, AttemptError> {
        lease.spec = Some(self.record(lease.spec.as_ref()));
        Self::written(self.api.replace(&self.name, &PostParams::default(), &lease).await, observed, started)
    }

    fn written(written: kube::Result<Lease>, observed: &mut Observed, started: Instant) -> Result<Attempt, AttemptError> {
        match written {
            Ok(lease) => {
                observed.ours = Some(lease);
                Ok(Attempt::Held(started))
            }
            // Changed or deleted since it was seen.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() || status.is_not_found() => Ok(Attempt::Contended),
            Err(error) => Err(error.into()),
        }
    }

    /// The record that says that this process holds the Lease, given the one before.
    fn record(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(jiff::Timestamp::now());
        let ours = before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(self.identity.as_str()));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.intervals.duration.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: if ours { before.and_then(|spec| spec.acquire_time.clone()) } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if ours || before.is_none() { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }
}

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("failed to reach the API server: {0}")]
    Api(#[from] kube::Error),
    #[error("no answer of the API server within {0:?}")]
    TimedOut(Duration),
}

/// `duration` plus up to a fifth, so that candidates do not come all at once.
fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(1.0 + rand::random::<f64>() * 0.2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{Method, Request, Response};

    fn lease(holder: Option<&str>, seconds: i32) -> Lease {
        let spec = LeaseSpec { holder_identity: holder.map(str::to_owned), lease_duration_seconds: Some(seconds), ..LeaseSpec::default() };
        Lease { metadata: ObjectMeta::default(), spec: Some(spec) }
    }

    #[test]
    fn a_lease_is_taken_when_free_or_unchanged_for_its_duration() {
        let now = Instant::now();
        let seen = |seconds_ago: u64| Observed { since: now.checked_sub(Duration::from_secs(seconds_ago)), ..Observed::default() };
        let cases = [
            ("there is none", None, seen(0), Decision::Create),
            ("nobody holds it", Some(lease(None, 15)), seen(0), Decision::Take),
            ("released", Some(lease(Some(""), 1)), seen(0), Decision::Take),
            ("ours", Some(lease(Some("me"), 15)), seen(0), Decision::Renew),
            ("ours, of long ago", Some(lease(Some("me"), 15)), seen(100), Decision::Renew),
            ("another's, fresh", Some(lease(Some("you"), 15)), seen(14), Decision::Wait),
            ("another's, expired", Some(lease(Some("you"), 15)), seen(16), Decision::Take),
            ("another's, just met", Some(lease(Some("you"), 15)), Observed::default(), Decision::Wait),
        ];
        for (name, lease, observed, want) in cases {
            assert_eq!(decide(lease.as_ref(), &observed, "me", now), want, "{name}");
        }
    }

    #[test]
    fn another_holders_expiry_is_judged_by_our_clock_not_by_the_record() {
        // Trap: a record whose renewTime lies far in the past (the holder's clock is behind) is fresh as long as it keeps changing.
        let mut stale_clock = lease(Some("you"), 15);
        stale_clock.spec.get_or_insert_default().renew_time = Some(MicroTime(jiff::Timestamp::UNIX_EPOCH));
        let now = Instant::now();
        let observed = Observed { since: Some(now), ..Observed::default() };
        assert_eq!(decide(Some(&stale_clock), &observed, "me", now), Decision::Wait);
    }

    #[test]
    fn the_holder_must_stop_before_others_start() {
        let seconds = Duration::from_secs;
        assert!(Intervals::default().checked().is_ok());
        for (duration, renew, retry) in [(10, 10, 10), (15, 15, 2), (15, 10, 10), (15, 10, 0), (2, 10, 1)] {
            let intervals = Intervals { duration: seconds(duration), renew_deadline: seconds(renew), retry: seconds(retry) };
            assert!(intervals.checked().is_err(), "{intervals:?}");
        }
    }

    /// An API server with one Lease: how it answers a PUT is the test's to say. Returns a client of it and the requests that it was sent.
    fn api_server(put: impl FnMut(&mut Lease, Lease) -> u16 + Send + 'static) -> (Client, Arc<Mutex<Vec<Method>>>) {
        slow_api_server(put, |_| Duration::ZERO)
    }

    /// The same, whose answer to the request of this number (from 0) takes so long.
    fn slow_api_server(
        mut put: impl FnMut(&mut Lease, Lease) -> u16 + Send + 'static,
        delay: impl Fn(usize) -> Duration + Copy + Send + 'static,
    ) -> (Client, Arc<Mutex<Vec<Method>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let requests = Arc::clone(&seen);
        let mut stored = lease(Some(""), 15);
        stored.metadata.resource_version = Some("1".to_owned());
        let state = Arc::new(Mutex::new(move |method: &Method, body: &[u8]| {
            let code = if *method == Method::PUT { put(&mut stored, serde_json::from_slice(body).unwrap()) } else { 200 };
            let answer = serde_json::to_vec(&stored).unwrap();
            let reason = if code == 409 { "Conflict" } else { "Timeout" };
            let refusal = serde_json::json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason});
            (code, if code == 200 { answer } else { refusal.to_string().into_bytes() })
        }));
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let (requests, state) = (Arc::clone(&requests), Arc::clone(&state));
            async move {
                let method = request.method().clone();
                let number = {
                    let mut requests = requests.lock().unwrap();
                    requests.push(method.clone());
                    requests.len() - 1
                };
                tokio::time::sleep(delay(number)).await;
                let body = request.into_body().collect_bytes().await?;
                let (code, answer) = (*state.lock().unwrap())(&method, &body);
                Ok::<_, kube::Error>(Response::builder().status(code).body(kube::client::Body::from(answer)).unwrap())
            }
        });
        (Client::new(service, "default"), seen)
    }

    /// Stores what was sent, as a new version, if it was made from the current one.
    fn store(stored: &mut Lease, sent: Lease) -> u16 {
        if sent.metadata.resource_version != stored.metadata.resource_version {
            return 409;
        }
        let version: u64 = stored.resource_version().unwrap().parse().unwrap();
        *stored = sent;
        stored.metadata.resource_version = Some((version + 1).to_string());
        200
    }

    /// Stores what is sent; by the second renewal that arrives another process has taken the Lease.
    fn stolen_before_the_second_renewal() -> impl FnMut(&mut Lease, Lease) -> u16 + Send + 'static {
        let mut number = 0;
        move |stored, sent| {
            number += 1;
            if number == 2 {
                let mut theft = stored.clone();
                theft.spec.get_or_insert_default().holder_identity = Some("thief".to_owned());
                store(stored, theft);
            }
            store(stored, sent)
        }
    }

    fn elector(client: Client) -> Elector {
        Elector::new(client, "here", "operator", "me", Intervals::default()).unwrap()
    }

    #[tokio::test]
    async fn the_holder_renews_with_one_request() {
        let (client, requests) = api_server(store);
        let (elector, mut observed) = (elector(client), Observed::default());
        for _ in 0..3 {
            assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Held(_))));
        }
        assert_eq!(*requests.lock().unwrap(), [Method::GET, Method::PUT, Method::PUT, Method::PUT]);
    }

    #[tokio::test]
    async fn a_renewal_whose_answer_was_lost_is_not_a_lost_lease() {
        // The second renewal is stored but answered with an error; the third meets its version.
        let mut number = 0;
        let (client, requests) = api_server(move |stored, sent| {
            number += 1;
            let code = store(stored, sent);
            if number == 2 { 504 } else { code }
        });
        let (elector, mut observed) = (elector(client), Observed::default());
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Held(_))));
        assert!(matches!(elector.attempt(&mut observed).await, Err(AttemptError::Api(_))));
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Held(_))));
        assert_eq!(*requests.lock().unwrap(), [Method::GET, Method::PUT, Method::PUT, Method::GET, Method::PUT], "after an error it looks first");
    }

    #[tokio::test]
    async fn a_late_renewal_of_our_own_between_look_and_write_is_not_a_lost_lease() {
        // Trap: a write that was given up after its time arrives between our next look and our next write.
        let mut number = 0;
        let (client, _) = api_server(move |stored, sent| {
            number += 1;
            if number == 1 {
                let late = Lease { spec: sent.spec.clone(), metadata: stored.metadata.clone() };
                store(stored, late);
            }
            store(stored, sent)
        });
        let (elector, mut observed) = (elector(client), Observed::default());
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Contended)));
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Held(_))));
    }

    #[tokio::test]
    async fn a_lease_that_another_took_is_lost() {
        let (client, _) = api_server(stolen_before_the_second_renewal());
        let (elector, mut observed) = (elector(client), Observed::default());
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Held(_))));
        assert!(matches!(elector.attempt(&mut observed).await, Ok(Attempt::Others)));
    }

    #[tokio::test]
    async fn an_answer_that_never_comes_leaves_time_for_another_attempt() {
        // In parts of the deadline of 6 s: look and renewal at 0.2 take 0.4 together; the renewal at 0.6 is given up at 1.1, which is 0.9 after the
        // last good one began; the next one, at once, meets another holder.
        let (client, _) = slow_api_server(stolen_before_the_second_renewal(), |number| match number {
            0 | 1 => Duration::from_millis(1200),
            2 => Duration::from_hours(1),
            _ => Duration::ZERO,
        });
        let intervals = Intervals { duration: Duration::from_secs(9), renew_deadline: Duration::from_secs(6), retry: Duration::from_millis(1200) };
        let elector = Elector::new(client, "here", "operator", "me", intervals).unwrap();
        let lost = elector.hold(&Leadership::until(Instant::now() + intervals.renew_deadline)).await;
        assert!(lost.to_string().ends_with("\"thief\" holds it"), "{lost}");
    }

    #[test]
    fn leadership_ends_by_itself_when_not_extended() {
        let leadership = Leadership::until(Instant::now() + Duration::from_secs(10));
        assert!(leadership.is_valid());
        leadership.extend(Instant::now().checked_sub(Duration::from_millis(1)).unwrap());
        assert!(!leadership.is_valid(), "a process that was frozen past its deadline must not write");
        leadership.extend(Instant::now() + Duration::from_secs(10));
        assert!(leadership.is_valid());
        assert!(Leadership::without_election().is_valid());
    }
}
