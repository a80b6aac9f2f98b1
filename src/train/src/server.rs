//! `GET /progress` (JSON for the operator) and `GET /metrics` (Prometheus), while a run lasts.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Json};
use axum::routing::get;

use super::report::Reporter;
use finetune_common::listen::listen;

/// Where the operator looks.
pub const PORT: u16 = 9400;

/// Starts serving in the background; returns the address in use (`port` 0: any free one).
///
/// # Errors
/// If the address cannot be listened on.
pub async fn serve(address: SocketAddr, reporter: Reporter) -> std::io::Result<SocketAddr> {
    let listener = listen(address).await?;
    let address = listener.local_addr()?;
    let app = Router::new().route("/progress", get(progress)).route("/metrics", get(metrics)).with_state(reporter);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the progress server has stopped");
        }
    });
    Ok(address)
}

async fn progress(State(reporter): State<Reporter>) -> impl IntoResponse {
    Json(reporter.progress())
}

async fn metrics(State(reporter): State<Reporter>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], reporter.metrics())
}
