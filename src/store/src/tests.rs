//! Stores over directories. `tests/store` runs the same and more against real servers.

use super::*;

fn open(dir: &Path) -> Store {
    Store::open(dir.to_str().unwrap(), &StoreOptions::default()).unwrap()
}

#[tokio::test]
async fn a_mapped_bucket_is_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let buckets = Buckets::parse(&[format!("s3://models={}", dir.path().display())]).unwrap();
    let options = StoreOptions { buckets, ..StoreOptions::default() };
    let store = Store::open("s3://models/sd3", &options).unwrap();
    store.put("a/b c#1.txt", "hello").await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("sd3/a/b c#1.txt")).unwrap(), b"hello");
    assert_eq!(store.uri(), "s3://models/sd3/");
    assert_eq!(store.local_directory().unwrap(), std::fs::canonicalize(dir.path()).unwrap().join("sd3"));
    assert_eq!(store.child("a/").unwrap().list("").await.unwrap()[0].key, "b c#1.txt");
    assert!(store.child("../other").is_err());
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_empty_and_is_made_by_writing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("not/yet"));
    assert_eq!(store.list("").await.unwrap(), []);
    assert_eq!(store.head("x").await.unwrap(), None);
    store.delete("x").await.unwrap();
    assert!(store.get("x").await.unwrap_err().is_not_found());
    assert_eq!(store.create("x", "1").await.unwrap(), Created::Yes);
    assert_eq!(store.create("x", "2").await.unwrap(), Created::AlreadyExists);
    assert_eq!(store.get("x").await.unwrap(), "1");
}

#[tokio::test]
async fn lists_are_sorted_by_key_and_end_at_folder_boundaries() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for key in ["b", "a/2", "a/10", "ab/1", "a.txt", "Z"] {
        store.put(key, key.to_owned()).await.unwrap();
    }
    let keys = |objects: Vec<ObjectInfo>| objects.into_iter().map(|object| object.key).collect::<Vec<_>>();
    assert_eq!(keys(store.list("").await.unwrap()), ["Z", "a.txt", "a/10", "a/2", "ab/1", "b"]);
    assert_eq!(keys(store.list("a").await.unwrap()), ["a/10", "a/2"]);
}

#[tokio::test]
async fn an_object_larger_than_the_limit_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.put("x", "12345").await.unwrap();
    assert_eq!(store.get_limited("x", 5).await.unwrap(), "12345");
    assert_eq!(store.get_limited("x", 4).await.unwrap_err().kind(), StoreErrorKind::Corrupt);
    assert_eq!(store.get_range("x", 1..3).await.unwrap(), "23");
    assert_eq!(store.get_range("x", 3..30).await.unwrap(), "45");
    assert_eq!(store.get_range("x", 2..2).await.unwrap(), "");
}

#[test]
fn folder_markers_of_consoles_are_not_objects() {
    let object = |key: &str, size| ObjectInfo { key: key.into(), size, etag: None };
    let objects = vec![object("empty", 0), object("sub", 0), object("sub-a", 1), object("sub/x", 1)];
    let keys: Vec<_> = without_folder_markers(objects).into_iter().map(|object| object.key).collect();
    assert_eq!(keys, ["empty", "sub-a", "sub/x"]);
}

#[test]
fn endpoints_must_be_plain_addresses_and_no_secret_is_shown() {
    let environment = Environment::from_pairs([("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", "very-secret-value")]);
    for endpoint in ["minio:9000", "ftp://minio", "http://me:hidden@minio:9000", "https://minio/?X-Amz-Signature=hidden", "https://"] {
        let options = StoreOptions { endpoint: Some(endpoint.into()), environment: environment.clone(), ..StoreOptions::default() };
        let error = Store::open("s3://bucket/", &options).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::InvalidLocation);
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
    let options = StoreOptions { endpoint: Some("http://127.0.0.1:9".into()), environment, ..StoreOptions::default() };
    let shown = format!("{options:?} {:?}", Store::open("s3://bucket/prefix", &options).unwrap());
    assert!(!shown.contains("very-secret") && !shown.contains("AKIA"), "{shown}");
}

#[test]
fn a_broken_service_account_key_is_not_quoted() {
    let environment = Environment::from_pairs([("GOOGLE_SERVICE_ACCOUNT_KEY", "{\"private_key\": \"very-secret-value\"}")]);
    let error = Store::open("gs://bucket/", &StoreOptions { environment, ..StoreOptions::default() }).unwrap_err();
    assert!(!http::chain(&error).contains("very-secret"), "{error:?}");
    assert!(!format!("{error:?}").contains("very-secret"));
}

/// Everything asynchronous can be spawned on a runtime of several threads. It is enough that this compiles.
#[test]
fn futures_can_be_spawned() {
    fn spawnable<T: Send>(_: T) {}

    let store = open(Path::new("/nowhere"));
    let source = model_source::ModelSource::Directory("/nowhere".into());
    let options = StoreOptions::default();
    spawnable(store.get("x"));
    spawnable(store.get_range("x", 0..1));
    spawnable(store.head("x"));
    spawnable(store.list(""));
    spawnable(store.put("x", "y"));
    spawnable(store.put_file("x", Path::new("y")));
    spawnable(store.create("x", "y"));
    spawnable(store.delete("x"));
    spawnable(store.download_all(&[], Path::new("/nowhere"), 1, &NoProgress));
    spawnable(claims::Claim::acquire(&store, "me"));
    spawnable(manifest::publish(&store, Vec::new(), serde_json::Value::Null, None));
    spawnable(manifest::first_that_verifies(&store, &["x"]));
    spawnable(async {
        let model = model_source::ModelFolder::open(&source, &options, Path::new("/nowhere")).await?;
        model.fingerprint(model_source::Parts::ALL).await?;
        model.fetch(model_source::Parts::ALL, &NoProgress).await
    });
}
