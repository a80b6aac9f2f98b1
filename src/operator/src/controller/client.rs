//! The Kubernetes client: every request counted, and bounded in time by its callers.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::{Method, Request, Response};
use futures::future::BoxFuture;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use tower::{Layer, Service};

use crate::telemetry::metrics::Metrics;

/// A client without retries of its own: kube's default retries for up to hours, which would hang a reconciliation or a renewal of the lease. Every
/// caller has a backoff of its own.
pub fn build(mut config: Config, metrics: Arc<Metrics>) -> kube::Result<Client> {
    config.default_retry = false;
    Ok(ClientBuilder::try_from(config)?.with_layer(&CountLayer(metrics)).build())
}

/// Adds [`Count`].
#[derive(Debug, Clone)]
struct CountLayer(Arc<Metrics>);

impl<S> Layer<S> for CountLayer {
    type Service = Count<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Count { inner, metrics: Arc::clone(&self.0) }
    }
}

/// Counts `finetune_apiserver_requests_total{verb,resource,code}`.
#[derive(Debug, Clone)]
struct Count<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S, Body, Answer> Service<Request<Body>> for Count<S>
where
    S: Service<Request<Body>, Response = Response<Answer>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    Answer: Send + 'static,
{
    type Response = Response<Answer>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (verb, resource) = verb_and_resource(request.method(), request.uri().path(), request.uri().query());
        let metrics = Arc::clone(&self.metrics);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            match &answer {
                Ok(response) => metrics.api_request(verb, &resource, response.status().as_str()),
                Err(_) => metrics.api_request(verb, &resource, "error"),
            }
            answer
        })
    }
}

/// Verb and resource of a request, as RBAC names them. `/apis/GROUP/VERSION/[namespaces/NS/]RESOURCE[/NAME[/SUB]]`; "discovery" for all else.
fn verb_and_resource(method: &Method, path: &str, query: Option<&str>) -> (&'static str, String) {
    let mut parts = path.trim_matches('/').split('/');
    // "api/v1" or "apis/group/version".
    let skip = match parts.next() {
        Some("api") => 1,
        Some("apis") => 2,
        _ => usize::MAX,
    };
    let rest: Vec<&str> = parts.skip(skip).collect();
    let (resource, named) = match rest.as_slice() {
        ["namespaces", _, resource] | [resource] => ((*resource).to_owned(), false),
        ["namespaces", _, resource, _] | [resource, _] => ((*resource).to_owned(), true),
        ["namespaces", _, resource, _, sub] | [resource, _, sub] => (format!("{resource}/{sub}"), true),
        _ => ("discovery".to_owned(), true),
    };
    let verb = match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::GET if query.is_some_and(|query| query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1")) => "watch",
        Method::GET if !named => "list",
        Method::GET => "get",
        _ => "other",
    };
    (verb, resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_named_as_in_rbac() {
        let cases = [
            (Method::GET, "/apis/finetune.dev/v1alpha1/finetunejobs", None, "list", "finetunejobs"),
            (Method::GET, "/apis/finetune.dev/v1alpha1/finetunejobs", Some("limit=500&watch=true"), "watch", "finetunejobs"),
            (Method::GET, "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/b", None, "get", "finetunejobs"),
            (Method::GET, "/api/v1/namespaces/a/pods", Some("labelSelector=watch"), "list", "pods"),
            (Method::PATCH, "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/b/status", Some("fieldManager=x"), "patch", "finetunejobs/status"),
            (Method::POST, "/apis/batch/v1/namespaces/a/jobs", None, "create", "jobs"),
            (Method::POST, "/apis/events.k8s.io/v1/namespaces/a/events", None, "create", "events"),
            (Method::PUT, "/apis/coordination.k8s.io/v1/namespaces/a/leases/b", None, "update", "leases"),
            (Method::DELETE, "/apis/batch/v1/namespaces/a/jobs/b", None, "delete", "jobs"),
            (Method::GET, "/api/v1/nodes", Some("watch=1"), "watch", "nodes"),
            (Method::GET, "/api/v1/nodes/n", None, "get", "nodes"),
            (Method::GET, "/apis", None, "get", "discovery"),
            (Method::GET, "/apis/kueue.x-k8s.io/v1beta2", None, "get", "discovery"),
            (Method::GET, "/version", None, "get", "discovery"),
        ];
        for (method, path, query, verb, resource) in cases {
            assert_eq!(verb_and_resource(&method, path, query), (verb, resource.to_owned()), "{method} {path}");
        }
    }
}
