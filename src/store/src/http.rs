//! The HTTP client under every bucket: retries, a total time limit, and errors that can be classified and shown.
//!
//! `object_store` can retry too, but keeps the status of most failures to itself, ignores `Retry-After`, and cannot tell a request
//! that was certainly refused from one that may have been carried out. So its requests go through [`RetryingService`], which
//! answers with success or with a [`HttpFailure`] that `object_store` hands up unchanged.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use object_store::ClientOptions;
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService, ReqwestConnector};
use quick_xml::escape::unescape;

use super::env::Secrets;
use super::listing;
use super::retry::{Attempts, RetryPolicy};

/// Why a request failed for good. Holds no address and no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HttpFailure {
    /// The server answered, with an error.
    #[error("the server answered {status}{}{}{}", spaced(.code), colon(.message), spent(*.attempts, *.elapsed))]
    Status { status: u16, code: String, message: String, attempts: u32, elapsed: Duration },
    /// No answer.
    #[error("{message}{}", spent(*.attempts, *.elapsed))]
    Transport { message: String, attempts: u32, elapsed: Duration },
    /// The server, or the connection to it, cannot be used as it is set up: no further attempt helps.
    #[error("{message}")]
    Unusable { message: String },
    /// The environment has no credentials, and there is no metadata service to ask.
    #[error("no credentials: set them in the environment or run with a workload identity (asking the metadata service: {message})")]
    NoCredentials { message: String },
}

fn spaced(code: &str) -> String {
    if code.is_empty() { String::new() } else { format!(" {code}") }
}

fn colon(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

fn spent(attempts: u32, elapsed: Duration) -> String {
    if attempts <= 1 { String::new() } else { format!(" (gave up after {attempts} attempts in {:.1} s)", elapsed.as_secs_f64()) }
}

impl HttpFailure {
    /// True when the request may have been carried out although it failed, or may succeed when it is sent again.
    pub(super) fn is_doubtful(&self) -> bool {
        match self {
            Self::Status { status, code, .. } => is_transient(*status, code),
            Self::Transport { .. } => true,
            Self::Unusable { .. } | Self::NoCredentials { .. } => false,
        }
    }
}

/// Answers that another attempt may turn into success.
pub(super) fn is_transient(status: u16, code: &str) -> bool {
    // S3 reports a slow upload as 400 RequestTimeout. 501 and 505 say that the server never will.
    matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 506..=599) || code == "RequestTimeout"
}

/// The wait that a `Retry-After` header of whole seconds asks for.
pub(super) fn retry_after(headers: &object_store::HeaderMap) -> Option<Duration> {
    headers.get("retry-after")?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// Makes [`RetryingService`]s; given to each store's builder.
#[derive(Debug)]
pub(super) struct RetryingConnector {
    pub(super) policy: RetryPolicy,
    pub(super) secrets: Secrets,
    /// The variable that names a file of further certificate authorities.
    pub(super) ca_variable: &'static str,
}

impl HttpConnector for RetryingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let (policy, secrets) = (self.policy.clone(), self.secrets.clone());
        Ok(HttpClient::new(RetryingService { inner, policy, secrets, ca_variable: self.ca_variable, left_out: Mutex::default() }))
    }
}

#[derive(Debug)]
struct RetryingService {
    inner: HttpClient,
    policy: RetryPolicy,
    secrets: Secrets,
    ca_variable: &'static str,
    /// Keys that were left out of listings and named, so that each is named once.
    left_out: Mutex<HashSet<String>>,
}

impl HttpService for RetryingService {
    fn call<'life, 'result>(&'life self, request: HttpRequest) -> BoxFuture<'result, Result<HttpResponse, HttpError>>
    where
        'life: 'result,
        Self: 'result,
    {
        Box::pin(async move {
            // Kind "unknown" keeps object_store from retrying once more.
            self.send(request).await.map_err(|failure| HttpError::new(HttpErrorKind::Unknown, failure))
        })
    }
}

impl RetryingService {
    async fn send(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpFailure> {
        spell_spaces_plainly(&mut request);
        let metadata_service = request.uri().host().is_some_and(is_metadata_service);
        let mut policy = self.policy.clone();
        if metadata_service {
            // Outside a cloud nobody answers there: do not wait for minutes to find out.
            policy.max_retries = policy.max_retries.min(2);
            policy.total = policy.total.min(Duration::from_secs(10));
        }
        // A conditional create that failed may have been carried out. Its caller decides what to make of that.
        let once = request.headers().contains_key("if-none-match") || request.headers().contains_key("x-goog-if-generation-match");
        let method = request.method().clone();
        let mut attempts = Attempts::new(&policy);
        loop {
            let answer = tokio::time::timeout(attempts.remaining(), self.inner.execute(request.clone())).await;
            let (failure, asked) = match answer {
                Ok(Ok(response)) if response.status().is_success() => match self.checked(&request, response, &attempts).await {
                    Ok(response) => return Ok(response),
                    Err(failure) => (failure, None),
                },
                Ok(Ok(response)) => self.status_failure(response, &attempts).await,
                Ok(Err(error)) => (self.transport_failure(&error, &attempts), None),
                Err(_elapsed) => {
                    let message = "no answer within the time limit".to_owned();
                    (HttpFailure::Transport { message, attempts: attempts.made(), elapsed: attempts.elapsed() }, None)
                }
            };
            let delay = if once || !failure.is_doubtful() { None } else { attempts.next_delay(asked) };
            let Some(delay) = delay else {
                let denied = matches!(&failure, HttpFailure::Status { status: 400..=499, .. });
                return Err(if metadata_service && !denied { HttpFailure::NoCredentials { message: failure.to_string() } } else { failure });
            };
            tracing::warn!(%method, attempt = attempts.made(), delay_ms = delay.as_millis() as u64, error = %failure, "retrying a storage request");
            tokio::time::sleep(delay).await;
        }
    }

    /// An answer of success, made what `object_store` expects, or the failure that it hides.
    async fn checked(&self, request: &HttpRequest, response: HttpResponse, attempts: &Attempts) -> Result<HttpResponse, HttpFailure> {
        let (method, query) = (request.method().as_str(), request.uri().query().unwrap_or_default());
        if method == "POST" && query.contains("uploadId=") {
            return self.hidden_failure(response, attempts).await;
        }
        if method == "GET"
            && let Some(dialect) = listing::dialect(query)
        {
            return self.readable_listing(&dialect, query, response, attempts).await;
        }
        match request.headers().get("range").and_then(|range| range.to_str().ok()) {
            Some(range) if response.status().as_u16() == 200 => as_partial(range, response),
            _ => Ok(response),
        }
    }

    /// A page of a listing without the keys that no path can hold, which are named in the log.
    async fn readable_listing(
        &self,
        dialect: &listing::Dialect,
        query: &str,
        response: HttpResponse,
        attempts: &Attempts,
    ) -> Result<HttpResponse, HttpFailure> {
        let (parts, body) = response.into_parts();
        let body = body.bytes().await.map_err(|error| self.transport_failure(&error, attempts))?;
        let page = listing::page(dialect, query, &body).map_err(|message| HttpFailure::Unusable { message })?;
        let mut named = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<String> = page.left_out.into_iter().filter(|key| named.insert(key.clone())).collect();
        drop(named);
        if !new.is_empty() {
            let first = new.iter().take(10).map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ");
            tracing::warn!(
                count = new.len(),
                first,
                "objects were left out of a listing: \"//\", \".\", \"..\" control characters and what is no text cannot be in a name here"
            );
        }
        Ok(HttpResponse::from_parts(parts, page.body.into_bytes().into()))
    }

    /// S3 completes an upload with status 200 before it knows the outcome, which may be an error in the body.
    async fn hidden_failure(&self, response: HttpResponse, attempts: &Attempts) -> Result<HttpResponse, HttpFailure> {
        let (parts, body) = response.into_parts();
        let body = body.bytes().await.map_err(|error| self.transport_failure(&error, attempts))?;
        let text = String::from_utf8_lossy(&body);
        if !text.contains("<Error>") {
            return Ok(HttpResponse::from_parts(parts, body.into()));
        }
        let (code, message) = explain(&text);
        let status = if matches!(code.as_str(), "InternalError" | "SlowDown" | "ServiceUnavailable") { 503 } else { 400 };
        Err(HttpFailure::Status {
            status,
            code: self.secrets.redact(&code),
            message: self.secrets.redact(&message),
            attempts: attempts.made(),
            elapsed: attempts.elapsed(),
        })
    }

    async fn status_failure(&self, response: HttpResponse, attempts: &Attempts) -> (HttpFailure, Option<Duration>) {
        let asked = retry_after(response.headers());
        let status = response.status().as_u16();
        let body = tokio::time::timeout(Duration::from_secs(5), start_of(response.into_body())).await.unwrap_or_default();
        let (code, message) = explain(&String::from_utf8_lossy(&body));
        let failure = HttpFailure::Status {
            status,
            code: self.secrets.redact(&code),
            message: self.secrets.redact(&message),
            attempts: attempts.made(),
            elapsed: attempts.elapsed(),
        };
        (failure, asked)
    }

    fn transport_failure(&self, error: &HttpError, attempts: &Attempts) -> HttpFailure {
        // After the handshake a broken record is the network's fault, and another attempt may do.
        if error.kind() == HttpErrorKind::Connect
            && let Some(tls) = tls_failure(error)
        {
            let authority = format!("if a private authority signed its certificate, give that in storage.caBundleConfigMapRef or {}", self.ca_variable);
            let way_out = match tls {
                rustls::Error::InvalidCertificate(_) => authority,
                _ => format!("check that the endpoint's port speaks TLS, and write http:// where it does not; {authority}"),
            };
            return HttpFailure::Unusable { message: format!("no encrypted connection to the server: {}; {way_out}", self.secrets.redact(&tls.to_string())) };
        }
        HttpFailure::Transport { message: self.secrets.redact(&chain(error)), attempts: attempts.made(), elapsed: attempts.elapsed() }
    }
}

/// Writes the spaces in a listing's query as `%20`.
fn spell_spaces_plainly(request: &mut HttpRequest) {
    let text = request.uri().to_string();
    let plain = text.split_once('?').filter(|(_, query)| listing::dialect(query).is_some());
    if let Some(uri) = plain.and_then(|(address, query)| format!("{address}?{}", listing::with_plain_spaces(query)).parse().ok()) {
        *request.uri_mut() = uri;
    }
}

/// The answer 200 to a request for `range`, as the 206 that it should be, if its `Content-Range` says that it holds just that part.
fn as_partial(range: &str, mut response: HttpResponse) -> Result<HttpResponse, HttpFailure> {
    let said = response.headers().get("content-range").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let start = range.strip_prefix("bytes=").and_then(|range| range.split('-').next()).unwrap_or_default();
    // object_store compares the whole range and the size.
    if said.strip_prefix("bytes ").and_then(|said| said.split_once('-')).is_some_and(|(from, _)| from == start) {
        *response.status_mut() = reqwest::StatusCode::PARTIAL_CONTENT;
        return Ok(response);
    }
    let said = if said.is_empty() { "without Content-Range".to_owned() } else { format!("with Content-Range: {said}") };
    Err(HttpFailure::Unusable { message: format!("the server answered a request for a range ({range}) with 200, {said}: it does not serve parts of objects") })
}

/// The TLS library's error among the causes of `error`.
fn tls_failure<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(found) = current.downcast_ref() {
            return Some(found);
        }
        // What an I/O error wraps is not its source.
        next = match current.downcast_ref::<std::io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => current.source(),
        };
    }
    None
}

fn is_metadata_service(host: &str) -> bool {
    matches!(host, "169.254.169.254" | "169.254.170.2" | "169.254.170.23" | "[fd00:ec2::23]" | "metadata" | "metadata.google.internal")
}

/// The first 16 KiB of a body; what arrived of it when it breaks off.
async fn start_of(body: HttpResponseBody) -> Vec<u8> {
    let mut stream = body.bytes_stream();
    let mut start = Vec::new();
    while let Some(Ok(piece)) = stream.next().await {
        let piece: Bytes = piece;
        start.extend_from_slice(&piece[..piece.len().min(16_384 - start.len())]);
        if start.len() == 16_384 {
            break;
        }
    }
    start
}

/// Error code and message of an S3, Azure or Google error document (XML, or JSON as `{"error": {"code", "message"}}`).
fn explain(body: &str) -> (String, String) {
    if let Ok(document) = serde_json::from_str::<serde_json::Value>(body) {
        let error = document.get("error").unwrap_or(&document);
        let text = |field: &str| error.get(field).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
        let message = error.as_str().map_or_else(|| text("message"), str::to_owned);
        return (text("status"), message);
    }
    let text = |name: &str| listing::element(body, name).map(|text| unescape(text).map_or_else(|_| text.to_owned(), Cow::into_owned)).unwrap_or_default();
    (text("Code"), text("Message"))
}

/// An error and its causes in one line; a cause whose text its parent repeats is left out.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_documents_of_the_three_providers_are_read() {
        let s3 = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message><RequestId>1</RequestId></Error>";
        assert_eq!(explain(s3), ("AccessDenied".into(), "Access Denied".into()));
        let google = r#"{"error": {"code": 403, "message": "no access", "status": "PERMISSION_DENIED"}}"#;
        assert_eq!(explain(google), ("PERMISSION_DENIED".into(), "no access".into()));
        assert_eq!(explain(r#"{"error": "Repository not found"}"#), (String::new(), "Repository not found".into()));
        let escaped = "<Error><Code>AccessDenied</Code><Message>the server&#39;s time &amp; yours</Message></Error>";
        assert_eq!(explain(escaped).1, "the server's time & yours");
        assert_eq!(explain("<html>oops"), (String::new(), String::new()));
    }

    #[test]
    fn transient_answers_are_told_from_final_ones() {
        for status in [408, 429, 500, 502, 503, 504] {
            assert!(is_transient(status, ""), "{status}");
        }
        for status in [301, 400, 401, 403, 404, 409, 412, 416, 501] {
            assert!(!is_transient(status, ""), "{status}");
        }
        assert!(is_transient(400, "RequestTimeout"));
    }

    #[test]
    fn a_failure_tells_attempts_and_time() {
        let failure =
            HttpFailure::Status { status: 503, code: "SlowDown".into(), message: "reduce your rate".into(), attempts: 3, elapsed: Duration::from_millis(1500) };
        assert_eq!(failure.to_string(), "the server answered 503 SlowDown: reduce your rate (gave up after 3 attempts in 1.5 s)");
    }
}
