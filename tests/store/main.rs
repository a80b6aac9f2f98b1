//! Stores against real servers, servers that fail, and the model hub's protocol. `tests/testbed/install-servers` installs the servers.
#![cfg(feature = "train")]
#![expect(clippy::unwrap_used, reason = "test code; clippy takes the functions marked as tests alone for such")]

mod faults;
mod hub;
mod objects;
mod peculiar;
mod proxy;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use finetune_testing::servers;

use finetune_store::{Environment, Progress, RetryPolicy, Store, StoreOptions};

/// Quick retries, long patience: for tests that are to succeed on slow machines.
fn patient() -> RetryPolicy {
    RetryPolicy { first_delay: Duration::from_millis(10), max_delay: Duration::from_millis(200), max_retries: 30, ..RetryPolicy::default() }
}

/// Where a test's objects go.
struct Place {
    /// `s3://bucket`, without a prefix; empty for directories.
    root: String,
    options: StoreOptions,
    /// The directory, when it is one.
    directory: Option<tempfile::TempDir>,
}

impl Place {
    fn directory() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let buckets = finetune_store::Buckets::parse(&[format!("s3://bucket={}", directory.path().display())]).unwrap();
        let options = StoreOptions { buckets, retry: patient(), ..StoreOptions::default() };
        Self { root: "s3://bucket".into(), options, directory: Some(directory) }
    }

    fn server(server: &servers::Server) -> Self {
        Self::server_at(server, server.endpoint.clone())
    }

    /// The server, reached through another address.
    fn server_at(server: &servers::Server, endpoint: String) -> Self {
        let environment = Environment::from_pairs(server.environment.clone());
        let options = StoreOptions { endpoint: Some(endpoint), environment, retry: patient(), ..StoreOptions::default() };
        Self { root: format!("{}://{}", server.scheme, servers::BUCKET), options, directory: None }
    }

    /// A prefix that no other test uses.
    fn store(&self, test: &str) -> Store {
        Store::open(&self.uri(test), &self.options).unwrap()
    }

    fn uri(&self, test: &str) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        format!("{}/{test}-{}/", self.root, NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Counts what transfers report.
#[derive(Default)]
struct Counter {
    resumed: AtomicU64,
    advanced: AtomicU64,
    finished: Mutex<Vec<String>>,
    /// The transfer ends when `advanced` reaches it: [`cut_short`].
    limit: Option<u64>,
}

/// Runs a transfer whose counter has a limit: it is dropped there, in the middle of its work, as the end of the process would drop it.
async fn cut_short(transfer: impl Future) {
    use futures::FutureExt;
    let end = std::panic::AssertUnwindSafe(transfer).catch_unwind().await;
    assert!(end.err().is_some_and(|cause| cause.is::<Limit>()), "the transfer ended before its limit");
}

/// What unwinds a transfer at its limit.
struct Limit;

impl Progress for Counter {
    fn start(&self, _: &str, _: u64, resumed: u64) {
        self.resumed.store(resumed, Ordering::SeqCst);
    }

    fn advance(&self, _: &str, bytes: u64) {
        let advanced = self.advanced.fetch_add(bytes, Ordering::SeqCst) + bytes;
        if self.limit.is_some_and(|limit| advanced >= limit) {
            std::panic::resume_unwind(Box::new(Limit));
        }
    }

    fn finish(&self, name: &str) {
        self.finished.lock().unwrap().push(name.to_owned());
    }
}

/// `count` bytes that are the same for the same `seed` and unlike each other otherwise.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..count.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(count);
    bytes
}
