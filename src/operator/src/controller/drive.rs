//! The workers: take jobs from the queue and reconcile them. All in one task: they wait for the API server most of the time, and memory stays in one
//! arena of the allocator.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use kube::ResourceExt as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::controller::caches::{JobRef, Request};
use crate::controller::queue::{Next, WorkQueue};
use crate::reconcile::{Scope, after_error, reconcile};

/// Events of a pod and of its Job come together; this is added to every latency.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Reconciles whatever is asked for, `workers` at the same time and never the same job twice at once, until `ending` resolves and the running ones are
/// through. Dropped, it drops them at their next await.
pub async fn drive(scope: Arc<Scope>, mut requests: mpsc::UnboundedReceiver<Request>, workers: u16, ending: impl Future<Output = ()>) {
    let mut ending = std::pin::pin!(ending);
    let mut queue = WorkQueue::<JobRef>::default();
    let mut running = FuturesUnordered::new();
    let mut told = 0;
    let workers = usize::from(workers.max(1));
    loop {
        while running.len() < workers {
            let Some((job, waited)) = queue.take(Instant::now()) else { break };
            scope.ctx.metrics.waited(waited);
            running.push(work(job, Arc::clone(&scope)));
        }
        scope.ctx.metrics.queued(std::mem::replace(&mut told, queue.ready()), queue.ready());
        let timer = queue.next_timer().filter(|_| running.len() < workers);
        tokio::select! {
            () = &mut ending => break,
            Some((job, next)) = running.next() => queue.done(&job, next, Instant::now()),
            request = requests.recv() => {
                // The watches have ended: so does the process.
                let Some(Request { job, urgency }) = request else { break };
                let now = Instant::now();
                queue.ask(job, urgency, now + DEBOUNCE, now);
            }
            () = tokio::time::sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => {}
        }
    }
    while running.next().await.is_some() {}
}

async fn work(job: JobRef, scope: Arc<Scope>) -> (JobRef, Next) {
    let Some(object) = scope.caches.jobs.get(&job) else {
        // Deleted since it was asked for, or a Job of others.
        tracing::debug!(namespace = job.namespace, job = job.name, "gone");
        return (job, Next::AwaitChange);
    };
    let next = match reconcile(&object, &scope).await {
        Ok(next) => {
            tracing::trace!(namespace = job.namespace, job = job.name, "reconciled");
            next
        }
        Err(error) => {
            tracing::warn!(namespace = job.namespace, job = job.name, class = error.class(), error = &error as &dyn std::error::Error, "failed to reconcile");
            after_error(&object.uid().unwrap_or_default(), &error, &scope)
        }
    };
    (job, next)
}
