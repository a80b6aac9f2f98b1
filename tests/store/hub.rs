//! The hub's protocol, spoken by a small server of this test: gated repositories, redirects to another host, connections that break off,
//! wrong digests, hostile names.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use finetune_common::digest;
use finetune_store::model_source::{ModelFolder, ModelSource, ModelSourceError, Parts};
use finetune_store::{Environment, NoProgress, StoreErrorKind, StoreOptions};
use tokio::net::TcpListener;

use super::objects::shown;
use super::{Counter, cut_short, noise, patient};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_token-that-must-not-leak";

/// How the server behaves.
#[derive(Default)]
struct Behaviour {
    /// Files are handed out to holders of [`TOKEN`] only.
    gated: bool,
    /// The listing gives this digest for every large file.
    false_digest: Option<String>,
    /// Names that the listing has in addition.
    extra_names: Vec<&'static str>,
    /// The commit that the server says it answers for.
    sha: Option<&'static str>,
    /// Answers of the storage host break off after so many bytes, one entry per request.
    cuts: Vec<usize>,
    /// Statuses of the next requests to the hub, before it works.
    statuses: Vec<u16>,
    /// The storage host knows no ranges.
    no_ranges: bool,
    /// Files redirect to themselves.
    endless: bool,
    /// The listing is this long.
    padding: usize,
}

/// A request as the server saw it.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    behaviour: Mutex<Behaviour>,
    /// Requests to the hub, and to the host where large files lie.
    requests: Mutex<Vec<Seen>>,
    stored_requests: Mutex<Vec<Seen>>,
    storage_address: String,
    served: AtomicUsize,
}

/// A hub and its storage host; they end with the test's runtime.
struct Running {
    hub: Arc<Hub>,
    endpoint: String,
}

impl Running {
    async fn start(behaviour: Behaviour) -> Self {
        let hub_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let storage_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", hub_listener.local_addr().unwrap());
        let hub = Arc::new(Hub {
            files: files(),
            behaviour: Mutex::new(behaviour),
            requests: Mutex::default(),
            stored_requests: Mutex::default(),
            storage_address: storage_listener.local_addr().unwrap().to_string(),
            served: AtomicUsize::new(0),
        });
        let app = Router::new().fallback(answer_hub).with_state(Arc::clone(&hub));
        tokio::spawn(async move { axum::serve(hub_listener, app).await });
        let app = Router::new().fallback(answer_storage).with_state(Arc::clone(&hub));
        tokio::spawn(async move { axum::serve(storage_listener, app).await });
        Self { hub, endpoint }
    }

    fn options(&self, token: Option<&str>) -> StoreOptions {
        let variables = [("HF_ENDPOINT", self.endpoint.as_str())].into_iter().chain(token.map(|token| ("HF_TOKEN", token)));
        StoreOptions { environment: Environment::from_pairs(variables), retry: patient(), ..StoreOptions::default() }
    }

    async fn open(&self, token: Option<&str>, cache: &Path) -> Result<ModelFolder, ModelSourceError> {
        let source = ModelSource::HuggingFace { repo: "maker/sd3-diffusers".into(), revision: REVISION.into() };
        ModelFolder::open(&source, &self.options(token), cache).await
    }

    fn request_count(&self) -> usize {
        self.hub.requests.lock().unwrap().len() + self.hub.stored_requests.lock().unwrap().len()
    }

    fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.hub.behaviour.lock().unwrap());
    }
}

fn files() -> BTreeMap<String, Vec<u8>> {
    let index = r#"{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}}"#;
    [
        ("README.md", b"# A model".to_vec()),
        ("model_index.json", b"{}".to_vec()),
        ("sd3.safetensors", noise(20, 1 << 20)),
        ("transformer/config.json", b"{}".to_vec()),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", index.as_bytes().to_vec()),
        ("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", noise(21, 3 << 20)),
        ("transformer/diffusion_pytorch_model-00002-of-00002.safetensors", noise(22, 2 << 20)),
        ("vae/config.json", b"{\"a\": 1}".to_vec()),
        ("vae/diffusion_pytorch_model.fp16.safetensors", noise(23, 1 << 20)),
        ("vae/diffusion_pytorch_model.safetensors", noise(24, 4 << 20)),
    ]
    .map(|(name, content)| (name.to_owned(), content))
    .into()
}

fn seen(request: &Request) -> Seen {
    let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    Seen { path: request.uri().path().to_owned(), authorization: header("authorization"), range: header("range") }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

async fn answer_hub(State(hub): State<Arc<Hub>>, request: Request) -> Response {
    let seen = seen(&request);
    hub.requests.lock().unwrap().push(seen.clone());
    let mut behaviour = hub.behaviour.lock().unwrap();
    if !behaviour.statuses.is_empty() {
        let status = StatusCode::from_u16(behaviour.statuses.remove(0)).unwrap();
        return (status, [("retry-after", "0")]).into_response();
    }
    if seen.path == format!("/api/models/maker/sd3-diffusers/revision/{REVISION}") {
        assert_eq!(request.uri().query(), Some("blobs=true"));
        return listing(&hub, &behaviour).into_response();
    }
    let Some(name) = seen.path.strip_prefix(&format!("/maker/sd3-diffusers/resolve/{REVISION}/")) else {
        return (StatusCode::NOT_FOUND, [("x-error-code", "RepoNotFound"), ("x-error-message", "Repository not found")]).into_response();
    };
    if behaviour.gated && seen.authorization.as_deref() != Some(&format!("Bearer {TOKEN}")) {
        let status = if seen.authorization.is_some() { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
        return (status, [("x-error-code", "GatedRepo"), ("x-error-message", "Access to this model is restricted")]).into_response();
    }
    let Some(content) = hub.files.get(name) else { return StatusCode::NOT_FOUND.into_response() };
    if behaviour.endless {
        return (StatusCode::FOUND, [("location", seen.path.clone())]).into_response();
    }
    if is_large(name) {
        let location = format!("http://{}/blobs/{name}?Signature=presigned-secret", hub.storage_address);
        return (StatusCode::FOUND, [("location", location)]).into_response();
    }
    Body::from(content.clone()).into_response()
}

fn listing(hub: &Hub, behaviour: &Behaviour) -> String {
    let entry = |(name, content): (&String, &Vec<u8>)| {
        let mut entry = serde_json::json!({"rfilename": name, "size": content.len(), "blobId": "0".repeat(40)});
        if is_large(name) {
            let sha256 = behaviour.false_digest.clone().unwrap_or_else(|| hex::encode(digest::sha256(content)));
            entry["lfs"] = serde_json::json!({"sha256": sha256, "size": content.len(), "pointerSize": 134});
        }
        entry
    };
    let mut siblings: Vec<_> = hub.files.iter().map(entry).collect();
    siblings.extend(behaviour.extra_names.iter().map(|name| serde_json::json!({"rfilename": name, "size": 1})));
    let sha = behaviour.sha.unwrap_or(REVISION);
    serde_json::json!({"id": "maker/sd3-diffusers", "sha": sha, "gated": "auto", "siblings": siblings, "padding": " ".repeat(behaviour.padding)}).to_string()
}

async fn answer_storage(State(hub): State<Arc<Hub>>, request: Request) -> Response {
    let seen = seen(&request);
    hub.stored_requests.lock().unwrap().push(seen.clone());
    let content = &hub.files[seen.path.strip_prefix("/blobs/").unwrap()];
    let mut behaviour = hub.behaviour.lock().unwrap();
    // `bytes=FIRST-` or `bytes=FIRST-LAST`.
    let range = seen.range.as_deref().filter(|_| !behaviour.no_ranges).map(|range| range.strip_prefix("bytes=").unwrap().split_once('-').unwrap());
    let start = range.map_or(0, |(first, _)| first.parse().unwrap());
    let last = range.map_or("", |(_, last)| last);
    let end = if last.is_empty() { content.len() } else { content.len().min(last.parse::<usize>().unwrap() + 1) };
    let rest = Bytes::from(content[start..end].to_vec());
    let length = rest.len();
    let cut = if behaviour.cuts.is_empty() { length } else { behaviour.cuts.remove(0).min(length) };
    hub.served.fetch_add(cut, Ordering::SeqCst);
    let mut pieces = vec![Ok(rest.slice(..cut))];
    if cut < length {
        pieces.push(Err(std::io::Error::other("cut on purpose")));
    }
    let mut headers = HeaderMap::new();
    headers.insert("content-length", length.into());
    let mut status = StatusCode::OK;
    if start > 0 || end < content.len() {
        status = StatusCode::PARTIAL_CONTENT;
        headers.insert("content-range", format!("bytes {start}-{}/{}", end - 1, content.len()).parse().unwrap());
    }
    (status, headers, Body::from_stream(futures::stream::iter(pieces))).into_response()
}

#[tokio::test]
async fn only_the_needed_files_are_fetched_and_only_once() {
    let (hub, cache) = (Running::start(Behaviour::default()).await, tempfile::tempdir().unwrap());
    let model = hub.open(None, cache.path()).await.unwrap();
    let counter = Counter::default();
    let folder = model.fetch(Parts::VAE, &counter).await.unwrap();
    let mut finished = counter.finished.lock().unwrap().clone();
    finished.sort_unstable();
    // The table of contents has been read when the model was opened.
    assert_eq!(finished, ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]);
    for name in finished.iter().map(String::as_str).chain(["model_index.json"]) {
        assert!(std::fs::read(folder.join(name)).unwrap() == hub.hub.files[name], "{name}");
    }
    model.fetch(Parts::TRANSFORMER, &NoProgress).await.unwrap();
    for name in hub.hub.files.keys().filter(|name| name.starts_with("transformer/")) {
        assert!(std::fs::read(folder.join(name)).unwrap() == hub.hub.files[name], "{name}");
    }
    assert!(!folder.join("sd3.safetensors").exists() && !folder.join("README.md").exists());

    // A later run, even without the hub, finds everything.
    let before = hub.request_count();
    let again = hub.open(None, cache.path()).await.unwrap();
    assert_eq!(again.fetch(Parts::VAE | Parts::TRANSFORMER, &NoProgress).await.unwrap(), folder);
    assert_eq!(again.fingerprint(Parts::VAE).await.unwrap(), model.fingerprint(Parts::VAE).await.unwrap());
    assert_eq!(hub.request_count(), before);
}

/// A repository with both: the single file is fetched into the commit's folder, and what was fetched before is used.
#[tokio::test]
async fn a_single_file_of_the_hub_is_put_into_a_folder() {
    let (hub, cache) = (Running::start(Behaviour::default()).await, tempfile::tempdir().unwrap());
    let own = hub.open(None, cache.path()).await.unwrap().fetch(Parts::VAE, &NoProgress).await.unwrap();
    let entries = |entries: &[(&str, &str)]| entries.iter().map(|(at, what)| ((*at).to_owned(), (*what).to_owned())).collect::<BTreeMap<_, _>>();
    let links = entries(&[("transformer/diffusion_pytorch_model.safetensors", "sd3.safetensors"), ("vae/config.json", "vae/config.json")]);
    let texts = entries(&[("model_index.json", "{}"), ("transformer/config.json", "{}")]);
    let model = hub.open(None, cache.path()).await.unwrap().arranged(links, texts).unwrap();
    assert!(model.first_bytes("transformer/diffusion_pytorch_model.safetensors", 50).await.unwrap() == hub.hub.files["sd3.safetensors"][..50]);
    let counter = Counter::default();
    let folder = model.fetch(Parts::TRANSFORMER, &counter).await.unwrap();
    assert_eq!(*counter.finished.lock().unwrap(), ["sd3.safetensors"]);
    assert!(folder != own && own.join("sd3.safetensors").is_file());
    assert!(std::fs::read(folder.join("transformer/diffusion_pytorch_model.safetensors")).unwrap() == hub.hub.files["sd3.safetensors"]);
}

#[tokio::test]
async fn the_token_reaches_the_hub_and_no_other_host() {
    let (hub, cache) = (Running::start(Behaviour { gated: true, ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
    hub.open(Some(TOKEN), cache.path()).await.unwrap().fetch(Parts::VAE, &NoProgress).await.unwrap();
    let requests = hub.hub.requests.lock().unwrap();
    assert!(requests.iter().all(|seen| seen.authorization.as_deref() == Some(&format!("Bearer {TOKEN}"))), "{requests:?}");
    let stored_requests = hub.hub.stored_requests.lock().unwrap();
    assert!(!stored_requests.is_empty() && stored_requests.iter().all(|seen| seen.authorization.is_none()), "{stored_requests:?}");
}

#[tokio::test]
async fn a_gated_model_says_what_to_do() {
    let hub = Running::start(Behaviour { gated: true, ..Behaviour::default() }).await;
    for token in [None, Some("hf_another-account")] {
        let cache = tempfile::tempdir().unwrap();
        let error = hub.open(token, cache.path()).await.unwrap_err();
        assert_eq!(error.store_kind(), Some(StoreErrorKind::PermissionDenied));
        let text = shown(&error);
        assert!(text.contains("licence") && text.contains("HF_TOKEN") && text.contains("GatedRepo"), "{text}");
        assert!(text.contains(&format!("{}/maker/sd3-diffusers", hub.endpoint)), "{text}");
        assert!(!text.contains("hf_another-account"), "{text}");
    }
}

#[tokio::test]
async fn a_transfer_that_breaks_off_goes_on_where_it_stopped() {
    let (hub, cache) = (Running::start(Behaviour { cuts: vec![1 << 20, 0, 1_500_000], ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
    let folder = hub.open(None, cache.path()).await.unwrap().fetch(Parts::VAE, &NoProgress).await.unwrap();
    let name = "vae/diffusion_pytorch_model.safetensors";
    assert!(std::fs::read(folder.join(name)).unwrap() == hub.hub.files[name]);
    let ranges: Vec<_> = hub.hub.stored_requests.lock().unwrap().iter().map(|seen| seen.range.clone()).collect();
    assert_eq!(ranges.len(), 4);
    assert_eq!(ranges[0], None);
    assert!(ranges[1..].iter().any(Option::is_some), "{ranges:?}");
    // What the server handed out may get lost in a reset; but nothing near a whole second transfer is made.
    let (served, size) = (hub.hub.served.load(Ordering::SeqCst), hub.hub.files[name].len());
    assert!(served < size + (5 << 20) / 2, "{served} of {size}");
}

#[tokio::test]
async fn a_server_without_ranges_starts_again() {
    let (hub, cache) = (Running::start(Behaviour { cuts: vec![2 << 20], no_ranges: true, ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
    let folder = hub.open(None, cache.path()).await.unwrap().fetch(Parts::VAE, &NoProgress).await.unwrap();
    let name = "vae/diffusion_pytorch_model.safetensors";
    assert!(std::fs::read(folder.join(name)).unwrap() == hub.hub.files[name]);
}

#[tokio::test]
async fn a_run_that_was_killed_leaves_what_it_had() {
    let (hub, cache) = (Running::start(Behaviour::default()).await, tempfile::tempdir().unwrap());
    let model = hub.open(None, cache.path()).await.unwrap();
    let counter = Counter { limit: Some(3 << 20), ..Counter::default() };
    cut_short(model.fetch(Parts::VAE, &counter)).await;
    let name = "vae/diffusion_pytorch_model.safetensors";
    assert!(!model.folder().join(name).exists());
    let folder = hub.open(None, cache.path()).await.unwrap().fetch(Parts::VAE, &NoProgress).await.unwrap();
    assert!(std::fs::read(folder.join(name)).unwrap() == hub.hub.files[name]);
    assert!(hub.hub.stored_requests.lock().unwrap().last().unwrap().range.is_some());
    assert!(std::fs::read_dir(folder.join("vae")).unwrap().all(|entry| !entry.unwrap().file_name().to_str().unwrap().contains(".part")));
}

#[tokio::test]
async fn content_with_another_digest_is_refused() {
    let (hub, cache) = (Running::start(Behaviour { false_digest: Some("ab".repeat(32)), ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
    let model = hub.open(None, cache.path()).await.unwrap();
    let error = model.fetch(Parts::VAE, &NoProgress).await.unwrap_err();
    assert_eq!(error.store_kind(), Some(StoreErrorKind::Corrupt));
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert!(!model.folder().join("vae/diffusion_pytorch_model.safetensors").exists());
    assert!(!model.folder().join("vae/diffusion_pytorch_model.safetensors.part").exists());
}

#[tokio::test]
async fn hostile_listings_are_refused_before_anything_is_written() {
    for name in ["../evil", "/etc/cron.d/evil", "vae/../../evil", "vae//evil", "vae/./evil", "vae\\..\\evil", "vae/ev\u{0}il", ""] {
        let (hub, cache) = (Running::start(Behaviour { extra_names: vec![name], ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
        let error = hub.open(None, cache.path()).await.unwrap_err();
        assert_eq!(error.store_kind(), Some(StoreErrorKind::Corrupt), "{name:?}: {error}");
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    }
    for behaviour in [
        Behaviour { sha: Some("ffffffffffffffffffffffffffffffffffffffff"), ..Behaviour::default() },
        Behaviour { false_digest: Some("short".into()), ..Behaviour::default() },
        Behaviour { padding: 17 << 20, ..Behaviour::default() },
    ] {
        let (hub, cache) = (Running::start(behaviour).await, tempfile::tempdir().unwrap());
        assert_eq!(hub.open(None, cache.path()).await.unwrap_err().store_kind(), Some(StoreErrorKind::Corrupt));
    }
}

#[tokio::test]
async fn an_overloaded_hub_is_asked_again_and_a_dead_one_given_up() {
    let (hub, cache) = (Running::start(Behaviour { statuses: vec![503, 429, 500], ..Behaviour::default() }).await, tempfile::tempdir().unwrap());
    let model = hub.open(None, cache.path()).await.unwrap();
    hub.change(|behaviour| behaviour.statuses = vec![502, 429]);
    model.fetch(Parts::VAE, &NoProgress).await.unwrap();

    hub.change(|behaviour| behaviour.statuses = vec![503; 1_000_000]);
    let error = model.fetch(Parts::TRANSFORMER, &NoProgress).await.unwrap_err();
    assert_eq!(error.store_kind(), Some(StoreErrorKind::Unavailable));
    hub.change(|behaviour| (behaviour.statuses, behaviour.endless) = (Vec::new(), true));
    let error = model.fetch(Parts::TRANSFORMER, &NoProgress).await.unwrap_err();
    assert!(shown(&error).contains("redirects without end"), "{}", shown(&error));
}

#[tokio::test]
async fn repositories_and_revisions_are_checked_before_any_request() {
    let (hub, cache) = (Running::start(Behaviour::default()).await, tempfile::tempdir().unwrap());
    let open = async |repo: &str, revision: &str| {
        let source = ModelSource::HuggingFace { repo: repo.into(), revision: revision.into() };
        ModelFolder::open(&source, &hub.options(None), cache.path()).await.unwrap_err()
    };
    for (repo, revision) in
        [("sd3", REVISION), ("../x", REVISION), ("a/b/c", REVISION), ("a/b?c", REVISION), ("a/..", REVISION), ("a/b", "main"), ("a/b", &REVISION[1..])]
    {
        assert_eq!(open(repo, revision).await.store_kind(), Some(StoreErrorKind::InvalidLocation), "{repo} {revision}");
    }
    assert_eq!(hub.request_count(), 0);
    assert_eq!(open("maker/other", REVISION).await.store_kind(), Some(StoreErrorKind::NotFound));
}

/// A mirror behind a private authority: here SeaweedFS's encrypted address, which is no hub, but answers once its certificate is trusted.
#[tokio::test]
async fn a_mirror_behind_a_private_authority_is_reached_with_its_certificates() {
    let mirror = super::servers::seaweedfs().encrypted_endpoint.clone().unwrap();
    let authority = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls/ca.pem").display().to_string();
    let kind = async |ca_bundle: Option<&str>, variable: Option<&str>| {
        let variables = [("HF_ENDPOINT", mirror.as_str())].into_iter().chain(variable.map(|path| ("HF_CA_BUNDLE", path)));
        let retry = finetune_store::RetryPolicy { max_retries: 1, ..patient() };
        let options = StoreOptions { environment: Environment::from_pairs(variables), ca_bundle: ca_bundle.map(Into::into), retry, ..StoreOptions::default() };
        let source = ModelSource::HuggingFace { repo: "maker/sd3-diffusers".into(), revision: REVISION.into() };
        let cache = tempfile::tempdir().unwrap();
        let error = ModelFolder::open(&source, &options, cache.path()).await.unwrap_err();
        let ModelSourceError::Store(error) = &error else { panic!("{error:?}") };
        (error.kind(), shown(error))
    };
    let (unknown, said) = kind(None, None).await;
    assert_eq!(unknown, StoreErrorKind::Unavailable, "{said}");
    assert!(said.contains("certificate"), "{said}");
    for (ca_bundle, variable) in [(Some(authority.as_str()), None), (None, Some(authority.as_str()))] {
        let (answered, said) = kind(ca_bundle, variable).await;
        assert!([StoreErrorKind::NotFound, StoreErrorKind::PermissionDenied].contains(&answered), "{said}");
    }
    // The variable is the hub's own and wins.
    assert_eq!(kind(Some(&authority), Some("/no/such/bundle.pem")).await.0, StoreErrorKind::LocalDisk);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_hubs_own_tools_have_downloaded_is_used_if_it_is_whole() {
    let running = Running::start(Behaviour::default()).await;
    let (own, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let snapshot = own.path().join("models--maker--sd3-diffusers/snapshots").join(REVISION);
    let blobs = own.path().join("models--maker--sd3-diffusers/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    for (name, content) in files() {
        // One file is missing, one cut off, one damaged.
        let content = match name.as_str() {
            "vae/config.json" => continue,
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors" => content[1..].to_vec(),
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors" => vec![0; content.len()],
            _ => content,
        };
        let (blob, link) = (blobs.join(name.replace('/', "-")), snapshot.join(&name));
        std::fs::write(&blob, content).unwrap();
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(blob, link).unwrap();
    }
    let mut options = running.options(None);
    let own_cache = own.path().display().to_string();
    options.environment = Environment::from_pairs([("HF_ENDPOINT", running.endpoint.as_str()), ("HF_HUB_CACHE", own_cache.as_str())]);
    let source = ModelSource::HuggingFace { repo: "maker/sd3-diffusers".into(), revision: REVISION.into() };
    let folder = ModelFolder::open(&source, &options, cache.path()).await.unwrap().fetch(Parts::TRANSFORMER | Parts::VAE, &NoProgress).await.unwrap();
    for (name, content) in files() {
        let path = folder.join(&name);
        assert!(!path.exists() || std::fs::read(&path).unwrap() == content, "{name}");
    }
    let asked: Vec<String> = running.hub.requests.lock().unwrap().iter().map(|seen| seen.path.clone()).filter(|path| path.contains("/resolve/")).collect();
    let mut asked: Vec<&str> = asked.iter().filter_map(|path| path.rsplit('/').next()).collect();
    asked.sort_unstable();
    let shards = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"];
    assert_eq!(asked, ["config.json", shards[0], shards[1]], "the others come from the cache");
}
