//! Wires the controller: servers, lease, caches, reconciliations, shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use jiff::Timestamp;
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::controller::caches::{self, Request};
use crate::controller::client;
use crate::controller::context::{Context, FaultHook};
use crate::controller::drive::drive;
use crate::controller::lease::{Elector, Intervals, Leadership, LeaseError};
use crate::controller::progress::{Poller, http_client};
use crate::controller::readiness::{self, Readiness, until};
use crate::reconcile::Scope;
use crate::settings::Settings;
use crate::telemetry::events::Events;
use crate::telemetry::http::{HttpError, Server};
use crate::telemetry::metrics::Metrics;
use finetune_api::{API_VERSION, KIND};

/// How often it is looked whether the resource is served.
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

impl Election {
    /// A name for this very process. A restarted container has the name and, always, the process id of the one before: a random part sets them apart.
    pub fn holder(name: &str) -> String {
        format!("{name}_{:016x}", rand::random::<u64>())
    }
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
    let readiness = Arc::new(Readiness::new(Arc::clone(&metrics)));
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

/// Waits for the resource, then for the lease, and controls until one of them is gone or `shutdown` resolves. Whether the resource is served is noted all
/// the while.
async fn work(client: &Client, options: &Options, metrics: &Arc<Metrics>, readiness: &Arc<Readiness>, shutdown: Shutdown) -> Result<(), RunError> {
    let (found, mut served) = tokio::sync::watch::channel(false);
    let waiting = shutdown.clone();
    let leading = async {
        tokio::select! {
            // The other end lives as long as this future.
            _ = until(&mut served) => Box::pin(lead(client, options, metrics, readiness, shutdown)).await,
            () = waiting => Ok(()),
        }
    };
    tokio::select! {
        ended = leading => ended,
        never = watch_resource(client, readiness, &found) => match never {},
    }
}

/// Waits for the lease, then controls until it is lost or `shutdown` resolves.
async fn lead(client: &Client, options: &Options, metrics: &Arc<Metrics>, readiness: &Arc<Readiness>, shutdown: Shutdown) -> Result<(), RunError> {
    let Some(election) = &options.election else {
        return Box::pin(control(client, options, metrics, readiness, &Leadership::without_election(), shutdown)).await;
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

/// Looks again and again whether the API server serves FineTuneJobs. By discovery, which everybody may read: what may not be listed in one namespace says
/// nothing about the resource.
async fn watch_resource(client: &Client, readiness: &Readiness, found: &tokio::sync::watch::Sender<bool>) -> std::convert::Infallible {
    loop {
        match tokio::time::timeout(CRD_CHECK, client.list_api_group_resources(API_VERSION)).await {
            Ok(Ok(list)) => note_served(readiness, found, list.resources.iter().any(|resource| resource.kind == KIND)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => note_served(readiness, found, false),
            Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to look for the FineTuneJob resource; trying again"),
            Err(_elapsed) => tracing::warn!("failed to look for the FineTuneJob resource: no answer; trying again"),
        }
        tokio::time::sleep(CRD_CHECK).await;
    }
}

fn note_served(readiness: &Readiness, found: &tokio::sync::watch::Sender<bool>, served: bool) {
    let news = readiness.set_resource_served(served);
    found.send_replace(served);
    if !served {
        tracing::warn!("the API server does not serve finetunejobs.finetune.dev: install the CRD (finetune crd | kubectl apply -f -)");
    } else if news {
        tracing::info!("the API server serves finetunejobs.finetune.dev");
    }
}

/// Runs one controller for each watched namespace, or one for all. Each begins when its own caches are filled: a namespace that is gone or forbidden stops
/// nobody else.
async fn control(
    client: &Client,
    options: &Options,
    metrics: &Arc<Metrics>,
    readiness: &Arc<Readiness>,
    leadership: &Leadership,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    metrics.set_leader(true);
    // The empty name stands for all.
    let namespaces = if options.namespaces.is_empty() { vec![String::new()] } else { options.namespaces.clone() };
    readiness.lead(&namespaces);
    let reporter = Reporter { controller: "finetune-operator".to_owned(), instance: options.instance.clone() };
    let ctx = Arc::new(Context::new(client.clone(), options.settings.clone(), Arc::clone(metrics), leadership.clone(), options.faults.clone()));
    let (events, publisher) = Events::new();
    let publishing = publisher.run(|| Recorder::new(client.clone(), reporter.clone()), &ctx);
    let poller = http_client().map_err(RunError::Http)?;
    let permits = Arc::new(Semaphore::new(usize::from(options.concurrency.max(1))));
    // Dropped with this future, and its tasks with it.
    let mut tasks = JoinSet::new();
    let mut controllers = Vec::new();
    for name in namespaces {
        let namespace = Some(name.as_str()).filter(|name| !name.is_empty());
        let (requests, received) = mpsc::unbounded_channel();
        let forget = Arc::clone(&ctx);
        let watch_nodes = options.watch_nodes && namespace.is_none();
        let (caches, drivers) = caches::start(client, namespace, watch_nodes, &requests, readiness, move |uid| forget.forget(uid));
        for driver in drivers {
            tasks.spawn(driver);
        }
        let counted = caches.clone();
        metrics.add_job_counts(Box::new(move || counted.census(Timestamp::now())));
        let poller = Arc::new(Poller::new(poller.clone(), options.poll_interval, Arc::clone(metrics)));
        let asked = caches.clone();
        // The receiver goes when the controller ends.
        let told = move |changed| drop(requests.send(caches::request_of(&changed)));
        tasks.spawn(Arc::clone(&poller).run(move || asked.trainers(), told));
        let scope = Scope { ctx: Arc::clone(&ctx), caches, poller, events: events.clone(), permits: Arc::clone(&permits) };
        controllers.push(serve(name, scope, received, options.concurrency, Arc::clone(readiness), shutdown.clone()));
    }
    drop(events);
    // With the scopes the queue's other ends are gone: the publisher ends when it has published what waits.
    let all = async {
        let (ended, ()) = futures::future::join(futures::future::try_join_all(controllers), publishing).await;
        ended.map(drop)
    };
    tokio::select! {
        ended = all => ended,
        () = async { shutdown.await; tokio::time::sleep(SHUTDOWN).await } => {
            tracing::warn!("reconciliations or events did not end in time");
            Ok(())
        }
    }
}

/// Controls one watched namespace, or all, from when its caches are filled.
async fn serve(
    namespace: String,
    scope: Scope,
    received: mpsc::UnboundedReceiver<Request>,
    concurrency: u16,
    readiness: Arc<Readiness>,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    tokio::select! {
        ready = scope.caches.ready() => if !ready { return Err(RunError::WatchEnded) },
        () = shutdown.clone() => return Ok(()),
    }
    readiness.set_synced(&namespace);
    tracing::info!("{}: the caches are filled", readiness::Scope(&namespace));
    drive(Arc::new(scope), received, concurrency, shutdown).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_container_is_another_holder() {
        let (before, after) = (Election::holder("finetune-operator-0"), Election::holder("finetune-operator-0"));
        assert!(before.starts_with("finetune-operator-0_") && before != after, "{before} {after}");
    }
}
