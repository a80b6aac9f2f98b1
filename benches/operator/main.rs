//! The operator at scale: thousands of FineTuneJobs on a real API server. Pods have no kubelet; a stand-in writes their status, and one server
//! answers for all trainers.
//!
//! `benches/operator/run` starts a control plane without nodes and runs this. It prints what docs/benchmarks.md reports, and fails where a goal
//! is missed: writes (besides progress) and events of a job's life, latency from a pod's event to the FineTuneJob's status, resident memory, takeover.
#![cfg(feature = "operator")]
#![expect(clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a measurement stops at the first failure and prints")]

mod board;
mod pods;
mod process;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser as _;
use futures::StreamExt as _;
use kube::Client;
use serde_json::json;

use board::{Board, Moment, quantiles};
use finetune_testing::{kubernetes, programs};
use process::Operator;

/// Jobs are spread over these.
const NAMESPACES: [&str; 4] = ["perf-0", "perf-1", "perf-2", "perf-3"];
/// Namespace of the Lease.
const SYSTEM: &str = "perf-system";
/// Jobs that are created at the same time.
const CREATORS: usize = 8;
/// How long nothing that was asked for may happen.
const PATIENCE: Duration = Duration::from_mins(5);

/// After a burst of new jobs, for their events and for what the Job controller still has to do.
const SETTLED: Duration = Duration::from_secs(20);

/// Goals of docs/benchmarks.md.
const WRITES: f64 = 5.0;
const EVENTS: f64 = 6.0;
const LATENCY: Duration = Duration::from_secs(1);
const MEMORY_MIB: f64 = 150.0;

#[derive(Debug, clap::Parser)]
struct Args {
    /// Jobs of the first wave, all alive at once.
    #[arg(long, default_value_t = 2000)]
    jobs: usize,

    /// Jobs of the second wave, which runs beside all the finished ones.
    #[arg(long, default_value_t = 500)]
    more: usize,

    /// Jobs that run when the leader is killed.
    #[arg(long, default_value_t = 100)]
    orphans: usize,

    /// Pod events a second.
    #[arg(long, default_value_t = 50.0)]
    rate: f64,

    /// A further argument of `finetune operator`, such as --operator=--concurrency=32; may be given again.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    operator: Vec<String>,

    /// A file for every moment of every job, with its time.
    #[arg(long, value_name = "FILE")]
    moments: Option<std::path::PathBuf>,

    /// What cargo gives to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one wave has shown.
struct Wave {
    jobs: usize,
    /// From a pod's start until the API server has the FineTuneJob's status that shows it.
    started: [Duration; 3],
    /// Of that, until the measurement's own watch reports the running pod.
    delivered: [Duration; 3],
    /// From that status until a watch of FineTuneJobs shows it.
    shown: [Duration; 3],
    /// From a pod's start until then.
    seen: [Duration; 3],
    /// From the Job's end, as a watch sees it, to the FineTuneJob's.
    ended: [Duration; 3],
    /// From the pod's end, with the Job controller in between.
    in_all: [Duration; 3],
    /// Requests to the API server by verb and resource.
    requests: BTreeMap<String, u64>,
    /// Status writes that reported progress alone.
    progress: usize,
    /// Resident memory once all were created, and at the end.
    memory: [f64; 2],
    /// Processor time of the operator.
    processor: Duration,
}

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let client = kubernetes::client().await;
    prepare(&client).await;
    pods::serve_progress().await;
    let board = Arc::new(Board::default());
    board.watch(&client);
    let first = Operator::start("first", SYSTEM, &args.operator);
    first.until_leading(PATIENCE).await;
    let second = Operator::start("second", SYSTEM, &args.operator);
    println!("resident memory of the leader at rest: {:.1} MiB", first.memory().await);

    let waves = [wave(&client, &board, &first, "a", args.jobs, args.rate).await, wave(&client, &board, &first, "b", args.more, args.rate).await];
    let mut met = report(&waves);
    println!("most that the leader ever held: {:.1} MiB", first.peak_memory());
    met &= goal("resident memory (MiB)", first.peak_memory(), MEMORY_MIB);
    let refused = first.requests_that_failed().await;
    println!("requests that the API server refused: {refused:?}");

    takeover(&client, &board, first, &second, args.orphans).await;
    if let Some(file) = &args.moments {
        std::fs::write(file, board.lines()).expect("the file of --moments can be written");
    }
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The CRD and empty namespaces.
async fn prepare(client: &Client) {
    kubernetes::install_crds(&programs::repository().join("crds/finetune.dev_finetunejobs.yaml"), &["finetunejobs.finetune.dev"]).await;
    for namespace in NAMESPACES.into_iter().chain([SYSTEM]) {
        kubernetes::namespace(client, namespace).await;
    }
}

/// Creates `count` jobs, lets their pods start at `rate`, then end at `rate`.
async fn wave(client: &Client, board: &Arc<Board>, operator: &Operator, name: &str, count: usize, rate: f64) -> Wave {
    let before = operator.requests().await;
    let processor = operator.processor_time();
    let began = Instant::now();
    let keys = create(client, operator, board, name, count).await;
    // What is measured is pods that start at a rate, not what a burst of new jobs leaves to do.
    until(operator, board, &keys, Moment::CreatedSeen).await;
    println!("all show that their Job exists after {:.1?}", began.elapsed());
    tokio::time::sleep(SETTLED).await;
    let created = operator.memory().await;
    pods::at_rate(client, board, &keys, rate, Moment::StartSent).await;
    until(operator, board, &keys, Moment::RunSeen).await;
    until(operator, board, &keys, Moment::StartSeen).await;
    until(operator, board, &keys, Moment::TrainingSeen).await;
    pods::at_rate(client, board, &keys, rate, Moment::EndSent).await;
    until(operator, board, &keys, Moment::EndSeen).await;
    at_rest(operator).await;
    for (key, written) in operator.first_starts_written() {
        board.note_at(&key, Moment::StartWritten, written);
    }
    let after = operator.requests().await;
    let requests = after.into_iter().map(|(what, times)| (what.clone(), times - before.get(&what).copied().unwrap_or(0))).collect();
    let between = |from, to| quantiles(board.spans(&keys, from, to));
    Wave {
        jobs: count,
        started: between(Moment::StartSent, Moment::StartWritten),
        delivered: between(Moment::StartSent, Moment::RunSeen),
        shown: between(Moment::StartWritten, Moment::StartSeen),
        seen: between(Moment::StartSent, Moment::StartSeen),
        ended: between(Moment::ChildSeen, Moment::EndSeen),
        in_all: between(Moment::EndSent, Moment::EndSeen),
        requests,
        progress: board.progress_writes(&keys),
        memory: [created, operator.memory().await],
        processor: operator.processor_time().saturating_sub(processor),
    }
}

/// Creates jobs and waits until each has its pod.
async fn create(client: &Client, operator: &Operator, board: &Arc<Board>, wave: &str, count: usize) -> Vec<String> {
    let began = Instant::now();
    let jobs = (0..count).map(|number| {
        let (namespace, name) = (NAMESPACES[number % NAMESPACES.len()], format!("{wave}-{number:05}"));
        let job = json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "model": {"source": {"objectStore": {"uri": "s3://models/sd3-medium/"}}},
                "dataset": {"uri": "s3://team-a/datasets/corgi/"},
                "output": {"uri": format!("s3://team-a/loras/{name}/")},
                // Nobody binds or runs the pods.
                "scheduling": {"schedulerName": "nobody"},
            },
        });
        async move {
            kubernetes::create(client, &job, false).await.expect("a valid job");
            format!("{namespace}/{name}")
        }
    });
    let keys: Vec<String> = futures::stream::iter(jobs).buffer_unordered(CREATORS).collect().await;
    until(operator, board, &keys, Moment::PodSeen).await;
    println!("{count} jobs have their pods after {:.1?}", began.elapsed());
    keys
}

/// Waits until all of these have come to that moment, by the work of this operator, for as long as it goes on.
async fn until(operator: &Operator, board: &Board, keys: &[String], moment: Moment) {
    let (mut came, mut since) = (0, Instant::now());
    while came < keys.len() {
        operator.must_run();
        assert!(since.elapsed() < PATIENCE, "{came} of {} came to {moment:?}", keys.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = board.count(keys, moment);
        if now > came {
            (came, since) = (now, Instant::now());
        }
    }
}

/// Waits for the times to live and the last events: those are published one at a time, later than what they report.
async fn at_rest(operator: &Operator) {
    let began = Instant::now();
    let mut before = BTreeMap::new();
    loop {
        assert!(began.elapsed() < PATIENCE, "the operator does not come to rest");
        let mut now = operator.requests().await;
        // The Lease is renewed for ever.
        now.retain(|what, _| !what.ends_with(" leases"));
        if now == before {
            return;
        }
        before = now;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
}

/// Kills the leader while jobs run, ends their pods, and waits until the other one has reported it.
async fn takeover(client: &Client, board: &Arc<Board>, leader: Operator, standby: &Operator, count: usize) {
    let keys = create(client, &leader, board, "c", count).await;
    pods::at_rate(client, board, &keys, 50.0, Moment::StartSent).await;
    until(&leader, board, &keys, Moment::StartSeen).await;
    until(&leader, board, &keys, Moment::TrainingSeen).await;
    let killed = Instant::now();
    leader.kill();
    pods::at_rate(client, board, &keys, 1000.0, Moment::EndSent).await;
    standby.until_leading(PATIENCE).await;
    let leads = killed.elapsed();
    until(standby, board, &keys, Moment::EndSeen).await;
    println!("the leader was killed: another leads after {leads:.1?}, and has reported the end of all {count} jobs after {:.1?}", killed.elapsed());
}

/// Prints the waves side by side; whether all goals are met.
fn report(waves: &[Wave]) -> bool {
    let mut met = true;
    for wave in waves {
        let jobs = wave.jobs as f64;
        println!("\n{} jobs:", wave.jobs);
        let (mut writes, mut events) = (0.0, 0.0);
        for (what, times) in wave.requests.iter().filter(|(_, times)| **times > 0) {
            let each = *times as f64 / jobs;
            println!("  {what:<40} {times:>7}   {each:.3} a job");
            let write = ["create ", "update ", "patch ", "delete "].iter().any(|verb| what.starts_with(verb)) && !what.ends_with(" leases");
            if write && what.ends_with(" events") {
                events += each;
            } else if write {
                writes += each;
            }
        }
        let progress = wave.progress as f64 / jobs;
        println!("  of these, status writes that report progress alone: {progress:.3} a job");
        met &= goal("writes of a job's life besides progress", writes - progress, WRITES) & goal("events of a job's life", events, EVENTS);
        for (what, [middle, high, most], bound) in [
            ("pod runs -> the API server has the FineTuneJob's status that shows it", wave.started, true),
            ("of that, until another watch reports the running pod", wave.delivered, false),
            ("after it, until a watch shows the status", wave.shown, false),
            ("pod runs -> a watch shows the status", wave.seen, false),
            ("Job complete -> FineTuneJob complete", wave.ended, true),
            ("pod succeeded -> FineTuneJob complete (Job controller between)", wave.in_all, false),
        ] {
            println!("  {what}: p50 {middle:.0?}, p99 {high:.0?}, most {most:.0?}");
            met &= !bound || goal("p99 in seconds", high.as_secs_f64(), LATENCY.as_secs_f64());
        }
        println!("  resident memory with all created {:.1} MiB, at the end {:.1} MiB", wave.memory[0], wave.memory[1]);
        println!("  processor time of the operator: {:.1} ms a job", wave.processor.as_secs_f64() * 1000.0 / jobs);
    }
    met
}

fn goal(what: &str, seen: f64, most: f64) -> bool {
    let met = seen <= most;
    println!("  {}: {what} {seen:.2}, at most {most}", if met { "met" } else { "MISSED" });
    met
}
