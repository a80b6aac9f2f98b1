//! Client of the Hugging Face hub: the files of one commit.
//!
//! The access token goes to the hub's own origin only: redirects are followed by hand, and a request to any other host (where
//! large files live) carries no credentials.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, HeaderMap, LOCATION, RANGE};
use url::Url;

use super::hub_cache;
use super::select::RemoteFile;
use crate::download::{Identity, Opened, Remote};
use crate::env::Secrets;
use crate::error::{Cause, Result, StoreError};
use crate::http::{chain, is_transient};
use crate::retry::{Attempts, RetryPolicy};
use crate::{StoreOptions, check_key};

/// The public hub.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Largest answer of the hub's API that is read.
const MAX_LISTING_BYTES: usize = 16 << 20;
/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 5;

/// The client with the certificates of `HF_CA_BUNDLE`, else of the job's storage: a mirror behind a private authority.
fn trusting(mut client: reqwest::ClientBuilder, options: &StoreOptions) -> Result<reqwest::ClientBuilder> {
    let Some(path) = options.environment.get("HF_CA_BUNDLE").map(PathBuf::from).or_else(|| options.ca_bundle.clone()) else { return Ok(client) };
    let pem = std::fs::read(&path).map_err(StoreError::local("read the CA bundle", &path))?;
    let invalid = |problem: &str| StoreError::invalid(&path.display().to_string(), problem);
    let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| invalid(&format!("the CA bundle cannot be read: {}", chain(&error))))?;
    if certificates.is_empty() {
        return Err(invalid("the CA bundle holds no PEM certificate"));
    }
    for certificate in certificates {
        client = client.add_root_certificate(certificate);
    }
    Ok(client)
}
/// First byte and, unless it is the file's, the last.
type ByteRange = (u64, Option<u64>);

/// One repository of the hub at one commit.
#[derive(Clone)]
pub(super) struct Hub {
    shared: Arc<Shared>,
}

struct Shared {
    http: reqwest::Client,
    endpoint: Url,
    repo: String,
    revision: String,
    token: Option<String>,
    secrets: Secrets,
    retry: RetryPolicy,
    /// The commit's folder in the cache of the hub's own tools.
    snapshot: Option<PathBuf>,
}

impl Hub {
    /// A client for commit `revision` of `repo`. `HF_ENDPOINT` and `HF_TOKEN` come from the environment.
    pub(super) fn new(repo: &str, revision: &str, options: &StoreOptions) -> Result<Self> {
        let location = format!("https://huggingface.co/{repo}");
        let name_ok = |name: &str| !name.is_empty() && !name.starts_with('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !repo.split_once('/').is_some_and(|(owner, name)| name_ok(owner) && name_ok(name)) {
            return Err(StoreError::invalid(&location, "a repository of the hub is named owner/name"));
        }
        if revision.len() != 40 || !revision.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(StoreError::invalid(&location, "the revision must be a commit, 40 hexadecimal digits: branches and tags may change between attempts"));
        }
        let endpoint_text = options.environment.get("HF_ENDPOINT").unwrap_or(DEFAULT_ENDPOINT);
        let endpoint = Url::parse(endpoint_text.trim_end_matches('/')).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint = endpoint.filter(|url| url.username().is_empty() && url.password().is_none() && url.query().is_none());
        let endpoint = endpoint.ok_or_else(|| StoreError::invalid(endpoint_text, "HF_ENDPOINT must be an address such as https://huggingface.co"))?;
        let secrets = options.environment.secrets();
        // The process has one TLS provider; a second installation is refused and changes nothing.
        let _already_installed = rustls::crypto::ring::default_provider().install_default();
        let http = trusting(reqwest::Client::builder(), options)?
            .user_agent(concat!("finetune-operator/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(options.retry.connect_timeout)
            .read_timeout(options.retry.read_timeout)
            .build()
            .map_err(|error| StoreError::Setup { location, source: Cause(secrets.redact(&chain(&error))) })?;
        let shared = Shared {
            http,
            endpoint,
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            token: options.environment.get("HF_TOKEN").map(|token| token.trim().to_owned()),
            secrets,
            retry: options.retry.clone(),
            snapshot: options.environment.hub_cache().map(|cache| hub_cache::snapshot(&cache, repo, revision)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Name of the repository at its commit, for people.
    pub(super) fn location(&self) -> String {
        format!("{}/{} at commit {}", self.shared.endpoint.as_str().trim_end_matches('/'), self.shared.repo, self.shared.revision)
    }

    /// The commit's folder in the cache of the hub's own tools, which may not be there.
    pub(super) fn snapshot(&self) -> Option<&Path> {
        self.shared.snapshot.as_deref()
    }

    pub(super) fn retry(&self) -> &RetryPolicy {
        &self.shared.retry
    }

    /// The repository's files at the commit. Names that are no clean relative paths are refused as a whole: a hub that sends
    /// them is not to be trusted with the rest.
    pub(super) async fn list(&self) -> Result<Vec<RemoteFile>> {
        #[derive(serde::Deserialize)]
        struct Answer {
            #[serde(default)]
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            #[serde(rename = "blobId")]
            blob_id: Option<String>,
            lfs: Option<Lfs>,
        }
        #[derive(serde::Deserialize)]
        struct Lfs {
            sha256: String,
            size: u64,
        }

        let mut url = self.address(&["api", "models"], &self.shared.repo);
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push("revision").push(&self.shared.revision);
        }
        url.set_query(Some("blobs=true"));
        let location = self.location();
        let body = self.get_bytes(url, None, MAX_LISTING_BYTES).await?;
        let answer: Answer =
            serde_json::from_slice(&body).map_err(|error| StoreError::corrupt(&location, format!("the hub's answer is not a list of files: {error}")))?;
        if answer.sha != self.shared.revision {
            return Err(StoreError::corrupt(location, format!("the hub answered for commit {:?}", self.shared.secrets.redact(&answer.sha))));
        }
        let mut files = Vec::with_capacity(answer.siblings.len());
        for sibling in answer.siblings {
            check_key(&sibling.rfilename).map_err(|error| StoreError::corrupt(&location, error.to_string()))?;
            if sibling.rfilename.contains('\\') {
                return Err(StoreError::corrupt(location, format!("it holds a file named {:?}", sibling.rfilename)));
            }
            let (size, sha256) = match sibling.lfs {
                Some(lfs) => (Some(lfs.size), Some(lfs.sha256)),
                None => (sibling.size, None),
            };
            let Some(size) = size else { return Err(StoreError::corrupt(location, format!("the hub does not tell the size of {:?}", sibling.rfilename))) };
            if sha256.as_deref().is_some_and(|sha256| finetune_common::digest::from_text(sha256).is_none()) {
                return Err(StoreError::corrupt(location, format!("the hub's digest of {:?} is malformed", sibling.rfilename)));
            }
            files.push(RemoteFile { path: sibling.rfilename, size, sha256, version: sibling.blob_id });
        }
        Ok(files)
    }

    /// `<endpoint>/<prefix...>/<owner>/<name>`.
    fn address(&self, prefix: &[&str], repo: &str) -> Url {
        let mut url = self.shared.endpoint.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(prefix).extend(repo.split('/'));
        }
        url
    }

    fn file_address(&self, path: &str) -> Url {
        let mut url = self.address(&[], &self.shared.repo);
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push("resolve").push(&self.shared.revision).extend(path.split('/'));
        }
        url
    }

    /// The first `bytes` of a file, or all of a shorter one.
    pub(super) async fn first_bytes(&self, path: &str, bytes: usize) -> Result<Vec<u8>> {
        let last = (bytes as u64).saturating_sub(1);
        self.get_bytes(self.file_address(path), Some((0, Some(last))), bytes).await
    }

    /// Reads a small answer whole, or its first `most` bytes where a range is asked for; retries include its body.
    async fn get_bytes(&self, url: Url, range: Option<ByteRange>, most: usize) -> Result<Vec<u8>> {
        let mut attempts = Attempts::new(&self.shared.retry);
        loop {
            let response = self.get(url.clone(), range).await?;
            let mut body = Vec::new();
            let mut stream = response.bytes_stream();
            let failure = loop {
                match stream.next().await {
                    None => return Ok(body),
                    // A server that knows no ranges sends the whole file.
                    Some(Ok(piece)) if body.len() + piece.len() >= most && range.is_some() => {
                        body.extend_from_slice(&piece[..most - body.len()]);
                        return Ok(body);
                    }
                    Some(Ok(piece)) if body.len() + piece.len() > most => {
                        return Err(StoreError::corrupt(self.location(), format!("the hub's answer is larger than {most} bytes")));
                    }
                    Some(Ok(piece)) => body.extend_from_slice(&piece),
                    Some(Err(error)) => break error,
                }
            };
            let Some(delay) = attempts.next_delay(None) else { return Err(self.unavailable(&failure, &attempts)) };
            tokio::time::sleep(delay).await;
        }
    }

    /// Sends a GET, with retries and redirects, and returns a successful answer.
    async fn get(&self, url: Url, range: Option<ByteRange>) -> Result<reqwest::Response> {
        let mut attempts = Attempts::new(&self.shared.retry);
        loop {
            let result = match tokio::time::timeout(attempts.remaining().max(Duration::from_millis(1)), self.follow(url.clone(), range)).await {
                Ok(result) => result,
                Err(_elapsed) => Err(Failure::Transient(self.error("no answer within the time limit", &attempts), None)),
            };
            match result {
                Ok(response) => return Ok(response),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transport(error)) => {
                    let Some(delay) = attempts.next_delay(None) else { return Err(self.unavailable(&error, &attempts)) };
                    self.report_retry(&attempts, delay, &self.shared.secrets.redact(&chain(&error.without_url())));
                    tokio::time::sleep(delay).await;
                }
                Err(Failure::Transient(error, asked)) => {
                    let Some(delay) = attempts.next_delay(asked) else { return Err(error) };
                    self.report_retry(&attempts, delay, &chain(&error));
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    fn report_retry(&self, attempts: &Attempts, delay: Duration, error: &str) {
        tracing::warn!(repo = self.shared.repo, attempt = attempts.made(), delay_ms = delay.as_millis() as u64, error, "retrying a request to the model hub");
    }

    /// One attempt: the request and its redirects.
    async fn follow(&self, mut url: Url, range: Option<ByteRange>) -> std::result::Result<reqwest::Response, Failure> {
        let home = self.shared.endpoint.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, "identity".parse().map_err(|_| Failure::Final(self.refused("accept-encoding")))?);
            if let Some((first, last)) = range {
                let last = last.map(|last| last.to_string()).unwrap_or_default();
                headers.insert(RANGE, format!("bytes={first}-{last}").parse().map_err(|_| Failure::Final(self.refused("range")))?);
            }
            if let Some(token) = self.shared.token.as_ref().filter(|_| url.origin() == home) {
                let mut value: reqwest::header::HeaderValue =
                    format!("Bearer {token}").parse().map_err(|_| Failure::Final(self.refused("HF_TOKEN holds characters that no token has")))?;
                value.set_sensitive(true);
                headers.insert(AUTHORIZATION, value);
            }
            let response = self.shared.http.get(url.clone()).headers(headers).send().await.map_err(Failure::Transport)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(self.explain(&response));
            }
            let next = response.headers().get(LOCATION).and_then(|location| location.to_str().ok()).and_then(|location| url.join(location).ok());
            let Some(next) = next.filter(|next| matches!(next.scheme(), "http" | "https")) else {
                return Err(Failure::Final(self.refused("the hub sent a redirect without a usable address")));
            };
            if url.scheme() == "https" && next.scheme() == "http" {
                return Err(Failure::Final(self.refused("the hub redirects to an address without encryption")));
            }
            url = next;
        }
        Err(Failure::Final(self.refused("the hub redirects without end")))
    }

    /// The failure that an error answer means.
    fn explain(&self, response: &reqwest::Response) -> Failure {
        let status = response.status().as_u16();
        let header =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(|text| self.shared.secrets.redact(text)).unwrap_or_default();
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let asked = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok()).map(Duration::from_secs);
        let mut said = format!("the hub answered {status}");
        for text in [&code, &message] {
            if !text.is_empty() {
                said = format!("{said}, {text}");
            }
        }
        let (operation, location) = ("read", self.location());
        match status {
            401 | 403 => {
                let page = format!("{}/{}", self.shared.endpoint.as_str().trim_end_matches('/'), self.shared.repo);
                let advice = if self.shared.token.is_none() {
                    format!(
                        "if the model asks for a licence, accept it at {page} and give an access token of that account in the environment variable HF_TOKEN (in a FineTuneJob: model.source.huggingFace.tokenSecretRef)"
                    )
                } else {
                    format!("accept the model's licence at {page} with the account of the token in HF_TOKEN, and give the token read access to the repository")
                };
                Failure::Final(StoreError::PermissionDenied { operation, location, source: Cause(format!("{said}; {advice}")) })
            }
            404 | 410 => Failure::Final(StoreError::NotFound { operation, location, source: Cause(format!("{said}; check repo and revision")) }),
            416 => Failure::Final(StoreError::corrupt(location, "a file is shorter than its list says")),
            _ => {
                let error = StoreError::Unavailable { operation, location, source: Cause(said) };
                if is_transient(status, "") { Failure::Transient(error, asked) } else { Failure::Final(error) }
            }
        }
    }

    fn refused(&self, problem: &str) -> StoreError {
        StoreError::Unavailable { operation: "read", location: self.location(), source: Cause(problem.to_owned()) }
    }

    fn error(&self, problem: &str, attempts: &Attempts) -> StoreError {
        self.refused(&format!("{problem} (gave up after {} attempts in {:.1} s)", attempts.made(), attempts.elapsed().as_secs_f64()))
    }

    fn unavailable(&self, error: &reqwest::Error, attempts: &Attempts) -> StoreError {
        self.error(&self.shared.secrets.redact(&chain(error)), attempts)
    }
}

enum Failure {
    /// Another attempt would end the same way.
    Final(StoreError),
    /// The server asks for patience.
    Transient(StoreError, Option<Duration>),
    /// No answer.
    Transport(reqwest::Error),
}

/// A file of the repository, to be downloaded.
pub(super) struct HubFile<'a> {
    pub hub: &'a Hub,
    pub file: &'a RemoteFile,
}

impl Remote for HubFile<'_> {
    fn name(&self) -> &str {
        &self.file.path
    }

    fn identity(&self) -> BoxFuture<'_, Result<Identity>> {
        // A commit's files never change.
        let version = Some(self.hub.shared.revision.clone());
        let location = format!("{} in {}", self.file.path, self.hub.location());
        Box::pin(std::future::ready(Ok(Identity { location, version, size: self.file.size })))
    }

    fn open<'a>(&'a self, identity: &'a Identity, offset: u64) -> BoxFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let response = self.hub.get(self.hub.file_address(&self.file.path), (offset > 0).then_some((offset, None))).await?;
            let start = if response.status() == reqwest::StatusCode::PARTIAL_CONTENT {
                let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse::<u64>().ok());
                start.filter(|start| *start == offset).ok_or_else(|| self.hub.refused("the server answered with another range than asked for"))?
            } else {
                0
            };
            let (hub, location) = (self.hub.clone(), identity.location.clone());
            let stream = response.bytes_stream().map_err(move |error| {
                let source = Cause(hub.shared.secrets.redact(&chain(&error.without_url())));
                StoreError::Unavailable { operation: "download", location: location.clone(), source }
            });
            Ok(Opened { start, stream: stream.boxed() })
        })
    }
}
