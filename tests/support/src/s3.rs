//! SeaweedFS as the bucket: a real S3 server on an address that pods reach.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _};

use crate::programs;

/// Credentials that the server accepts.
pub const ACCESS_KEY: &str = "tests";
/// The secret of [`ACCESS_KEY`].
pub const SECRET_KEY: &str = "tests-secret";

/// A running server. It ends with the test process, however that ends.
pub struct S3 {
    /// What pods put into `spec.storage.endpoint`.
    pub endpoint: String,
    host: String,
    ports: Vec<u16>,
    folder: tempfile::TempDir,
    server: Option<Child>,
}

impl S3 {
    /// Starts a server with an empty folder on this machine's address towards the cluster.
    pub async fn start() -> Self {
        programs::run(Command::new(programs::repository().join("tests/testbed/install-servers")).arg("weed")).unwrap_or_else(|error| panic!("{error}"));
        let host = std::env::var("FINETUNE_TEST_HOST").unwrap_or_else(|_| programs::cluster(&["host"]).trim().to_owned());
        let ports = free_ports(&host, 8);
        let mut s3 = Self { endpoint: format!("http://{host}:{}", ports[6]), host, ports, folder: tempfile::tempdir().expect("a folder"), server: None };
        s3.up().await;
        s3
    }

    /// Starts the server (again) on the same ports and folder.
    pub async fn up(&mut self) {
        let identities = serde_json::json!({"identities": [{
            "name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        let config = self.folder.path().join("s3.json");
        std::fs::write(&config, identities.to_string()).expect("the configuration is written");
        let data = self.folder.path().join("data");
        std::fs::create_dir_all(&data).expect("a folder");
        let port = |name: &str, index: usize| format!("-{name}={}", self.ports[index]);
        let arguments = [
            "server".to_owned(),
            "-s3".to_owned(),
            "-s3.autoCreateBucket".to_owned(),
            "-filer".to_owned(),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            "-master.telemetry=false".to_owned(),
            format!("-s3.localSocket={}", self.folder.path().join("s3.sock").display()),
            format!("-filer.localSocket={}", self.folder.path().join("filer.sock").display()),
            format!("-s3.config={}", config.display()),
            format!("-dir={}", data.display()),
            format!("-ip={}", self.host),
            format!("-ip.bind={}", self.host),
            "-master.volumeSizeLimitMB=64".to_owned(),
            "-volume.max=64".to_owned(),
            port("master.port", 0),
            port("master.port.grpc", 1),
            port("volume.port", 2),
            port("volume.port.grpc", 3),
            port("filer.port", 4),
            port("filer.port.grpc", 5),
            port("s3.port", 6),
            port("s3.port.grpc", 7),
        ];
        let log = std::fs::File::options().create(true).append(true).open(self.folder.path().join("weed.log")).expect("a log file");
        // The shell waits for its standard input to close, which happens when this process ends, and then ends the server; also where both are asked to end.
        let guard = r#""$@" </dev/null & server=$!; trap "" TERM; read -r _; kill -9 $server"#;
        let server = Command::new("sh")
            .args(["-c", guard, "weed"])
            .arg(weed())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .expect("the server starts");
        self.server = Some(server);
        let store = self.bucket("probe");
        let began = Instant::now();
        while let Err(error) = store.put(&Key::from("ready"), "yes".into()).await {
            assert!(began.elapsed() < Duration::from_mins(1), "the object store does not answer: {error}; {}", self.log());
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Kills the server; its data stays.
    pub fn down(&mut self) {
        if let Some(mut server) = self.server.take() {
            drop(server.stdin.take());
            let _ended = server.wait();
        }
    }

    /// The last lines of the server's log.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("weed.log")).unwrap_or_default();
        text.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    /// A client of one bucket, which need not exist yet.
    pub fn bucket(&self, name: &str) -> Arc<AmazonS3> {
        let store = AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_bucket_name(name)
            .with_region("us-east-1")
            .with_access_key_id(ACCESS_KEY)
            .with_secret_access_key(SECRET_KEY)
            .with_retry(object_store::RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(10), ..Default::default() })
            .build();
        Arc::new(store.expect("a client"))
    }

    /// Copies a folder of this machine into a bucket.
    pub async fn upload(&self, bucket: &str, folder: &Path, prefix: &str) {
        let store = self.bucket(bucket);
        for file in files(folder) {
            let name = file.strip_prefix(folder).expect("inside the folder").to_str().expect("a plain name");
            let bytes = std::fs::read(&file).expect("the file is read");
            store.put(&Key::from(format!("{prefix}{name}")), bytes.into()).await.expect("the file is uploaded");
        }
    }

    /// Names of all objects of a bucket below a prefix, sorted.
    pub async fn list(&self, bucket: &str, prefix: &str) -> Vec<String> {
        let found: Vec<_> = self.bucket(bucket).list(Some(&Key::from(prefix))).try_collect().await.expect("the bucket is listed");
        let mut names: Vec<String> = found.into_iter().map(|object| object.location.to_string()).collect();
        names.sort_unstable();
        names
    }

    /// An object's bytes.
    pub async fn read(&self, bucket: &str, key: &str) -> Option<Vec<u8>> {
        match self.bucket(bucket).get(&Key::from(key)).await {
            Ok(found) => Some(found.bytes().await.expect("the object is read").to_vec()),
            Err(object_store::Error::NotFound { .. }) => None,
            Err(error) => panic!("failed to read {bucket}/{key}: {error}"),
        }
    }

    /// Deletes an object.
    pub async fn delete(&self, bucket: &str, key: &str) {
        self.bucket(bucket).delete(&Key::from(key)).await.expect("the object is deleted");
    }

    /// Writes an object.
    pub async fn write(&self, bucket: &str, key: &str, bytes: Vec<u8>) {
        self.bucket(bucket).put(&Key::from(key), bytes.into()).await.expect("the object is written");
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.down();
    }
}

/// The server that tests/testbed/install-servers installed.
fn weed() -> PathBuf {
    let tools = std::env::var_os("FINETUNE_TEST_TOOLS").map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache")).join("finetune-operator/tools")
        },
        PathBuf::from,
    );
    let found = std::fs::read_dir(tools.join("bin")).expect("the tools folder").filter_map(Result::ok).map(|entry| entry.path());
    found.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("weed-"))).max().expect("weed is installed")
}

/// Ports that nobody uses now.
fn free_ports(host: &str, count: usize) -> Vec<u16> {
    let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind((host, 0)).expect("a free port")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("an address").port()).collect()
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder is there").filter_map(Result::ok) {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort_unstable();
    found
}
