//! `/healthz`, `/readyz` and `/metrics`.
//!
//! `/healthz` says only that this process still answers: it must not depend on the API server, or an outage there would restart every operator.
//! `/readyz` says whether this process can do its work ([`Readiness`]). A standby is ready (it waits for the lease), else a rolling update with two
//! replicas would never end.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::controller::readiness::Readiness;
use crate::telemetry::metrics::Metrics;
use finetune_common::listen::listen;

/// Why a server could not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The address is taken or not ours.
    #[error("failed to listen on {address}")]
    Bind {
        /// Address asked for.
        address: SocketAddr,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The server ended.
    #[error("failed to serve on {address}")]
    Serve {
        /// Address served.
        address: SocketAddr,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// A bound listener, so that a taken address is an error at the start and the port may be 0.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
}

impl Server {
    /// Binds `/healthz` and `/readyz`.
    pub async fn health(address: SocketAddr, readiness: Arc<Readiness>) -> Result<Self, HttpError> {
        Self::bind(address, health_router(readiness)).await
    }

    /// Binds `/metrics`.
    pub async fn metrics(address: SocketAddr, metrics: Arc<Metrics>) -> Result<Self, HttpError> {
        Self::bind(address, metrics_router(metrics)).await
    }

    /// Binds all three on one address.
    pub async fn all(address: SocketAddr, readiness: Arc<Readiness>, metrics: Arc<Metrics>) -> Result<Self, HttpError> {
        Self::bind(address, health_router(readiness).merge(metrics_router(metrics))).await
    }

    async fn bind(address: SocketAddr, router: Router) -> Result<Self, HttpError> {
        let listener = listen(address).await.map_err(|source| HttpError::Bind { address, source })?;
        let address = listener.local_addr().map_err(|source| HttpError::Bind { address, source })?;
        Ok(Self { listener, address, router })
    }

    /// The address bound.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the process ends.
    pub async fn serve(self) -> Result<(), HttpError> {
        let address = self.address;
        axum::serve(self.listener, self.router).await.map_err(|source| HttpError::Serve { address, source })
    }
}

fn health_router(readiness: Arc<Readiness>) -> Router {
    Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready)).with_state(readiness)
}

fn metrics_router(metrics: Arc<Metrics>) -> Router {
    Router::new().route("/metrics", get(serve_metrics)).with_state(metrics)
}

async fn ready(State(readiness): State<Arc<Readiness>>) -> Response {
    match readiness.check() {
        (true, text) => text.into_response(),
        (false, missing) => (StatusCode::SERVICE_UNAVAILABLE, missing).into_response(),
    }
}

async fn serve_metrics(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to encode the metrics: {error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_three_paths_answer_over_http() {
        let metrics = Arc::new(Metrics::new());
        let readiness = Arc::new(Readiness::new(Arc::clone(&metrics)));
        let server = Server::all(([127, 0, 0, 1], 0).into(), Arc::clone(&readiness), metrics).await.unwrap();
        let base = format!("http://{}", server.address());
        let task = tokio::spawn(server.serve());
        let client = crate::controller::progress::http_client().unwrap();
        let status = async |path: &str| client.get(format!("{base}{path}")).send().await.unwrap().status().as_u16();
        assert_eq!(status("/healthz").await, 200, "alive even while the API server is away");
        assert_eq!(status("/readyz").await, 503);
        readiness.set_resource_served(true);
        assert_eq!(status("/readyz").await, 200);
        let text = client.get(format!("{base}/metrics")).send().await.unwrap().text().await.unwrap();
        assert!(text.contains("finetune_leader 0"), "{text}");
        task.abort();
    }
}
