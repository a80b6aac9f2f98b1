//! Servers that answer with errors, reset connections, stay silent or lose their answers.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use finetune_store::claims::Claim;
use finetune_store::{Created, Environment, NoProgress, RetryPolicy, Store, StoreErrorKind};

use super::objects::shown;
use super::proxy::{Fault, Proxy};
use super::{Counter, Place, noise, patient, servers};

/// A server of each provider behind a failing proxy.
async fn everywhere(test: &str) -> Vec<(Proxy, Store)> {
    let mut places = Vec::new();
    for server in [servers::seaweedfs(), servers::azurite(), servers::fake_gcs_server()] {
        let proxy = Proxy::new(&server.endpoint).await;
        let store = Place::server_at(server, proxy.endpoint.clone()).store(test);
        places.push((proxy, store));
    }
    places
}

/// Passing faults, the overload of a server and the network's.
fn passing() -> Vec<Fault> {
    vec![
        Fault::Answer("503 Slow Down"),
        Fault::Reset,
        Fault::Answer("429 Too Many Requests\r\nretry-after: 0"),
        Fault::Answer("500 Internal Server Error"),
        Fault::LoseAnswer,
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passing_faults_are_retried() {
    for (proxy, store) in everywhere("passing").await {
        proxy.next(passing());
        store.put("x", "content").await.unwrap();
        proxy.next(passing());
        assert_eq!(store.get("x").await.unwrap(), "content");
        proxy.next(passing());
        assert_eq!(store.head("x").await.unwrap().unwrap().size, 7);
        proxy.next(passing());
        assert_eq!(store.list("").await.unwrap().len(), 1);
        proxy.next(passing());
        store.delete("x").await.unwrap();
        assert_eq!(proxy.left(), 0);
        assert_eq!(store.list("").await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_asked_again() {
    let proxy = Proxy::new(&servers::seaweedfs().endpoint).await;
    let mut place = Place::server_at(servers::seaweedfs(), proxy.endpoint.clone());
    place.options.retry = RetryPolicy { read_timeout: Duration::from_secs(1), ..patient() };
    let store = place.store("silent");
    proxy.next([Fault::Silence]);
    store.put("x", "content").await.unwrap();
    proxy.next([Fault::Silence]);
    assert_eq!(store.get("x").await.unwrap(), "content");
    assert_eq!(proxy.left(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_uploads_survive_passing_faults() {
    let content = noise(10, 18 << 20);
    for (proxy, store) in everywhere("upload").await {
        proxy.next(passing());
        store.put("x", content.clone()).await.unwrap();
        assert_eq!(proxy.left(), 0);
        assert!(store.get("x").await.unwrap() == content);
        assert_eq!(store.list("").await.unwrap().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_break_off_are_read_again() {
    for (proxy, store) in everywhere("broken").await {
        let content = noise(12, 1 << 20);
        store.put("large", content.clone()).await.unwrap();
        for name in 0..20 {
            store.put(&format!("many/{name:02}"), "x").await.unwrap();
        }
        proxy.next([Fault::CutAnswer(500_000), Fault::CutAnswer(1 << 20)]);
        assert!(store.get("large").await.unwrap() == content);
        proxy.next([Fault::CutAnswer(100_000)]);
        assert!(store.get_range("large", 1000..900_000).await.unwrap() == content[1000..900_000]);
        proxy.next([Fault::CutAnswer(2000), Fault::Reset, Fault::CutAnswer(1500)]);
        assert_eq!(store.list("many").await.unwrap().len(), 20);
        assert_eq!(proxy.left(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_whose_answer_was_lost_knows_its_own_object() {
    for (proxy, store) in everywhere("lost").await {
        // Mine: the first attempt was carried out.
        proxy.next([Fault::LoseAnswer]);
        assert_eq!(store.create("mine", "me").await.unwrap(), Created::Yes);
        // Another's: the first attempt was not carried out, or was refused.
        store.put("theirs", "them").await.unwrap();
        proxy.next([Fault::LoseAnswer, Fault::Answer("503 Slow Down"), Fault::Reset]);
        assert_eq!(store.create("theirs", "me").await.unwrap(), Created::AlreadyExists);
        assert_eq!(store.get("theirs").await.unwrap(), "them");
        // Nobody's yet.
        proxy.next([Fault::Answer("503 Slow Down"), Fault::Reset]);
        assert_eq!(store.create("free", "me").await.unwrap(), Created::Yes);
        assert_eq!(proxy.left(), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_answer_was_lost_is_held_once() {
    for (proxy, store) in everywhere("claim").await {
        proxy.next([Fault::Reset, Fault::LoseAnswer]);
        let claim = Claim::acquire(&store, "me").await.unwrap();
        assert_eq!(claim.epoch(), 1);
        assert_eq!(store.list("claims").await.unwrap().len(), 1);
        assert!(claim.is_newest().await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_breaks_off_again_and_again_goes_on_where_it_stopped() {
    let content = noise(11, 10 << 20);
    let folder = tempfile::tempdir().unwrap();
    for (proxy, store) in everywhere("cut").await {
        store.put("x", content.clone()).await.unwrap();
        let dest = folder.path().join(proxy.endpoint.replace(['/', ':'], "-"));
        // The first connection looks the object up.
        let before = proxy.connections.load(Ordering::SeqCst);
        proxy.next([Fault::CutAnswer(1 << 30), Fault::CutAnswer(3 << 20), Fault::CutAnswer(4 << 20), Fault::CutAnswer(100), Fault::Answer("503 Slow Down")]);
        let counter = Counter::default();
        store.download("x", &dest, &counter).await.unwrap();
        assert!(std::fs::read(&dest).unwrap() == content);
        assert_eq!(proxy.left(), 0);
        // 3 and 4 of 10 MiB had arrived: the last request asked for the rest only.
        assert_eq!(counter.advanced.load(Ordering::SeqCst), content.len() as u64);
        assert_eq!(proxy.connections.load(Ordering::SeqCst) - before, 6);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_server_is_given_up_in_bounded_time() {
    let server = servers::seaweedfs();
    let proxy = Proxy::new(&server.endpoint).await;
    for fault in [Fault::Answer("503 Slow Down"), Fault::Reset, Fault::Silence] {
        proxy.always(fault.clone());
        let mut place = Place::server_at(server, proxy.endpoint.clone());
        place.options.retry = RetryPolicy { total: Duration::from_secs(2), max_retries: 1000, read_timeout: Duration::from_millis(300), ..patient() };
        let store = place.store("dead");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        let operations = ["get", "list", "create", "put", "download"].map(|operation| {
            let (store, file, fault) = (&store, &file, &fault);
            async move {
                let started = Instant::now();
                let result = match operation {
                    "get" => store.get("x").await.map(drop),
                    "list" => store.list("").await.map(drop),
                    "create" => store.create("x", "1").await.map(drop),
                    "put" => store.put("x", "1").await,
                    _ => store.download("x", file, &NoProgress).await,
                };
                let (error, spent) = (result.unwrap_err(), started.elapsed());
                assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
                // Generous: a slow machine may be late, but budgets must not multiply.
                assert!(spent < Duration::from_secs(10), "{operation}, {fault:?}: {spent:?}");
                assert!(operation == "create" || shown(&error).contains("gave up after"), "{}", shown(&error));
            }
        });
        futures::future::join_all(operations).await;
    }
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_unavailable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut place = Place::server_at(servers::seaweedfs(), endpoint);
    place.options.retry = RetryPolicy { max_retries: 2, ..patient() };
    let error = place.store("nobody").get("x").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(shown(&error).contains("refused") && shown(&error).contains("3 attempts"), "{}", shown(&error));
}

#[tokio::test]
async fn final_answers_are_not_retried() {
    let proxy = Proxy::new(&servers::seaweedfs().endpoint).await;
    let place = Place::server_at(servers::seaweedfs(), proxy.endpoint.clone());
    let store = place.store("final");
    for (answer, kind) in [
        ("403 Forbidden", StoreErrorKind::PermissionDenied),
        ("401 Unauthorized", StoreErrorKind::PermissionDenied),
        ("404 Not Found", StoreErrorKind::NotFound),
        ("301 Moved Permanently", StoreErrorKind::InvalidLocation),
        ("501 Not Implemented", StoreErrorKind::InvalidLocation),
        ("405 Method Not Allowed", StoreErrorKind::InvalidLocation),
    ] {
        let before = proxy.connections.load(Ordering::SeqCst);
        proxy.next([Fault::Answer(answer)]);
        assert_eq!(store.get("x").await.unwrap_err().kind(), kind, "{answer}");
        assert_eq!(proxy.connections.load(Ordering::SeqCst) - before, 1, "{answer}");
    }
}

#[tokio::test]
async fn an_encrypted_endpoint_needs_its_authority_and_is_never_downgraded() {
    let server = servers::seaweedfs();
    let mut place = Place::server_at(server, server.encrypted_endpoint.clone().unwrap());
    // Variables of other tools that switch checks off have no say.
    let mut environment = server.environment.clone();
    environment.extend(["AWS_ALLOW_HTTP", "AWS_ALLOW_INVALID_CERTIFICATES"].map(|name| (name.to_owned(), "true".to_owned())));
    place.options.environment = Environment::from_pairs(environment);
    // No further attempt helps: the way out is named at once.
    let error = place.store("encrypted").get("x").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
    for part in ["certificate", "storage.caBundleConfigMapRef", "AWS_CA_BUNDLE"] {
        assert!(shown(&error).contains(part), "{}", shown(&error));
    }
    assert!(!shown(&error).contains("attempts"), "{}", shown(&error));

    let authority = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls/ca.pem");
    place.options.ca_bundle = Some(authority.clone());
    let store = place.store("encrypted");
    store.put("x", "content").await.unwrap();
    assert_eq!(store.get("x").await.unwrap(), "content");

    // The same by the variable that AWS's own tools know.
    place.options.ca_bundle = None;
    let variables = server.environment.iter().cloned().chain([("AWS_CA_BUNDLE".to_owned(), authority.display().to_string())]);
    place.options.environment = Environment::from_pairs(variables);
    assert_eq!(place.store("encrypted").list("").await.unwrap(), []);

    place.options.ca_bundle = Some("/no/such/bundle.pem".into());
    assert_eq!(Store::open("s3://bucket/", &place.options).unwrap_err().kind(), StoreErrorKind::LocalDisk);
    // An encrypted endpoint where nobody speaks TLS is not spoken to without it.
    let plain = Place::server_at(server, server.endpoint.replace("http://", "https://"));
    let error = plain.store("plain").get("x").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
    assert!(shown(&error).contains("speaks TLS") && !shown(&error).contains("attempts"), "{}", shown(&error));
}
