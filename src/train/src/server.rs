//! `GET /progress` (JSON for the operator), `GET /metrics` (Prometheus) and `GET /` (the page, for people), while a run lasts.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{Html, IntoResponse, Json, Response};
use axum::routing::get;

use super::page::Page;
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
    let app = Router::new()
        .route("/progress", get(progress))
        .route("/metrics", get(metrics))
        .route("/", get(page))
        .route("/report.json", get(page_data))
        .with_state(reporter);
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

async fn page(State(reporter): State<Reporter>) -> Response {
    answer(reporter, |page| page.html().map(|html| Html(html).into_response())).await
}

async fn page_data(State(reporter): State<Reporter>) -> Response {
    answer(reporter, |page| page.live().map(|json| ([(CONTENT_TYPE, "application/json")], json).into_response())).await
}

/// Made beside the threads that serve the run's transfers: a page may have megabytes.
async fn answer<E: std::error::Error + Send + 'static>(reporter: Reporter, make: impl FnOnce(&Page) -> Result<Response, E> + Send + 'static) -> Response {
    let failed = |error: &dyn std::error::Error| (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to make the page: {error}")).into_response();
    match tokio::task::spawn_blocking(move || make(&reporter.page())).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}
