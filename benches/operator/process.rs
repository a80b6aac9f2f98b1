//! An operator as a process of its own, seen from outside: its metrics and its memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use finetune_testing::programs::kubeconfig;

/// A running operator; it is killed when dropped.
pub(crate) struct Operator {
    child: RefCell<Child>,
    metrics: String,
    log: std::path::PathBuf,
}

impl Operator {
    /// Starts one that competes for the Lease in `namespace`, with further arguments of `finetune operator`.
    pub(crate) fn start(name: &str, namespace: &str, further: &[String]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port();
        let log = std::env::temp_dir().join(format!("finetune-operator-perf-{}-{name}.log", std::process::id()));
        let file = std::fs::File::create(&log).expect("a log file");
        let child = Command::new(env!("CARGO_BIN_EXE_finetune"))
            .args(["operator", "--trainer-image=localhost/trainer:perf", "--identity", name, "--lease-namespace", namespace])
            .arg(format!("--address=127.0.0.1:{port}"))
            .args(further)
            .env("KUBECONFIG", kubeconfig())
            .env("RUST_LOG", "info,finetune_operator::reconcile::write=debug")
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file"))
            .stderr(file)
            .spawn()
            .expect("the operator starts");
        Self { child: RefCell::new(child), metrics: format!("http://127.0.0.1:{port}/metrics"), log }
    }

    /// Ends it at once.
    pub(crate) fn kill(self) {
        let mut child = self.child.borrow_mut();
        child.kill().expect("it runs");
        child.wait().expect("it has ended");
    }

    /// Stops the measurement where this operator has ended by itself: nobody would come to what is waited for.
    pub(crate) fn must_run(&self) {
        let ended = self.child.borrow_mut().try_wait().expect("a child of this process");
        if let Some(status) = ended {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            panic!("an operator ended with {status}: {}", log.lines().last().unwrap_or_default());
        }
    }

    fn id(&self) -> u32 {
        self.child.borrow().id()
    }

    /// Waits until it leads.
    pub(crate) async fn until_leading(&self, patience: Duration) {
        let began = Instant::now();
        while !self.text().await.is_some_and(|text| text.contains("\nfinetune_leader 1")) {
            assert!(began.elapsed() < patience, "it does not lead: {}", std::fs::read_to_string(&self.log).unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Requests so far, by "verb resource".
    pub(crate) async fn requests(&self) -> BTreeMap<String, u64> {
        self.counted(|_| true).await
    }

    /// Requests so far that were refused or not answered, by "verb resource".
    pub(crate) async fn requests_that_failed(&self) -> BTreeMap<String, u64> {
        self.counted(|code| !code.starts_with('2')).await
    }

    async fn counted(&self, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, u64> {
        let text = self.text().await.expect("the operator answers");
        let mut counts = BTreeMap::new();
        for line in text.lines() {
            let Some((labels, times)) = line.strip_prefix("finetune_apiserver_requests_total{").and_then(|rest| rest.split_once("} ")) else { continue };
            let label = |name: &str| labels.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"')).unwrap_or_default();
            if wanted(label("code")) {
                *counts.entry(format!("{} {}", label("verb"), label("resource"))).or_insert(0) += times.parse::<u64>().expect("a count");
            }
        }
        counts
    }

    /// Each job (`namespace/name`) of which a status with an attempt is written, and when the API server had answered, by the log.
    pub(crate) fn first_starts_written(&self) -> Vec<(String, Timestamp)> {
        let log = std::fs::read_to_string(&self.log).expect("the log");
        let line = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let starts = line["message"] == "status written" && line["started"].as_u64()? > 0;
            let key = format!("{}/{}", line["span"]["namespace"].as_str()?, line["span"]["job"].as_str()?);
            Some((key, line["timestamp"].as_str()?.parse().ok()?)).filter(|_| starts)
        };
        log.lines().filter_map(line).collect()
    }

    /// Resident memory in MiB, by its own metric.
    pub(crate) async fn memory(&self) -> f64 {
        let text = self.text().await.expect("the operator answers");
        let bytes = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).expect("the metric");
        bytes.parse::<f64>().expect("a number") / 1_048_576.0
    }

    /// The most that it ever held, in MiB, by the kernel's word.
    pub(crate) fn peak_memory(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it runs");
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")).expect("VmHWM");
        kib.parse::<f64>().expect("a number") / 1024.0
    }

    /// Processor time so far, all threads together.
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).expect("it runs");
        // After the name in parentheses: state, parent, ... and as the 12th and 13th the ticks (100 a second) in user and kernel mode.
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    async fn text(&self) -> Option<String> {
        reqwest::get(&self.metrics).await.ok()?.text().await.ok()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let child = self.child.get_mut();
        let _may_have_ended = child.kill();
        let _may_have_ended = child.wait();
    }
}
