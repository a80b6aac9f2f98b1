//! The job on a real S3 server: what is fetched, whose credentials, two trainers.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use finetune_store::{Environment, Store, StoreOptions};
use serde_json::{Value, json};

use crate::support::{Bench, LORA, reference, text, until};
use finetune_testing::servers::{BUCKET, S3_READER, Server, seaweedfs};

/// Forwards connections to a server and notes the first line of each request.
struct Proxy {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn to(endpoint: &str) -> Self {
        let target = endpoint.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = TcpStream::connect(&target).unwrap();
                let (back_from, back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let seen = Arc::clone(&seen);
                std::thread::spawn(move || forward(client, server, Some(&seen)));
                std::thread::spawn(move || forward(back_from, back_to, None));
            }
        });
        Self { address, requests }
    }

    /// Paths of the requests with this method since the last call.
    fn take(&self, method: &str) -> Vec<String> {
        let lines = std::mem::take(&mut *self.requests.lock().unwrap());
        lines.iter().filter_map(|line| line.strip_prefix(method)?.split_whitespace().next().map(str::to_owned)).collect()
    }
}

/// A request without a body starts a packet of its own, so its first line is found at the start of what was read.
fn forward(mut from: TcpStream, mut to: TcpStream, seen: Option<&Mutex<Vec<String>>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(seen) = seen
            && let Some(line) = String::from_utf8_lossy(&buffer[..count.min(2048)]).lines().next().filter(|l| l.contains(" HTTP/1."))
        {
            seen.lock().unwrap().push(line.to_owned());
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _closed_already = to.shutdown(Shutdown::Write);
}

fn store(server: &Server, prefix: &str) -> Store {
    let options =
        StoreOptions { endpoint: Some(server.endpoint.clone()), environment: Environment::from_pairs(server.environment.clone()), ..StoreOptions::default() };
    Store::open(&format!("s3://{BUCKET}/{prefix}/"), &options).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    let _installed_already = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

fn upload(server: &Server, prefix: &str, bench: &Bench) {
    let store = store(server, prefix);
    runtime().block_on(async {
        for folder in ["models/micro", "data"] {
            let root = bench.bucket(folder);
            let mut pending = vec![root.clone()];
            while let Some(dir) = pending.pop() {
                for entry in std::fs::read_dir(dir).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        pending.push(path);
                    } else {
                        let key = format!("{folder}/{}", path.strip_prefix(&root).unwrap().display());
                        store.put_file(&key, Path::new(&path)).await.unwrap();
                    }
                }
            }
        }
    });
}

fn get(server: &Server, prefix: &str, key: &str) -> Vec<u8> {
    runtime().block_on(store(server, prefix).get(key)).unwrap().to_vec()
}

fn spec(endpoint: &str, prefix: &str) -> Value {
    json!({
        "model": {"source": {"objectStore": {"uri": format!("s3://{BUCKET}/{prefix}/models/micro/")}}},
        "dataset": {"uri": format!("s3://{BUCKET}/{prefix}/data/")},
        "output": {"uri": format!("s3://{BUCKET}/{prefix}/out/")},
        "storage": {"endpoint": endpoint, "region": "us-east-1"},
    })
}

fn environment(server: &Server) -> Vec<(&str, &str)> {
    server.environment.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect()
}

/// All weight files below a folder.
fn weights_below(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(weights_below(&path));
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path.display().to_string());
        }
    }
    found
}

/// A resumed attempt on an empty disk loads what is prepared from beside the checkpoints: no request for an encoder, a
/// tokenizer or the VAE.
#[test]
fn a_resumed_attempt_on_an_empty_disk_never_fetches_encoders_or_vae() {
    let (server, bench) = (seaweedfs(), Bench::new());
    upload(server, "resume", &bench);
    let proxy = Proxy::to(&server.endpoint);
    let spec = spec(&proxy.address, "resume");
    // The look at the model reads small files and headers; weights come to the disk whole.
    let cache = bench.path("cache");
    let prepared = || weights_below(&cache).iter().filter(|path| ["/text_encoder", "/vae/"].iter().any(|part| path.contains(part))).count();

    let mut first = bench.start(&spec, &environment(server));
    first.await_log("saved a checkpoint");
    first.signal("TERM");
    assert_eq!(first.wait(), Some(75), "{}", first.log());
    assert_eq!(prepared(), 4, "the first attempt fetches them");
    proxy.take("GET ");

    bench.wipe_cache();
    let mut second = bench.start(&spec, &environment(server));
    assert_eq!(second.wait(), Some(0), "{}", second.log());
    assert!(second.log().contains("resuming from a checkpoint"));
    let paths = proxy.take("GET ");
    assert!(paths.iter().any(|p| p.contains("/transformer/diffusion_pytorch_model.safetensors")), "{paths:?}");
    assert_eq!(prepared(), 0, "{:?}", weights_below(&cache));
    // Kept in a bucket or in a directory, the LoRA is the same.
    assert!(get(server, "resume/out", LORA) == reference().0);
}

#[test]
fn refused_credentials_end_with_77() {
    let (server, bench) = (seaweedfs(), Bench::new());
    upload(server, "refused", &bench);
    let run = |credentials: &[(&str, &str)]| {
        let output = bench.command(&spec(&server.endpoint, "refused")).envs(credentials.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(77), "{}", text(&output));
        assert!(text(&output).contains("PermissionDenied"), "{}", text(&output));
        output
    };
    // May read, but not write: the claim is refused.
    run(&S3_READER);
    let output = run(&[("AWS_ACCESS_KEY_ID", "adminaccess"), ("AWS_SECRET_ACCESS_KEY", "wrong-secret-9876543210")]);
    assert!(!text(&output).contains("wrong-secret"));
}

/// As in `fencing.rs`, where conditional creation is the server's.
#[test]
fn of_two_trainers_on_a_bucket_one_publishes() {
    let (server, bench) = (seaweedfs(), Bench::new());
    upload(server, "two", &bench);
    let (spec, file) = (spec(&server.endpoint, "two"), bench.path("frozen"));
    let fault = format!("before-result:{}", file.display());
    let mut environment = environment(server);
    let new_environment = environment.clone();
    environment.push(("FINETUNE_FAULT", &fault));
    let mut old = bench.start(&spec, &environment);
    until(|| file.exists() || old.has_ended());
    old.signal("STOP");
    let mut new = bench.start(&spec, &new_environment);
    assert_eq!(new.wait(), Some(0), "{}", new.log());
    let result = get(server, "two/out", "result.json");
    std::fs::remove_file(&file).unwrap();
    old.signal("CONT");
    let code = old.wait();
    assert!(code == Some(0) || code == Some(75), "{code:?}: {}", old.log());
    assert!(get(server, "two/out", "result.json") == result);
    let winner: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(winner["attempt"], 2);
    assert!(get(server, "two/out", LORA) == reference().0);
}
