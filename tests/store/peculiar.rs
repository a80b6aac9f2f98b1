//! Servers that keep to the protocol in their own way: what can be read is read, what cannot is refused at once, with the reason.

use std::sync::atomic::Ordering;

use finetune_store::claims::Claim;
use finetune_store::{AddressingStyle, Created, Environment, Store, StoreErrorKind, StoreOptions};

use super::Place;
use super::objects::shown;
use super::proxy::{Fault, Proxy};
use finetune_testing::servers;

/// A prefix on SeaweedFS, behind a proxy.
async fn behind_a_proxy(test: &str) -> (Proxy, Store) {
    let server = servers::seaweedfs();
    let proxy = Proxy::new(&server.endpoint).await;
    let store = Place::server_at(server, proxy.endpoint.clone()).store(test);
    (proxy, store)
}

/// A page of a listing of `store`, with these keys below its prefix.
fn page(store: &Store, keys: &[&str], next: &str) -> String {
    let prefix = store.uri().strip_prefix("s3://bucket/").unwrap();
    let entry = |key: &&str| format!("<Contents><Key>{prefix}{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents>");
    let next = if next.is_empty() { String::new() } else { format!("<NextContinuationToken>{next}</NextContinuationToken>") };
    format!("<?xml version=\"1.0\"?><ListBucketResult>{next}{}</ListBucketResult>", keys.iter().map(entry).collect::<String>())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nanio_keeps_objects_and_gives_no_claims() {
    let place = Place::server(servers::nanio());
    let store = place.store("odd 50% ü+x");
    for key in ["a b.txt", "c+d.txt"] {
        store.put(key, key.to_owned()).await.unwrap();
        assert_eq!(store.get(key).await.unwrap(), key);
    }
    // The prefix has a space, which this server's check of signatures wants as %20.
    assert_eq!(store.list("").await.unwrap().iter().map(|object| object.key.as_str()).collect::<Vec<_>>(), ["a b.txt", "c+d.txt"]);
    let error = Claim::acquire(&store, "me").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
    assert!(shown(&error).contains("If-None-Match"), "{}", shown(&error));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_others_made_do_not_hide_the_rest_of_a_folder() {
    let server = servers::gofakes3();
    let port = server.endpoint.rsplit(':').next().unwrap().parse().unwrap();
    let store = Place::server(server).store("keys of others");
    store.put("a.png", "1").await.unwrap();
    let prefix = store.uri().strip_prefix("s3://bucket/").unwrap().replace(' ', "%20");
    for key in ["/b.png", "c//d.png", "e%0Af.png", "g%01h.png"] {
        assert_eq!(servers::http(port, "PUT", &format!("/bucket/{prefix}{key}"), &[], b"x"), Some(200), "{key}");
    }
    assert_eq!(store.list("").await.unwrap().iter().map(|object| object.key.as_str()).collect::<Vec<_>>(), ["a.png"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ignores_conditional_creates_gets_no_claim() {
    let (proxy, store) = behind_a_proxy("unconditional").await;
    // Listing, the create, and its repetition, which the server carries out once more.
    let carried_out = Fault::Document("200 OK\r\netag: \"1\"", String::new());
    proxy.next([Fault::CutAnswer(usize::MAX), Fault::CutAnswer(usize::MAX), carried_out]);
    let error = Claim::acquire(&store, "me").await.unwrap_err();
    assert_eq!((error.kind(), proxy.left()), (StoreErrorKind::InvalidLocation, 0));
    assert!(shown(&error).contains("If-None-Match"), "{}", shown(&error));
    // The same server without the proxy's help is as it should be.
    assert_eq!(Claim::acquire(&store, "me").await.unwrap().epoch(), 2);
    assert_eq!(store.create("claims/000002.json", "another").await.unwrap(), Created::AlreadyExists);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_that_is_answered_with_200_is_read_if_it_is_that_range() {
    let (proxy, store) = behind_a_proxy("range").await;
    store.put("x", "0123456789").await.unwrap();
    proxy.next([Fault::Restate("200 OK")]);
    assert_eq!(store.get_range("x", 2..5).await.unwrap(), "234");
    for answer in ["200 OK", "200 OK\r\ncontent-range: bytes 0-9/10\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT"] {
        let before = proxy.connections.load(Ordering::SeqCst);
        proxy.next([Fault::Document(answer, "0123456789".into())]);
        let error = store.get_range("x", 2..5).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::InvalidLocation, "{error:?}");
        assert!(shown(&error).contains("range"), "{}", shown(&error));
        assert_eq!(proxy.connections.load(Ordering::SeqCst) - before, 1, "no further attempt");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_cannot_be_used_do_not_hide_the_others() {
    let (proxy, store) = behind_a_proxy("keys").await;
    proxy.next([
        Fault::Document("200 OK", page(&store, &["a.png", "/b.png", "c/../d.png", "e&#10;f"], "more")),
        Fault::Document("200 OK", page(&store, &["./g", "h\u{1}i", "k &amp; l.png"], "")),
    ]);
    let keys: Vec<String> = store.list("").await.unwrap().into_iter().map(|object| object.key).collect();
    assert_eq!((keys, proxy.left()), (vec!["a.png".to_owned(), "k & l.png".to_owned()], 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_that_goes_in_circles_ends() {
    let (proxy, store) = behind_a_proxy("circles").await;
    let pages = |tokens: &[(&str, &str)]| tokens.iter().map(|(key, next)| Fault::Document("200 OK", page(&store, &[key], next))).collect::<Vec<_>>();
    for circle in [pages(&[("a", "same"), ("a", "same")]), pages(&[("a", "one"), ("b", "two"), ("a", "one")])] {
        proxy.next(circle);
        let error = store.list("").await.unwrap_err();
        assert_eq!((error.kind(), proxy.left()), (StoreErrorKind::InvalidLocation, 0), "{error:?}");
        assert!(shown(&error).contains("continuation token"), "{}", shown(&error));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_head_is_explained_by_a_get() {
    let (proxy, store) = behind_a_proxy("head").await;
    let document = |code: &str| format!("<Error><Code>{code}</Code><Message>it&#39;s so</Message></Error>");
    for (status, code, kind) in [
        ("400 Bad Request", "ExpiredToken", StoreErrorKind::PermissionDenied),
        ("403 Forbidden", "RequestTimeTooSkewed", StoreErrorKind::PermissionDenied),
        ("400 Bad Request", "AuthorizationHeaderMalformed", StoreErrorKind::InvalidLocation),
    ] {
        proxy.next([Fault::Answer(status), Fault::Document(status, document(code))]);
        let error = store.head("x").await.unwrap_err();
        assert_eq!((error.kind(), proxy.left()), (kind, 0), "{error:?}");
        assert!(shown(&error).contains(code) && shown(&error).contains("it's so"), "{}", shown(&error));
    }
    // A server that forbids HEAD and serves GET.
    store.put("x", "content").await.unwrap();
    proxy.next([Fault::Answer("405 Method Not Allowed")]);
    assert_eq!(store.head("x").await.unwrap().unwrap().size, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bucket_is_the_uris_in_either_style() {
    // "bucket.localhost" is looked up like any other name; here the system's own resolver need not know it.
    let server = servers::seaweedfs();
    let options = |style, environment: &[(&str, &str)]| {
        let variables = server.environment.iter().cloned().chain(environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        StoreOptions { addressing_style: style, environment: Environment::from_pairs(variables), ..Place::server(server).options }
    };
    let virtual_host = [("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")];
    // The field decides, whatever the variable says.
    let store = Store::open("s3://bucket/style/", &options(Some(AddressingStyle::Path), &virtual_host)).unwrap();
    store.put("x", "content").await.unwrap();
    assert_eq!(Place::server(server).store("other").list("").await.unwrap(), []);
    let direct = Store::open("s3://bucket/", &Place::server(server).options).unwrap();
    assert_eq!(direct.get("style/x").await.unwrap(), "content");
    // The variable alone, with an endpoint, is refused by its name.
    let error = Store::open("s3://bucket/style/", &options(None, &virtual_host)).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
    assert!(shown(&error).contains("AWS_VIRTUAL_HOSTED_STYLE_REQUEST") && shown(&error).contains("addressingStyle"), "{}", shown(&error));
    // No bucket goes in front of an address of numbers.
    let error = Store::open("s3://bucket/style/", &options(Some(AddressingStyle::VirtualHost), &[])).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
}
