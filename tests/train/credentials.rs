//! What a server hears of the job's credentials when only the model is there.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::{Bench, text};

/// Credentials of `spec.storage`, as its Secret gives them to the pod.
const JOBS_OWN: [(&str, &str); 8] = [
    ("AWS_ACCESS_KEY_ID", "jobs-own-access-key"),
    ("AWS_SECRET_ACCESS_KEY", "jobs-own-secret-key"),
    ("AWS_SESSION_TOKEN", "jobs-own-session-token"),
    ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
    ("AZURE_STORAGE_SAS_KEY", "sv=2022-11-02&sig=jobs-own-signature"),
    ("GOOGLE_SERVICE_ACCOUNT_KEY", r#"{"private_key": "jobs-own-private-key", "private_key_id": "jobs-own", "client_email": "a@b.c", "disable_oauth": true}"#),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/none"),
    ("FINETUNE_STORAGE_RETRY_SECONDS", "5"),
];
/// Credentials that are named for the model.
const MODELS_OWN: [(&str, &str); 4] = [
    ("MODEL_AWS_ACCESS_KEY_ID", "models-own-access-key"),
    ("MODEL_AWS_SECRET_ACCESS_KEY", "models-own-secret-key"),
    ("MODEL_AZURE_STORAGE_ACCOUNT_NAME", "account"),
    ("MODEL_AZURE_STORAGE_SAS_KEY", "sv=2022-11-02&sig=models-own-signature"),
];

/// A server that refuses every request and keeps what it heard.
struct Listener {
    address: String,
    heard: Arc<Mutex<String>>,
}

impl Listener {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let heard = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&heard);
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
                while let Ok(count @ 1..) = client.read(&mut buffer) {
                    request.extend_from_slice(&buffer[..count]);
                    if request.windows(4).any(|end| end == b"\r\n\r\n") {
                        break;
                    }
                }
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&request));
                let _gone = client.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        Self { address, heard }
    }

    /// What a job says here whose model alone is at this server.
    fn hears(&self, scheme: &str, credentials: &Value) -> String {
        let bench = Bench::new();
        let mut storage = json!({"endpoint": self.address});
        storage["credentials"] = credentials.clone();
        let spec = json!({"model": {"source": {"objectStore": {"uri": format!("{scheme}://models/micro/"), "storage": storage}}}});
        let output = bench.command(&spec).envs(JOBS_OWN).envs(MODELS_OWN).output().unwrap();
        assert_eq!(output.status.code(), Some(77), "{}", text(&output));
        std::mem::take(&mut *self.heard.lock().unwrap())
    }
}

#[test]
fn a_models_own_server_never_hears_the_jobs_credentials() {
    let listener = Listener::new();
    for scheme in ["s3", "az", "gs"] {
        let heard = listener.hears(scheme, &json!({}));
        assert!(heard.contains("HTTP/1.1"), "{scheme}: no request has come");
        let lower = heard.to_lowercase();
        for word in ["jobs-own", "models-own", "authorization:", "x-amz-security-token", "sig=", "bearer"] {
            assert!(!lower.contains(word), "{scheme}: {word} in {heard}");
        }
    }
}

#[test]
fn a_models_own_server_hears_the_credentials_that_are_named_for_it() {
    let listener = Listener::new();
    let named = json!({"secretRef": {"name": "model"}});
    for (scheme, expected) in [("s3", "Credential=models-own-access-key"), ("az", "sig=models-own-signature")] {
        let heard = listener.hears(scheme, &named);
        assert!(heard.contains(expected), "{scheme}: {heard}");
        assert!(!heard.contains("jobs-own"), "{scheme}: {heard}");
    }
}
