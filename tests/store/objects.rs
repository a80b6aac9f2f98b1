//! The same tests on a directory, SeaweedFS and gofakes3 (S3), Azurite (Azure) and fake-gcs-server (Google).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use finetune_store::claims::{self, Claim};
use finetune_store::manifest::{self, Content};
use finetune_store::model_source::{ModelFolder, ModelSource, Parts};
use finetune_store::{Created, Environment, NoProgress, Store, StoreErrorKind, StoreOptions};

use super::{Counter, Place, cut_short, noise, servers};

macro_rules! on_every_store {
    ($($test:ident),* $(,)?) => {
        mod directory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { super::$test(super::Place::directory()).await })*
        }
        mod s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { super::$test(super::Place::server(super::servers::seaweedfs())).await })*
        }
        mod gofakes3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { super::$test(super::Place::server(super::servers::gofakes3())).await })*
        }
        mod azure {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { super::$test(super::Place::server(super::servers::azurite())).await })*
        }
        mod google {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $test() { super::$test(super::Place::server(super::servers::fake_gcs_server())).await })*
        }
    };
}

on_every_store!(
    a_large_file_goes_in_parts,
    a_model_is_fetched_by_parts_and_only_once,
    a_publication_verifies_and_a_damaged_one_does_not,
    a_replaced_object_is_not_mixed_with_its_predecessor,
    attempts_get_epochs_that_grow,
    objects_come_back_as_they_were_put,
    single_files_are_put_into_a_folder,
    of_sixteen_creators_one_wins,
    what_was_downloaded_is_not_downloaded_again,
);

async fn objects_come_back_as_they_were_put(place: Place) {
    let store = place.store("objects");
    assert_eq!(store.list("").await.unwrap(), []);
    assert_eq!(store.head("none").await.unwrap(), None);
    assert!(store.get("none").await.unwrap_err().is_not_found());
    store.delete("none").await.unwrap();

    let keys = ["a.txt", "folder/b c+d&e=f.png", "folder/sub/ü%41#1[2]~.png", "folder-2/x", "empty"];
    for key in keys {
        let content = if key == "empty" { String::new() } else { format!("content of {key}") };
        store.put(key, content.clone()).await.unwrap();
        assert_eq!(store.get(key).await.unwrap(), content, "{key}");
        assert_eq!(store.head(key).await.unwrap().unwrap().size, content.len() as u64, "{key}");
    }
    let listed = |found: Vec<finetune_store::ObjectInfo>| found.into_iter().map(|object| object.key).collect::<Vec<_>>();
    let mut all = keys.to_vec();
    all.sort_unstable();
    assert_eq!(listed(store.list("").await.unwrap()), all);
    assert_eq!(listed(store.list("folder").await.unwrap()), ["folder/b c+d&e=f.png", "folder/sub/ü%41#1[2]~.png"]);
    assert_eq!(listed(store.child("folder").unwrap().list("sub/").await.unwrap()), ["sub/ü%41#1[2]~.png"]);

    assert_eq!(store.get_range("a.txt", 8..10).await.unwrap(), "of");
    assert_eq!(store.get_range("a.txt", 11..999).await.unwrap(), "a.txt");
    let before = store.head("a.txt").await.unwrap().unwrap().etag;
    store.put("a.txt", "changed").await.unwrap();
    assert_eq!(store.get("a.txt").await.unwrap(), "changed");
    assert_ne!(store.head("a.txt").await.unwrap().unwrap().etag, before);
    assert_eq!(store.get_limited("a.txt", 6).await.unwrap_err().kind(), StoreErrorKind::Corrupt);

    for key in keys {
        store.delete(key).await.unwrap();
        store.delete(key).await.unwrap();
    }
    assert_eq!(store.list("").await.unwrap(), []);
}

async fn of_sixteen_creators_one_wins(place: Place) {
    let store = place.store("race");
    for round in 0..5 {
        let start = Arc::new(tokio::sync::Barrier::new(16));
        let creators: Vec<_> = (0..16)
            .map(|creator| {
                let (store, start) = (store.clone(), Arc::clone(&start));
                tokio::spawn(async move {
                    start.wait().await;
                    (creator, store.create(&format!("round-{round}.json"), format!("creator {creator}")).await.unwrap())
                })
            })
            .collect();
        let mut winners = Vec::new();
        for creator in creators {
            if let (creator, Created::Yes) = creator.await.unwrap() {
                winners.push(creator);
            }
        }
        assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
        assert_eq!(store.get(&format!("round-{round}.json")).await.unwrap(), format!("creator {}", winners[0]));
    }
}

async fn a_large_file_goes_in_parts(place: Place) {
    let store = place.store("large");
    let folder = tempfile::tempdir().unwrap();
    let (up, down) = (folder.path().join("up"), folder.path().join("down/er/file"));
    let content = noise(1, (20 << 20) + 12_345);
    std::fs::write(&up, &content).unwrap();
    store.put_file("large.bin", &up).await.unwrap();
    assert_eq!(store.head("large.bin").await.unwrap().unwrap().size, content.len() as u64);
    store.put("from-memory.bin", content.clone()).await.unwrap();
    for key in ["large.bin", "from-memory.bin"] {
        store.download_verified(key, &down, Some(finetune_common::digest::sha256(&content)), &NoProgress).await.unwrap();
        assert!(std::fs::read(&down).unwrap() == content, "{key}");
    }
    // Nothing is left of the transfers, on this machine or in the store.
    assert_eq!(std::fs::read_dir(down.parent().unwrap()).unwrap().count(), 1);
    assert_eq!(store.list("").await.unwrap().len(), 2);
    let wrong = store.download_verified("large.bin", &down, Some([7; 32]), &NoProgress).await.unwrap_err();
    assert_eq!(wrong.kind(), StoreErrorKind::Corrupt);
    assert!(std::fs::read(&down).unwrap() == content, "a download that does not verify replaces nothing");
    assert_eq!(std::fs::read_dir(down.parent().unwrap()).unwrap().count(), 1);
}

/// Downloads until `bytes` have arrived.
async fn download_some(store: &Store, key: &str, dest: &std::path::Path, bytes: u64) {
    let counter = Counter { limit: Some(bytes), ..Counter::default() };
    cut_short(store.download(key, dest, &counter)).await;
    assert!(!dest.exists());
}

async fn what_was_downloaded_is_not_downloaded_again(place: Place) {
    let store = place.store("resume");
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("file");
    let content = noise(2, 24 << 20);
    store.put("file", content.clone()).await.unwrap();
    download_some(&store, "file", &dest, 12 << 20).await;

    let counter = Counter::default();
    store.download("file", &dest, &counter).await.unwrap();
    let (resumed, advanced) = (counter.resumed.load(Ordering::SeqCst), counter.advanced.load(Ordering::SeqCst));
    assert!(resumed >= 4 << 20, "resumed at {resumed}");
    assert_eq!(resumed + advanced, content.len() as u64);
    assert!(std::fs::read(&dest).unwrap() == content);

    // Damaged on this machine's disk meanwhile: noticed by the digest, fetched again.
    let second = folder.path().join("second");
    download_some(&store, "file", &second, 12 << 20).await;
    let part = folder.path().join("second.part");
    wait_for_unlocked(&part);
    let mut damaged = std::fs::read(&part).unwrap();
    damaged[1000] ^= 1;
    std::fs::write(&part, damaged).unwrap();
    store.download_verified("file", &second, Some(finetune_common::digest::sha256(&content)), &NoProgress).await.unwrap();
    assert!(std::fs::read(&second).unwrap() == content);
}

/// A dropped transfer may still be writing its last piece.
fn wait_for_unlocked(path: &std::path::Path) {
    std::fs::File::open(path).unwrap().lock().unwrap();
}

async fn a_replaced_object_is_not_mixed_with_its_predecessor(place: Place) {
    let store = place.store("replaced");
    let folder = tempfile::tempdir().unwrap();
    let dest = folder.path().join("file");
    let (old, new) = (noise(3, 24 << 20), noise(4, 24 << 20));
    store.put("file", old).await.unwrap();
    download_some(&store, "file", &dest, 12 << 20).await;
    store.put("file", new.clone()).await.unwrap();
    let counter = Counter::default();
    store.download("file", &dest, &counter).await.unwrap();
    assert_eq!(counter.resumed.load(Ordering::SeqCst), 0);
    assert!(std::fs::read(&dest).unwrap() == new);
}

async fn attempts_get_epochs_that_grow(place: Place) {
    let store = place.store("claims");
    let first = Claim::acquire(&store, "first").await.unwrap();
    assert_eq!(first.epoch(), 1);
    assert!(first.is_newest().await.unwrap());

    let racers: Vec<_> = (0..8)
        .map(|racer| {
            let store = store.clone();
            tokio::spawn(async move { Claim::acquire(&store, &format!("racer {racer}")).await.unwrap() })
        })
        .collect();
    let mut epochs = Vec::new();
    for racer in racers {
        epochs.push(racer.await.unwrap().epoch());
    }
    epochs.sort_unstable();
    assert_eq!(epochs, (2..=9).collect::<Vec<_>>());
    assert!(!first.is_newest().await.unwrap());
    let error = first.check().await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Superseded);
    assert!(error.to_string().contains("attempt 1") && error.to_string().contains("attempt 9"), "{error}");

    let last = Claim::acquire(&store, "last").await.unwrap();
    assert_eq!(last.epoch(), 10);
    last.check().await.unwrap();
    assert_eq!(claims::read(&store, 10).await.unwrap().unwrap(), *last.record());
    assert_eq!(claims::read(&store, 11).await.unwrap(), None);
}

async fn a_publication_verifies_and_a_damaged_one_does_not(place: Place) {
    let store = place.store("publication");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.bin");
    std::fs::write(&file, noise(5, 9 << 20)).unwrap();
    for step in [1, 2, 3] {
        let files = vec![("state.bin".to_owned(), Content::File(file.clone())), ("small/step.txt".to_owned(), Content::Bytes(format!("{step}").into()))];
        manifest::publish(&store.child(&format!("step-{step}")).unwrap(), files, serde_json::json!({"step": step}), None).await.unwrap();
    }
    let newest =
        async || manifest::first_that_verifies(&store, &["step-4", "step-3", "step-2", "step-1"]).await.unwrap().unwrap().manifest.metadata["step"].clone();
    assert_eq!(newest().await, 3);
    store.put("step-3/small/step.txt", "4").await.unwrap();
    assert_eq!(newest().await, 2);
    store.delete("step-2/state.bin").await.unwrap();
    assert_eq!(newest().await, 1);
}

async fn a_model_is_fetched_by_parts_and_only_once(place: Place) {
    let (uri, cache) = (place.uri("model"), tempfile::tempdir().unwrap());
    let store = Store::open(&uri, &place.options).unwrap();
    let weights = noise(6, 1 << 20);
    let index = r#"{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}}"#;
    for (key, content) in [
        ("model_index.json", b"{}".to_vec()),
        ("vae/config.json", b"{}".to_vec()),
        ("vae/diffusion_pytorch_model.safetensors", weights.clone()),
        ("vae/diffusion_pytorch_model.fp16.safetensors", b"half".to_vec()),
        ("transformer/config.json", b"{}".to_vec()),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", index.as_bytes().to_vec()),
        ("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", b"one".to_vec()),
        ("transformer/diffusion_pytorch_model-00002-of-00002.safetensors", b"two".to_vec()),
        ("sd3.safetensors", b"all in one".to_vec()),
    ] {
        store.put(key, content).await.unwrap();
    }
    let source = ModelSource::ObjectStore { uri: uri.clone(), sha256_manifest: None };
    let open = async || ModelFolder::open(&source, &place.options, cache.path()).await.unwrap();
    let counter = Counter::default();
    let folder = open().await.fetch(Parts::VAE, &counter).await.unwrap();
    assert!(std::fs::read(folder.join("vae/diffusion_pytorch_model.safetensors")).unwrap() == weights);
    if let Some(directory) = &place.directory {
        assert!(folder.starts_with(std::fs::canonicalize(directory.path()).unwrap()), "a directory is used where it is");
        assert_eq!(*counter.finished.lock().unwrap(), [""; 0]);
        return;
    }
    assert_eq!(counter.finished.lock().unwrap().len(), 2, "model_index.json was read when the folder was opened");
    assert!(!folder.join("vae/diffusion_pytorch_model.fp16.safetensors").exists() && !folder.join("transformer").exists());
    let print = open().await.fingerprint(Parts::VAE).await.unwrap();

    let counter = Counter::default();
    assert_eq!(open().await.fetch(Parts::TRANSFORMER | Parts::VAE, &counter).await.unwrap(), folder);
    assert_eq!(counter.finished.lock().unwrap().len(), 4, "the VAE is there already");
    assert!(folder.join("transformer/diffusion_pytorch_model-00002-of-00002.safetensors").exists());

    // Another version goes into another folder.
    store.put("vae/diffusion_pytorch_model.safetensors", noise(7, 1 << 20)).await.unwrap();
    assert_ne!(open().await.fetch(Parts::VAE, &NoProgress).await.unwrap(), folder);
    assert_ne!(open().await.fingerprint(Parts::VAE).await.unwrap(), print);

    let error = open().await.fetch(Parts::TEXT_ENCODERS, &NoProgress).await.unwrap_err();
    assert!(error.to_string().contains("text_encoder/"), "{error}");
    let nowhere = ModelSource::ObjectStore { uri: place.uri("nothing"), sha256_manifest: None };
    let error = ModelFolder::open(&nowhere, &place.options, cache.path()).await.unwrap_err();
    assert_eq!(error.store_kind(), Some(StoreErrorKind::NotFound));
}

/// A folder in diffusers' layout of links to single files: each file is fetched once, for whichever part is asked for first.
async fn single_files_are_put_into_a_folder(place: Place) {
    let (uri, cache) = (place.uri("model"), tempfile::tempdir().unwrap());
    let store = Store::open(&uri, &place.options).unwrap();
    for (key, content) in
        [("sd3.safetensors", noise(8, 1 << 20)), ("text_encoders/xxl/t5.safetensors", noise(9, 1 << 18)), ("README.md", b"# A model".to_vec())]
    {
        store.put(key, content).await.unwrap();
    }
    let source = ModelSource::ObjectStore { uri: uri.clone(), sha256_manifest: None };
    let pairs = |pairs: &[(&str, &str)]| pairs.iter().map(|(at, what)| ((*at).to_owned(), (*what).to_owned())).collect::<std::collections::BTreeMap<_, _>>();
    let texts = [
        ("model_index.json", r#"{"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [null, null]}"#),
        ("transformer/config.json", "{}"),
        ("transformer/tensors.json", "{}"),
        ("vae/config.json", r#"{"a": 1}"#),
    ];
    let open = async |texts: &[(&str, &str)]| {
        let mut listed = ModelFolder::open(&source, &place.options, cache.path()).await.unwrap();
        assert!(!listed.has_contents());
        assert_eq!(listed.size_of("text_encoders/xxl/t5.safetensors").unwrap(), Some(1 << 18));
        assert_eq!(listed.size_of("sd3.5.safetensors").unwrap(), None);
        assert!(listed.size_of("../sd3.safetensors").is_err());
        let weights = ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"];
        let mut links = pairs(&weights.map(|at| (at, "sd3.safetensors")));
        links.insert("text_encoder_2/model.safetensors".into(), "text_encoders/xxl/t5.safetensors".into());
        listed.arranged(links, pairs(texts)).unwrap()
    };
    let model = open(&texts).await;
    assert!(model.has_contents() && model.class() == Some("StableDiffusion3Pipeline") && model.is_without_t5());
    let found = model.look(Parts::VAE).await.unwrap();
    assert_eq!((found.problems, found.weights[0].size), (vec![], 1 << 20));
    assert!(model.first_bytes(&found.weights[0].path, 100).await.unwrap() == noise(8, 1 << 20)[..100]);
    let counter = Counter::default();
    let folder = model.fetch(Parts::VAE, &counter).await.unwrap();
    model.fetch(Parts::TRANSFORMER, &counter).await.unwrap();
    for part in ["vae", "transformer"] {
        assert!(std::fs::read(folder.join(part).join("diffusion_pytorch_model.safetensors")).unwrap() == noise(8, 1 << 20), "{part}");
    }
    assert_eq!(std::fs::read_to_string(folder.join("vae/config.json")).unwrap(), r#"{"a": 1}"#);
    // One file was fetched, once, and the other one not at all; of a directory none.
    assert_eq!(counter.finished.lock().unwrap().len(), usize::from(place.directory.is_none()));
    assert!(!folder.join("text_encoder_2/model.safetensors").exists());
    let print = model.fingerprint(Parts::VAE).await.unwrap();
    assert_eq!(open(&texts).await.fingerprint(Parts::VAE).await.unwrap(), print);

    // Other small files are another folder with the same weights; other weights are others.
    let mut more = texts;
    more[3].1 = r#"{"a": 2}"#;
    let counter = Counter::default();
    assert_ne!(open(&more).await.fetch(Parts::VAE, &counter).await.unwrap(), folder);
    assert_eq!(counter.finished.lock().unwrap().len(), 0);
    assert_ne!(open(&more).await.fingerprint(Parts::VAE).await.unwrap(), print);
    store.put("sd3.safetensors", noise(10, 1 << 20)).await.unwrap();
    let again = open(&texts).await;
    let folder = again.fetch(Parts::VAE, &NoProgress).await.unwrap();
    assert!(std::fs::read(folder.join("vae/diffusion_pytorch_model.safetensors")).unwrap() == noise(10, 1 << 20));
    assert_ne!(again.fingerprint(Parts::VAE).await.unwrap(), print);

    let listed = ModelFolder::open(&source, &place.options, cache.path()).await.unwrap();
    let error = listed.arranged(pairs(&[("vae/model.safetensors", "none.safetensors")]), pairs(&texts)).unwrap_err();
    assert!(error.to_string().contains("it has no file none.safetensors"), "{error}");
}

/// All texts of an error: what people and logs may see.
pub(super) fn shown(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = format!("{error:?}");
    let mut next = Some(error);
    while let Some(error) = next {
        text = format!("{text} | {error}");
        next = error.source();
    }
    text
}

#[tokio::test]
async fn credentials_that_are_refused_are_told_from_missing_things() {
    let server = servers::seaweedfs();
    let with = |pairs: &[(&str, &str)], bucket: &str| {
        let options = StoreOptions { environment: Environment::from_pairs(pairs.to_vec()), ..Place::server(server).options };
        Store::open(&format!("s3://{bucket}/denied/"), &options).unwrap()
    };
    let admin: Vec<(&str, &str)> = server.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();

    let wrong = with(&[("AWS_ACCESS_KEY_ID", "adminaccess"), ("AWS_SECRET_ACCESS_KEY", "a-wrong-secret-value")], servers::BUCKET);
    for error in [
        wrong.get("x").await.unwrap_err(),
        wrong.list("").await.unwrap_err(),
        wrong.put("x", "1").await.unwrap_err(),
        wrong.create("x", "1").await.unwrap_err(),
        wrong.head("x").await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), StoreErrorKind::PermissionDenied, "{error:?}");
        assert!(!shown(&error).contains("a-wrong-secret-value"), "{}", shown(&error));
    }
    let reader = with(&servers::S3_READER, servers::BUCKET);
    assert_eq!(reader.list("").await.unwrap(), []);
    assert!(reader.get("x").await.unwrap_err().is_not_found());
    assert_eq!(reader.put("x", "1").await.unwrap_err().kind(), StoreErrorKind::PermissionDenied);
    assert_eq!(reader.create("x", "1").await.unwrap_err().kind(), StoreErrorKind::PermissionDenied);

    let nowhere = with(&admin, "no-such-bucket");
    assert!(nowhere.get("x").await.unwrap_err().is_not_found());
    assert!(nowhere.list("").await.unwrap_err().is_not_found());
    assert!(nowhere.put("x", "1").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_wrong_azure_key_is_refused_and_not_shown() {
    let server = servers::azurite();
    let key = "c2VjcmV0LXRoYXQtaXMtd3JvbmctYW5kLWxvbmctZW5vdWdo";
    let environment = Environment::from_pairs([("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1"), ("AZURE_STORAGE_ACCOUNT_KEY", key)]);
    let options = StoreOptions { environment, ..Place::server(server).options };
    let error = Store::open("az://bucket/denied/", &options).unwrap().get("x").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::PermissionDenied);
    assert!(!shown(&error).contains(key) && !format!("{options:?}").contains(key));

    let environment = Environment::from_pairs([
        ("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1"),
        ("AZURE_STORAGE_SAS_KEY", "sv=2021-08-06&sig=c2lnbmF0dXJlLXRoYXQtaXMtd3Jvbmc%3D"),
    ]);
    let options = StoreOptions { environment, ..Place::server(server).options };
    let error = Store::open("az://bucket/denied/", &options).unwrap().get("x").await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::PermissionDenied);
    assert!(!shown(&error).contains("c2lnbmF0dXJl"), "{}", shown(&error));
}
