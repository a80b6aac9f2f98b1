//! Object-store servers for tests: real ones from packages, started once per test binary on free ports of 127.0.0.1.
//!
//! Each server runs below a small shell that waits for the end of its standard input, which the test binary holds open: however the binary
//! ends, its servers and their data go with it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

/// Bucket (container) that every server has.
pub const BUCKET: &str = "bucket";

/// How long a server may take until it answers. Generous: slow machines run tests too.
const START_LIMIT: Duration = Duration::from_mins(2);
/// Versions pinned in `tests/testbed/install-servers`.
const WEED: &str = "weed-4.48";
const GOFAKES3: &str = "gofakes3-1.2.0";
const NANIO: &str = "nanio-0.1.7";
const AZURITE: &str = "azurite-3.37.0";
const FAKE_GCS_SERVER: &str = "fake-gcs-server-1.56.1-2";

/// A running server and how to reach it.
pub struct Server {
    /// URI scheme of its buckets.
    pub scheme: &'static str,
    /// Its endpoint.
    pub endpoint: String,
    /// Its encrypted endpoint, if it has one: the certificate is signed by `tests/fixtures/tls/ca.pem`.
    pub encrypted_endpoint: Option<String>,
    /// Variables with credentials that may do everything.
    pub environment: Vec<(String, String)>,
    /// Ends the server when it is closed.
    _keeper: Mutex<Child>,
}

/// Credentials of [`seaweedfs`] that may read and list only.
pub const S3_READER: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "readeraccess"), ("AWS_SECRET_ACCESS_KEY", "readersecret-0123456789")];

/// SeaweedFS, which speaks the S3 protocol.
pub fn seaweedfs() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (keeper, ports) = start("weed", WEED, 9, |folder, ports| {
            let identity = |name: &str, key: &str, secret: &str, actions: &[&str]| {
                serde_json::json!({"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions})
            };
            let identities = serde_json::json!({"identities": [
                identity("admin", "adminaccess", "adminsecret-0123456789", &["Admin", "Read", "Write", "List", "Tagging"]),
                identity("reader", S3_READER[0].1, S3_READER[1].1, &["Read", "List"]),
            ]});
            let config = folder.join("s3.json");
            std::fs::write(&config, identities.to_string()).expect("the configuration can be written");
            let mut arguments = vec!["server".to_owned(), format!("-dir={}", folder.display()), "-ip=127.0.0.1".into(), "-ip.bind=127.0.0.1".into()];
            let names = [
                "master.port",
                "master.port.grpc",
                "volume.port",
                "volume.port.grpc",
                "filer.port",
                "filer.port.grpc",
                "s3.port",
                "s3.port.grpc",
                "s3.port.https",
            ];
            arguments.extend(names.iter().zip(ports).map(|(name, port)| format!("-{name}={port}")));
            let tls = crate::programs::repository().join("tests/fixtures/tls");
            arguments.push(format!("-s3.cert.file={}", tls.join("server.pem").display()));
            arguments.push(format!("-s3.key.file={}", tls.join("server.key").display()));
            for option in ["-s3", "-filer", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-master.telemetry=false", "-volume.max=16"] {
                arguments.push(option.into());
            }
            arguments.push("-master.volumeSizeLimitMB=64".into());
            arguments.push(format!("-s3.config={}", config.display()));
            arguments.push(format!("-s3.localSocket={}", folder.join("s3.sock").display()));
            arguments.push(format!("-filer.localSocket={}", folder.join("filer.sock").display()));
            arguments
        });
        // Buckets are folders of the filer. The gateway answers once it has read its configuration.
        until("SeaweedFS makes a bucket", || http(ports[4], "POST", &format!("/buckets/{BUCKET}/"), &[], b"").is_some_and(|status| status < 300));
        until("SeaweedFS answers S3 requests", || http(ports[6], "GET", &format!("/{BUCKET}/"), &[], b"") == Some(403));
        Server {
            scheme: "s3",
            endpoint: format!("http://127.0.0.1:{}", ports[6]),
            encrypted_endpoint: Some(format!("https://127.0.0.1:{}", ports[8])),
            environment: pairs(&[("AWS_ACCESS_KEY_ID", "adminaccess"), ("AWS_SECRET_ACCESS_KEY", "adminsecret-0123456789"), ("AWS_REGION", "us-east-1")]),
            _keeper: Mutex::new(keeper),
        }
    })
}

/// Host below which [`gofakes3`] knows its buckets, for those who ask it as their proxy.
pub const VIRTUAL_HOST: &str = "s3.test";

/// gofakes3, which speaks the S3 protocol in both styles of addresses, takes any key, and checks no signature.
pub fn gofakes3() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (keeper, ports) = start("gofakes3", GOFAKES3, 1, |_, ports| {
            let host = format!("127.0.0.1:{}", ports[0]);
            ["-host", &host, "-backend", "memory", "-initialbucket", BUCKET, "-hostbucketbase", VIRTUAL_HOST].map(String::from).to_vec()
        });
        until("gofakes3 answers", || http(ports[0], "GET", &format!("/{BUCKET}/"), &[], b"") == Some(200));
        Server {
            scheme: "s3",
            endpoint: format!("http://127.0.0.1:{}", ports[0]),
            encrypted_endpoint: None,
            environment: pairs(&[("AWS_ACCESS_KEY_ID", "anybody"), ("AWS_SECRET_ACCESS_KEY", "anything-0123456789"), ("AWS_REGION", "us-east-1")]),
            _keeper: Mutex::new(keeper),
        }
    })
}

/// nanio, which speaks the S3 protocol, checks signatures to the letter, and ignores the condition of conditional creates.
pub fn nanio() -> &'static Server {
    const KEY: &str = "nanioaccess";
    const SECRET: &str = "naniosecret-0123456789";

    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (keeper, ports) = start("nanio", NANIO, 1, |folder, ports| {
            let (options, data) = (folder.join("options.toml"), folder.join("data"));
            std::fs::write(&options, format!("[[users]]\naccess_key = {KEY:?}\nsecret_key = {SECRET:?}\n")).expect("the options can be written");
            // A bucket is a folder.
            std::fs::create_dir_all(data.join(BUCKET)).expect("the bucket can be made");
            let (options, data, port) = (options.display().to_string(), data.display().to_string(), ports[0].to_string());
            ["serve", "--options", &options, "--data-dir", &data, "--host", "127.0.0.1", "--port", &port, "--no-access-log"].map(String::from).to_vec()
        });
        until("nanio answers", || http(ports[0], "GET", &format!("/{BUCKET}/"), &[], b"") == Some(403));
        Server {
            scheme: "s3",
            endpoint: format!("http://127.0.0.1:{}", ports[0]),
            encrypted_endpoint: None,
            environment: pairs(&[("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_REGION", "us-east-1")]),
            _keeper: Mutex::new(keeper),
        }
    })
}

/// Azurite, which speaks the protocol of Azure Blob Storage.
pub fn azurite() -> &'static Server {
    // The account that Azurite documents.
    const ACCOUNT: &str = "devstoreaccount1";
    const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (keeper, ports) = start("azurite", AZURITE, 1, |folder, ports| {
            let location = folder.display().to_string();
            let port = ports[0].to_string();
            ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", &location, "--blobHost", "127.0.0.1", "--blobPort", &port]
                .map(String::from)
                .to_vec()
        });
        until("Azurite makes a container", || {
            let date = jiff::Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            let headers = format!("x-ms-date:{date}\nx-ms-version:2021-08-06");
            let to_sign = format!("PUT\n\n\n\n\n\n\n\n\n\n\n\n{headers}\n/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container");
            let signature = base64(&hmac_sha256(&from_base64(KEY), to_sign.as_bytes()));
            let authorization = format!("SharedKey {ACCOUNT}:{signature}");
            let headers = [("x-ms-date", date.as_str()), ("x-ms-version", "2021-08-06"), ("authorization", &authorization)];
            http(ports[0], "PUT", &format!("/{ACCOUNT}/{BUCKET}?restype=container"), &headers, b"").is_some_and(|status| status == 201 || status == 409)
        });
        Server {
            scheme: "az",
            endpoint: format!("http://127.0.0.1:{}/{ACCOUNT}", ports[0]),
            encrypted_endpoint: None,
            environment: pairs(&[("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT), ("AZURE_STORAGE_ACCOUNT_KEY", KEY)]),
            _keeper: Mutex::new(keeper),
        }
    })
}

/// fake-gcs-server, which speaks the protocols of Google Cloud Storage, with the writes of the XML API (`tests/testbed/gcs-server`).
pub fn fake_gcs_server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let (keeper, ports) = start("fake-gcs-server", FAKE_GCS_SERVER, 1, |_, ports| vec!["-listen".to_owned(), format!("127.0.0.1:{}", ports[0])]);
        let body = format!("{{\"name\": \"{BUCKET}\"}}");
        until("fake-gcs-server makes a bucket", || {
            http(ports[0], "POST", "/storage/v1/b?project=test", &[("content-type", "application/json")], body.as_bytes())
                .is_some_and(|status| status == 200 || status == 409)
        });
        let account =
            r#"{"private_key": "none-private-key", "private_key_id": "none-private-key-id", "client_email": "none@example.com", "disable_oauth": true}"#;
        Server {
            scheme: "gs",
            endpoint: format!("http://127.0.0.1:{}", ports[0]),
            encrypted_endpoint: None,
            environment: pairs(&[("GOOGLE_SERVICE_ACCOUNT_KEY", account)]),
            _keeper: Mutex::new(keeper),
        }
    })
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Where `tests/testbed/install-servers` installs.
fn tools_folder() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"))).expect("HOME is set");
    cache.join("finetune-operator").join("tools")
}

/// The installed program `name`.
pub(crate) fn program(server: &str, name: &str) -> PathBuf {
    let tools = std::env::var_os("FINETUNE_TEST_TOOLS").map_or_else(tools_folder, PathBuf::from);
    let program = tools.join("bin").join(name);
    assert!(program.exists(), "{} is not installed: run tests/testbed/install-servers {server}", program.display());
    program
}

/// Starts a server on `count` free ports; again on others when one of them was taken meanwhile.
fn start(server: &str, name: &str, count: usize, arguments: impl Fn(&Path, &[u16]) -> Vec<String>) -> (Child, Vec<u16>) {
    // Ends the server and removes its folder when standard input ends; ends itself when the server ends.
    const KEEPER: &str = r#"folder=$1; shift; "$@" >"$folder/log" 2>&1 & server=$!
        (cat >/dev/null; : >"$folder/ended"; kill -9 $server) <&3 2>/dev/null & watcher=$!
        wait $server 2>/dev/null; [ -e "$folder/ended" ] || { tail -n 20 "$folder/log" >&2; kill $watcher; }
        rm -rf "$folder""#;
    let program = program(server, name);
    for _ in 0..5 {
        let folder = tempfile::Builder::new().prefix("finetune-test-").tempdir().expect("a temporary folder can be made").keep();
        let ports = free_ports(count);
        let mut child = Command::new("sh")
            .args(["-c", &format!("exec 3<&0\n{KEEPER}"), "sh"])
            .arg(&folder)
            .arg(&program)
            .args(arguments(&folder, &ports))
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("sh can be started");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if child.try_wait().expect("a child can be waited for").is_some() {
                break;
            }
            if ports.iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
                return (child, ports);
            }
            assert!(Instant::now() < deadline, "{server} does not listen on {ports:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    panic!("{server} does not start; its last lines are above");
}

fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("there is a free port")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("it is bound").port()).collect()
}

/// Repeats `attempt` until it holds.
fn until(what: &str, attempt: impl Fn() -> bool) {
    let deadline = Instant::now() + START_LIMIT;
    while !attempt() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Status of one HTTP/1.1 request; `None` without an answer.
pub fn http(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\ncontent-length: {}\r\n", body.len()).ok()?;
    for (name, value) in headers {
        write!(stream, "{name}: {value}\r\n").ok()?;
    }
    stream.write_all(b"\r\n").ok()?;
    stream.write_all(body).ok()?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).ok()?;
    std::str::from_utf8(&answer[9..12]).ok()?.parse().ok()
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let digits = bytes.chunks(3).flat_map(|chunk| {
        let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        let digit = move |at: usize| if at <= chunk.len() { ALPHABET[(word >> (18 - 6 * at) & 63) as usize] as char } else { '=' };
        (0..4).map(digit).collect::<Vec<_>>()
    });
    digits.collect()
}

/// The bytes of standard base64.
pub fn from_base64(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.bytes().filter_map(|byte| ALPHABET.iter().position(|digit| *digit == byte)).map(|digit| digit as u32).collect();
    let bytes = digits.chunks(4).flat_map(|chunk| {
        let word = chunk.iter().fold(0, |word, digit| word << 6 | digit) << (6 * (4 - chunk.len()));
        (0..chunk.len() - 1).map(move |at| (word >> (16 - 8 * at)) as u8)
    });
    bytes.collect()
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0_u8; 64];
    if key.len() > 64 {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::digest([&block.map(|byte| byte ^ 0x36), message].concat());
    Sha256::digest([&block.map(|byte| byte ^ 0x5c)[..], &inner].concat()).to_vec()
}
