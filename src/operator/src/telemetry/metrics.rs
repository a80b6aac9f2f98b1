//! The operator's metrics, in OpenMetrics text. No label ever holds the name of a job: series stay few however many jobs there are.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use finetune_api::{CompleteReason, Reason};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Labels of `finetune_job_terminal_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TerminalLabels {
    result: String,
    reason: String,
}

/// Labels of `finetune_job_restarts_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    cause: String,
}

/// Labels of `finetune_reconcile_duration_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: String,
}

/// Labels of `finetune_reconcile_errors_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabels {
    class: String,
}

/// Labels of `finetune_apiserver_requests_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: String,
    resource: String,
    code: String,
}

/// Labels of `finetune_watch_failing` and `finetune_job_gpu_seconds_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NamespaceLabels {
    namespace: String,
}

/// Labels of `finetune_jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobLabels {
    namespace: String,
    phase: String,
}

/// Jobs as they are now, counted when asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// By (namespace, phase): how many, and for how long the one that has been there longest.
    pub phases: BTreeMap<(String, String), PhaseCount>,
    /// By namespace: those whose trainer runs and does not answer.
    pub progress_unknown: BTreeMap<String, i64>,
}

/// The jobs of one phase of one namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PhaseCount {
    /// How many.
    pub jobs: i64,
    /// For how many seconds the one that has been there longest has been there.
    pub longest_seconds: i64,
}

impl Census {
    /// Adds one job.
    pub fn add(&mut self, namespace: &str, phase: &str, seconds: i64, progress_unknown: bool) {
        let count = self.phases.entry((namespace.to_owned(), phase.to_owned())).or_default();
        count.jobs += 1;
        count.longest_seconds = count.longest_seconds.max(seconds);
        // 0 is exported too: a series that comes and goes would leave an alert without an end.
        *self.progress_unknown.entry(namespace.to_owned()).or_default() += i64::from(progress_unknown);
    }

    fn merge(&mut self, other: Self) {
        for (key, more) in other.phases {
            let count = self.phases.entry(key).or_default();
            count.jobs += more.jobs;
            count.longest_seconds = count.longest_seconds.max(more.longest_seconds);
        }
        for (namespace, more) in other.progress_unknown {
            *self.progress_unknown.entry(namespace).or_default() += more;
        }
    }
}

/// A source of job counts.
pub type JobCounts = Box<dyn Fn() -> Census + Send + Sync>;

/// What a metric is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// As queries name it.
    pub name: String,
    /// Its type in OpenMetrics.
    pub kind: String,
    /// Names of its labels.
    pub labels: Vec<String>,
    /// What it counts.
    pub help: String,
}

/// Everything the operator counts. One per process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    counts: Arc<Mutex<JobSources>>,
    terminal: Family<TerminalLabels, Counter>,
    queue_seconds: Histogram,
    start_latency_seconds: Histogram,
    duration_seconds: Histogram,
    restarts: Family<CauseLabels, Counter>,
    gpu_seconds: Family<NamespaceLabels, Counter>,
    reconcile_seconds: Family<ResultLabels, Histogram>,
    reconcile_errors: Family<ClassLabels, Counter>,
    queue_wait_seconds: Histogram,
    queued: Gauge<i64>,
    status_patches: Counter,
    progress_fetches: Family<ResultLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    leader: Gauge<i64>,
    crd_missing: Gauge<i64>,
    watch_failing: Family<NamespaceLabels, Gauge<i64>>,
    resident_bytes: ResidentBytes,
}

/// Histogram of `finetune_reconcile_duration_seconds`.
fn reconcile_histogram() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0])
}

/// Reasons of `Failed`.
fn failure_reasons() -> Vec<&'static str> {
    Reason::ALL.iter().map(|reason| reason.as_str()).collect()
}

/// Buckets for what takes minutes to days.
fn long_histogram() -> Histogram {
    Histogram::new([1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0, 259_200.0])
}

impl Metrics {
    /// Registers every metric.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            counts: Arc::default(),
            terminal: Family::default(),
            queue_seconds: long_histogram(),
            start_latency_seconds: long_histogram(),
            duration_seconds: long_histogram(),
            restarts: Family::default(),
            gpu_seconds: Family::default(),
            reconcile_seconds: Family::new_with_constructor(reconcile_histogram),
            reconcile_errors: Family::default(),
            queue_wait_seconds: reconcile_histogram(),
            queued: Gauge::default(),
            status_patches: Counter::default(),
            progress_fetches: Family::default(),
            requests: Family::default(),
            leader: Gauge::default(),
            crd_missing: Gauge::default(),
            watch_failing: Family::default(),
            resident_bytes: ResidentBytes,
        };
        metrics.register();
        // A series that begins with 1 has no increase: each begins with 0, before the first job ends so.
        for (result, reasons) in [("succeeded", CompleteReason::ALL.iter().map(|reason| reason.as_str()).collect::<Vec<_>>()), ("failed", failure_reasons())] {
            for reason in reasons {
                drop(metrics.terminal.get_or_create(&TerminalLabels { result: result.to_owned(), reason: reason.to_owned() }));
            }
        }
        metrics
    }

    fn register(&mut self) {
        // The library itself appends "_total" to counters and "_info" to infos.
        let registry = &mut self.registry;
        registry.register_collector(Box::new(JobsCollector(Arc::clone(&self.counts))));
        registry.register_collector(Box::new(self.resident_bytes));
        registry.register(
            "finetune_job_terminal",
            "Jobs that ended, by result (succeeded, failed) and the reason of Complete or Failed; each begins with 0, so that an increase shows the first",
            self.terminal.clone(),
        );
        registry.register(
            "finetune_job_queue_seconds",
            "Seconds from a job's creation, or from losing its quota, until Kueue reserved quota",
            self.queue_seconds.clone(),
        );
        registry.register("finetune_job_start_latency_seconds", "Seconds from a job's creation until its first pod ran", self.start_latency_seconds.clone());
        registry.register("finetune_job_duration_seconds", "Seconds from a job's first running pod to its end", self.duration_seconds.clone());
        registry.register(
            "finetune_job_restarts",
            "Attempts after a job's first, by the cause that ended the one before (Disrupted, Checkpointed, Superseded, Suspended, Failed, Lost)",
            self.restarts.clone(),
        );
        registry.register(
            "finetune_job_gpu_seconds",
            "Seconds for which trainers have held GPUs, from the start of each to its end, times its GPUs; counted when an attempt has ended",
            self.gpu_seconds.clone(),
        );
        registry.register("finetune_reconcile_duration_seconds", "Seconds of one reconciliation, by result (ok, error)", self.reconcile_seconds.clone());
        registry.register(
            "finetune_reconcile_errors",
            "Reconciliations that failed, by class of error: the call, as create_job, or timed_out, not_leading, unreadable",
            self.reconcile_errors.clone(),
        );
        registry.register("finetune_reconcile_queue_wait_seconds", "Seconds that a job waited for a free worker", self.queue_wait_seconds.clone());
        registry.register("finetune_reconcile_queue_depth", "Jobs that wait for a free worker", self.queued.clone());
        registry.register("finetune_status_patches", "Status writes", self.status_patches.clone());
        registry.register(
            "finetune_progress_fetches",
            "Requests for a trainer's progress, by result (ok, unreachable, refused, invalid)",
            self.progress_fetches.clone(),
        );
        registry.register(
            "finetune_apiserver_requests",
            "Requests to the API server, with resources named as in RBAC; the code is error where no answer came",
            self.requests.clone(),
        );
        registry.register("finetune_leader", "1 while this process holds the leader lease", self.leader.clone());
        registry.register("finetune_crd_missing", "1 while the FineTuneJob resource is not served by the API server", self.crd_missing.clone());
        registry.register(
            "finetune_watch_failing",
            "1 while something of this watched namespace cannot be watched; the namespace is empty where all are",
            self.watch_failing.clone(),
        );
        registry.register("finetune_build", "Version of this binary", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
    }

    /// Name, type, labels and help of every metric, as `/metrics` itself shows them.
    pub fn descriptions() -> Result<Vec<Description>, fmt::Error> {
        let text = Self::with_each_series().encode()?;
        let mut described: Vec<Description> = Vec::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                described.push(Description { name: name.to_owned(), kind: String::new(), labels: Vec::new(), help: help.to_owned() });
            } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                if let Some(metric) = described.iter_mut().find(|metric| metric.name == name) {
                    kind.clone_into(&mut metric.kind);
                    // The names of these series, which is what queries use.
                    metric.name.push_str(match kind {
                        "counter" => "_total",
                        "info" => "_info",
                        _ => "",
                    });
                }
            } else if let Some(metric) = described.iter_mut().rev().find(|metric| line.starts_with(&metric.name))
                && let Some((labels, _value)) = line.split_once('{').and_then(|(_name, rest)| rest.split_once('}'))
                && metric.labels.is_empty()
            {
                let names = labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _value)| name);
                metric.labels = names.filter(|&name| name != "le").map(str::to_owned).collect();
            }
        }
        Ok(described)
    }

    /// One with a series of every metric: a metric with labels shows nothing before it is used.
    fn with_each_series() -> Self {
        let metrics = Self::new();
        metrics.add_job_counts(Box::new(|| {
            let mut census = Census::default();
            census.add("team-a", "Running", 1, false);
            census
        }));
        metrics.job_ended("failed", "InvalidDataset", Some(Duration::from_secs(70)));
        metrics.job_admitted(Duration::from_secs(3));
        metrics.job_started(Duration::from_secs(9));
        metrics.job_restarted("Disrupted");
        metrics.gpu_seconds("team-a", 60);
        metrics.reconciled(Duration::from_millis(3), Some("apply_job"));
        metrics.waited(Duration::from_millis(3));
        metrics.status_patched();
        metrics.progress_fetched("ok");
        metrics.api_request("get", "jobs", "200");
        metrics.set_watch_failing("team-a", true);
        metrics
    }

    /// Adds a source of job counts; sources of all watched namespaces add up.
    pub fn add_job_counts(&self, source: JobCounts) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).0.push(source);
    }

    /// Everything as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// A job ended as `result` ("succeeded" or "failed") for `reason`, `duration` after its first pod ran.
    pub fn job_ended(&self, result: &str, reason: &str, duration: Option<Duration>) {
        self.terminal.get_or_create(&TerminalLabels { result: result.to_owned(), reason: reason.to_owned() }).inc();
        if let Some(duration) = duration {
            self.duration_seconds.observe(duration.as_secs_f64());
        }
    }

    /// A job's quota was reserved.
    pub fn job_admitted(&self, waited: Duration) {
        self.queue_seconds.observe(waited.as_secs_f64());
    }

    /// A job's first pod runs.
    pub fn job_started(&self, waited: Duration) {
        self.start_latency_seconds.observe(waited.as_secs_f64());
    }

    /// An attempt was followed by another.
    pub fn job_restarted(&self, cause: &str) {
        self.restarts.get_or_create(&CauseLabels { cause: cause.to_owned() }).inc();
    }

    /// Attempts of a namespace's jobs have ended that had held GPUs for so long.
    pub fn gpu_seconds(&self, namespace: &str, seconds: u64) {
        self.gpu_seconds.get_or_create(&NamespaceLabels { namespace: namespace.to_owned() }).inc_by(seconds);
    }

    /// A reconciliation took `duration`; `class` names the error it ended with.
    pub fn reconciled(&self, duration: Duration, class: Option<&str>) {
        let result = if class.is_some() { "error" } else { "ok" };
        self.reconcile_seconds.get_or_create(&ResultLabels { result: result.to_owned() }).observe(duration.as_secs_f64());
        if let Some(class) = class {
            self.reconcile_errors.get_or_create(&ClassLabels { class: class.to_owned() }).inc();
        }
    }

    /// A job waited that long for a free worker.
    pub fn waited(&self, waited: Duration) {
        self.queue_wait_seconds.observe(waited.as_secs_f64());
    }

    /// The number of waiting jobs of one watched namespace, before and now.
    pub fn queued(&self, before: usize, now: usize) {
        let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.queued.inc_by(signed(now) - signed(before));
    }

    /// A status was written.
    pub fn status_patched(&self) {
        self.status_patches.inc();
    }

    /// A trainer was asked for its progress.
    pub fn progress_fetched(&self, result: &str) {
        self.progress_fetches.get_or_create(&ResultLabels { result: result.to_owned() }).inc();
    }

    /// The API server answered a request (`code` is "error" where no answer came).
    pub fn api_request(&self, verb: &str, resource: &str, code: &str) {
        self.requests.get_or_create(&RequestLabels { verb: verb.to_owned(), resource: resource.to_owned(), code: code.to_owned() }).inc();
    }

    /// Sets `finetune_leader`.
    pub fn set_leader(&self, leader: bool) {
        self.leader.set(i64::from(leader));
    }

    /// Sets `finetune_crd_missing`.
    pub fn set_crd_missing(&self, missing: bool) {
        self.crd_missing.set(i64::from(missing));
    }

    /// Sets `finetune_watch_failing` of a watched namespace; the empty name stands for all.
    pub fn set_watch_failing(&self, namespace: &str, failing: bool) {
        self.watch_failing.get_or_create(&NamespaceLabels { namespace: namespace.to_owned() }).set(i64::from(failing));
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Where job counts come from.
#[derive(Default)]
struct JobSources(Vec<JobCounts>);

impl fmt::Debug for JobSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobSources({})", self.0.len())
    }
}

/// `finetune_jobs`, counted in the caches at each scrape.
#[derive(Debug)]
struct JobsCollector(Arc<Mutex<JobSources>>);

impl Collector for JobsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut census = Census::default();
        for source in &self.0.lock().unwrap_or_else(PoisonError::into_inner).0 {
            census.merge(source());
        }
        let jobs = Family::<JobLabels, Gauge<i64>>::default();
        let longest = Family::<JobLabels, Gauge<i64>>::default();
        let unknown = Family::<NamespaceLabels, Gauge<i64>>::default();
        for ((namespace, phase), count) in census.phases {
            let labels = JobLabels { namespace, phase };
            jobs.get_or_create(&labels).set(count.jobs);
            longest.get_or_create(&labels).set(count.longest_seconds);
        }
        for (namespace, count) in census.progress_unknown {
            unknown.get_or_create(&NamespaceLabels { namespace }).set(count);
        }
        let gauge = prometheus_client::metrics::MetricType::Gauge;
        jobs.encode(encoder.encode_descriptor("finetune_jobs", "FineTuneJobs by namespace and phase.", None, gauge)?)?;
        let help = "Seconds for which the FineTuneJob that has been longest in this phase has been there.";
        longest.encode(encoder.encode_descriptor("finetune_jobs_longest_seconds", help, None, gauge)?)?;
        let help = "FineTuneJobs whose trainer runs and does not answer the operator.";
        unknown.encode(encoder.encode_descriptor("finetune_jobs_progress_unknown", help, None, gauge)?)
    }
}

/// `process_resident_memory_bytes`, read from `/proc` at each scrape (absent where there is none).
#[derive(Debug, Clone, Copy)]
struct ResidentBytes;

impl Collector for ResidentBytes {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<i64>().ok());
        if let Some(kib) = kib {
            let gauge = ConstGauge::new(kib.saturating_mul(1024));
            let metric = encoder.encode_descriptor(
                "process_resident_memory_bytes",
                "Resident memory of this process.",
                None,
                prometheus_client::metrics::MetricType::Gauge,
            )?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_reference_is_served_and_no_series_names_a_job() {
        let metrics = Metrics::with_each_series();
        let census = |jobs: &'static [(i64, bool)]| {
            Box::new(move || {
                let mut census = Census::default();
                jobs.iter().for_each(|(seconds, unknown)| census.add("team-a", "Running", *seconds, *unknown));
                census
            })
        };
        metrics.add_job_counts(census(&[(5, false), (90, true)]));
        metrics.add_job_counts(census(&[(7, false)]));
        metrics.reconciled(Duration::from_millis(3), None);
        metrics.queued(0, 5);
        metrics.queued(5, 2);
        metrics.set_leader(true);
        let text = metrics.encode().unwrap();
        for line in [
            "finetune_jobs{namespace=\"team-a\",phase=\"Running\"} 4",
            "finetune_jobs_longest_seconds{namespace=\"team-a\",phase=\"Running\"} 90",
            "finetune_jobs_progress_unknown{namespace=\"team-a\"} 1",
            "finetune_job_terminal_total{result=\"failed\",reason=\"InvalidDataset\"} 1",
            "finetune_job_terminal_total{result=\"failed\",reason=\"RestartStorm\"} 0",
            "finetune_job_terminal_total{result=\"succeeded\",reason=\"TrainingSucceeded\"} 0",
            "finetune_job_queue_seconds_count 1",
            "finetune_job_start_latency_seconds_count 1",
            "finetune_job_duration_seconds_count 1",
            "finetune_job_restarts_total{cause=\"Disrupted\"} 1",
            "finetune_reconcile_duration_seconds_count{result=\"ok\"} 1",
            "finetune_reconcile_errors_total{class=\"apply_job\"} 1",
            "finetune_reconcile_queue_wait_seconds_count 1",
            "finetune_reconcile_queue_depth 2",
            "finetune_status_patches_total 1",
            "finetune_apiserver_requests_total{verb=\"get\",resource=\"jobs\",code=\"200\"} 1",
            "finetune_leader 1",
            "finetune_crd_missing 0",
            "finetune_build_info{version=",
            "finetune_watch_failing{namespace=\"team-a\"} 1",
            "process_resident_memory_bytes ",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_descriptions_are_complete() {
        let described = Metrics::descriptions().unwrap();
        assert_eq!(described.len(), 21, "a new metric also gets a series in with_each_series");
        for metric in &described {
            assert!(!metric.kind.is_empty() && metric.help.len() > 10, "{metric:?}");
        }
        let requests = described.iter().find(|metric| metric.name == "finetune_apiserver_requests_total").unwrap();
        assert_eq!(requests.labels, ["verb", "resource", "code"]);
    }
}
