//! Wires the controller: servers, lease, caches, reconciliations, shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use kube::api::{Api, ListParams};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::caches;
use super::client;
use super::context::{Context, FaultHook};
use super::drive::drive;
use super::events::Events;
use super::http::{HttpError, Readiness, Server};
use super::lease::{Elector, Intervals, Leadership, LeaseError};
use super::metrics::Metrics;
use super::progress::{Poller, http_client};
use super::reconcile::Scope;
use super::settings::Settings;
use finetune_api::FineTuneJob;

/// How often a resource that is not served is looked for.
const CRD_CHECK: Duration = Duration::from_secs(5);
/// How long running reconciliations may take to end at shutdown.
const SHUTDOWN: Duration = Duration::from_secs(15);

/// Leader election.
#[derive(Debug, Clone)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Name of this process.
    pub identity: String,
    /// How long it lasts.
    pub intervals: Intervals,
}

/// How the operator runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the pure steps need.
    pub settings: Settings,
    /// Namespaces to watch; all where empty.
    pub namespaces: Vec<String>,
    /// Reconciliations at the same time.
    pub concurrency: u16,
    /// Pause between two questions to a trainer.
    pub poll_interval: Duration,
    /// Where `/healthz`, `/readyz` and `/metrics` are served.
    pub address: SocketAddr,
    /// Where `/metrics` is served, if elsewhere.
    pub metrics_address: Option<SocketAddr>,
    /// Leader election; none where this is the only process.
    pub election: Option<Election>,
    /// Name of this process in events.
    pub instance: Option<String>,
    /// Whether nodes may be watched.
    pub watch_nodes: bool,
    /// Where to stop, in tests.
    pub faults: FaultHook,
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No client.
    #[error("failed to set up the Kubernetes client")]
    Client(#[source] Box<kube::Error>),
    /// No client for progress.
    #[error("failed to set up the HTTP client")]
    Http(#[source] reqwest::Error),
    /// A server could not start, or ended.
    #[error(transparent)]
    Server(#[from] HttpError),
    /// Leadership is over; the process must end.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A watch ended for good.
    #[error("failed to keep watching: every watch has ended")]
    WatchEnded,
}

/// Resolves when the process is to end.
type Shutdown = Shared<BoxFuture<'static, ()>>;

/// Runs until `shutdown` resolves, or leadership is lost. On shutdown no new reconciliation begins, those that run end, and the lease is released.
pub async fn run(config: Config, options: Options, metrics: Arc<Metrics>, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), RunError> {
    let client = client::build(config, Arc::clone(&metrics)).map_err(|error| RunError::Client(Box::new(error)))?;
    let readiness = Arc::new(Readiness::default());
    let mut servers = Vec::new();
    match options.metrics_address {
        Some(address) => {
            servers.push(Server::health(options.address, Arc::clone(&readiness)).await?);
            servers.push(Server::metrics(address, Arc::clone(&metrics)).await?);
        }
        None => servers.push(Server::all(options.address, Arc::clone(&readiness), Arc::clone(&metrics)).await?),
    }
    for server in &servers {
        tracing::info!(address = %server.address(), "serving");
    }
    let serving = futures::future::select_all(servers.into_iter().map(|server| server.serve().boxed()));
    // Whatever ends first ends the other: a dropped future stops at its next await.
    tokio::select! {
        (ended, ..) = serving => Ok(ended?),
        ended = work(&client, &options, &metrics, &readiness, shutdown.boxed().shared()) => ended,
    }
}

/// Waits for the resource and the lease, then controls until one of them is gone or `shutdown` resolves.
async fn work(client: &Client, options: &Options, metrics: &Arc<Metrics>, readiness: &Readiness, shutdown: Shutdown) -> Result<(), RunError> {
    tokio::select! {
        () = resource_served(client, options, metrics) => readiness.set_resource_served(true),
        () = shutdown.clone() => return Ok(()),
    }
    let Some(election) = &options.election else {
        return control(client, options, metrics, readiness, &Leadership::without_election(), shutdown).await;
    };
    let elector = Elector::new(client.clone(), &election.namespace, &election.name, &election.identity, election.intervals)?;
    let leadership = tokio::select! {
        leadership = elector.acquire() => leadership,
        () = shutdown.clone() => return Ok(()),
    };
    let ended = tokio::select! {
        // First in order: a lease that is lost must not be released.
        biased;
        lost = elector.hold(&leadership) => Err(lost.into()),
        ended = control(client, options, metrics, readiness, &leadership, shutdown) => ended,
    };
    metrics.set_leader(false);
    if ended.is_ok() {
        elector.release().await;
    }
    ended
}

/// Waits until the API server serves FineTuneJobs, instead of crashing again and again.
async fn resource_served(client: &Client, options: &Options, metrics: &Metrics) {
    let jobs: Api<FineTuneJob> = match options.namespaces.first() {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    loop {
        match tokio::time::timeout(CRD_CHECK, jobs.list_metadata(&ListParams::default().limit(1))).await {
            Ok(Ok(_)) => {
                metrics.set_crd_missing(false);
                return;
            }
            Ok(Err(kube::Error::Api(status))) if status.is_not_found() => {
                metrics.set_crd_missing(true);
                tracing::warn!("the API server does not serve finetunejobs.finetune.dev: install the CRD (finetune crd | kubectl apply -f -)");
            }
            Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to list FineTuneJobs; trying again"),
            Err(_elapsed) => tracing::warn!("failed to list FineTuneJobs: no answer; trying again"),
        }
        tokio::time::sleep(CRD_CHECK).await;
    }
}

/// Runs one controller for each watched namespace, or one for all.
async fn control(
    client: &Client,
    options: &Options,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
    leadership: &Leadership,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    metrics.set_leader(true);
    readiness.set_leading();
    let reporter = Reporter { controller: "finetune-operator".to_owned(), instance: options.instance.clone() };
    let ctx = Arc::new(Context::new(client.clone(), options.settings.clone(), Arc::clone(metrics), leadership.clone(), options.faults.clone()));
    let (events, publisher) = Events::new();
    let publishing = publisher.run(|| Recorder::new(client.clone(), reporter.clone()), &ctx);
    let poller = http_client().map_err(RunError::Http)?;
    let permits = Arc::new(Semaphore::new(usize::from(options.concurrency.max(1))));
    let namespaces: Vec<Option<&str>> =
        if options.namespaces.is_empty() { vec![None] } else { options.namespaces.iter().map(|name| Some(name.as_str())).collect() };
    // Dropped with this future, and its tasks with it.
    let mut tasks = JoinSet::new();
    let mut scopes = Vec::new();
    for namespace in namespaces {
        let (requests, received) = mpsc::unbounded_channel();
        let forget = Arc::clone(&ctx);
        let (caches, drivers) = caches::start(client, namespace, options.watch_nodes && namespace.is_none(), &requests, move |uid| forget.forget(uid));
        for driver in drivers {
            tasks.spawn(driver);
        }
        let counted = caches.clone();
        metrics.add_job_counts(Box::new(move || counted.counts()));
        let poller = Arc::new(Poller::new(poller.clone(), options.poll_interval, Arc::clone(metrics)));
        let pods = caches.pods.clone();
        // The receiver goes when the controller ends.
        let told = move |changed| drop(requests.send(caches::request_of(&changed)));
        tasks.spawn(Arc::clone(&poller).run(move || pods.state(), told));
        let scope = Scope { ctx: Arc::clone(&ctx), caches, poller, events: events.clone(), permits: Arc::clone(&permits) };
        scopes.push((Arc::new(scope), received));
    }
    tokio::select! {
        ready = futures::future::join_all(scopes.iter().map(|(scope, ..)| scope.caches.ready())) => {
            if !ready.into_iter().all(|ready| ready) {
                return Err(RunError::WatchEnded);
            }
        }
        () = shutdown.clone() => return Ok(()),
    }
    readiness.set_synced();
    tracing::info!("the caches are filled");
    drop(events);
    let ending = shutdown.clone();
    let controllers = scopes.into_iter().map(|(scope, received)| drive(scope, received, options.concurrency, ending.clone()));
    // With the scopes the queue's other ends are gone: the publisher ends when it has published what waits.
    let all = futures::future::join(futures::future::join_all(controllers), publishing);
    tokio::select! {
        _ended = all => Ok(()),
        () = async { shutdown.await; tokio::time::sleep(SHUTDOWN).await } => {
            tracing::warn!("reconciliations or events did not end in time");
            Ok(())
        }
    }
}
