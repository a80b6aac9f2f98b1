//! The Kubernetes client: every request counted, and bounded in time by its callers.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::{Method, Request, Response};
use futures::future::BoxFuture;
use kube::client::ClientBuilder;
use kube::{Client, Config};
use tower::{Layer, Service};

use super::metrics::Metrics;

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

/// Counts `finetune_apiserver_requests_total{verb,code}`.
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
        let verb = verb(request.method(), request.uri().path(), request.uri().query());
        let metrics = Arc::clone(&self.metrics);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            match &answer {
                Ok(response) => metrics.api_request(verb, response.status().as_str()),
                Err(_) => metrics.api_request(verb, "error"),
            }
            answer
        })
    }
}

/// The Kubernetes verb of a request, as in RBAC. `/apis/GROUP/VERSION/[namespaces/NS/]RESOURCE[/NAME[/SUB]]`.
fn verb(method: &Method, path: &str, query: Option<&str>) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::GET => {
            if query.is_some_and(|query| query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1")) {
                return "watch";
            }
            let mut parts = path.trim_start_matches('/').split('/');
            // "api/v1" or "apis/group/version".
            let skip = if parts.next() == Some("api") { 1 } else { 2 };
            let rest: Vec<&str> = parts.skip(skip).collect();
            match rest.as_slice() {
                ["namespaces", _, _resource] | [_resource] => "list",
                _ => "get",
            }
        }
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_those_of_rbac() {
        let cases = [
            (Method::GET, "/apis/finetune.dev/v1alpha1/finetunejobs", None, "list"),
            (Method::GET, "/apis/finetune.dev/v1alpha1/finetunejobs", Some("limit=500&watch=true"), "watch"),
            (Method::GET, "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/b", None, "get"),
            (Method::GET, "/api/v1/namespaces/a/pods", Some("labelSelector=watch"), "list"),
            (Method::PATCH, "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/b/status", Some("fieldManager=x"), "patch"),
            (Method::POST, "/apis/batch/v1/namespaces/a/jobs", None, "create"),
            (Method::PUT, "/apis/coordination.k8s.io/v1/namespaces/a/leases/b", None, "update"),
            (Method::DELETE, "/apis/batch/v1/namespaces/a/jobs/b", None, "delete"),
        ];
        for (method, path, query, want) in cases {
            assert_eq!(verb(&method, path, query), want, "{method} {path}");
        }
    }
}
