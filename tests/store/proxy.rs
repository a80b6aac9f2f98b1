//! A proxy on 127.0.0.1 that fails on purpose, one connection after another, and then passes everything on.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What happens to one connection.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The request is read and answered by the proxy with this status line and these headers.
    Answer(&'static str),
    /// The same with a body.
    Document(&'static str, String),
    /// The request is carried out and its answer passed on with another status line: a server that has its own mind about codes.
    Restate(&'static str),
    /// The request is read, then the connection is reset.
    Reset,
    /// The request is read and never answered.
    Silence,
    /// The request is carried out; its answer is lost by a reset.
    LoseAnswer,
    /// The answer breaks off after this many bytes.
    CutAnswer(usize),
}

/// The proxy; ends with the test's runtime.
pub(crate) struct Proxy {
    pub(crate) endpoint: String,
    /// Connections that were accepted.
    pub(crate) connections: Arc<AtomicUsize>,
    script: Arc<Mutex<Script>>,
}

#[derive(Default)]
struct Script {
    next: VecDeque<Fault>,
    always: Option<Fault>,
}

impl Proxy {
    /// A proxy in front of `upstream` (`http://127.0.0.1:PORT`, with or without a path).
    pub(crate) async fn new(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, path) =
            upstream.strip_prefix("http://").unwrap().split_once('/').map_or((&upstream[7..], String::new()), |(address, path)| (address, format!("/{path}")));
        let endpoint = format!("http://{}{path}", listener.local_addr().unwrap());
        let (script, connections) = (Arc::new(Mutex::new(Script::default())), Arc::new(AtomicUsize::new(0)));
        let (shared, counter, address) = (Arc::clone(&script), Arc::clone(&connections), address.to_owned());
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                counter.fetch_add(1, Ordering::SeqCst);
                let fault = {
                    let mut script = shared.lock().unwrap();
                    script.next.pop_front().or_else(|| script.always.clone())
                };
                let address = address.clone();
                // A connection that breaks off is what this proxy is for.
                tokio::spawn(async move { drop(serve(client, &address, fault).await) });
            }
        });
        Self { endpoint, connections, script }
    }

    /// The next connections fail like this, in this order.
    pub(crate) fn next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.script.lock().unwrap().next.extend(faults);
    }

    /// Every connection fails like this.
    pub(crate) fn always(&self, fault: Fault) {
        self.script.lock().unwrap().always = Some(fault);
    }

    /// Faults that no connection has met.
    pub(crate) fn left(&self) -> usize {
        self.script.lock().unwrap().next.len()
    }
}

async fn serve(mut client: TcpStream, upstream: &str, fault: Option<Fault>) -> std::io::Result<()> {
    let request = read_request(&mut client).await?;
    match fault {
        Some(Fault::Answer(head)) => {
            client.write_all(format!("HTTP/1.1 {head}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").as_bytes()).await?;
            client.shutdown().await
        }
        Some(Fault::Document(head, body)) => {
            client.write_all(format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).as_bytes()).await?;
            client.shutdown().await
        }
        Some(Fault::Restate(status)) => {
            let answer = forward(&request, upstream).await?;
            let rest = answer.iter().position(|byte| *byte == b'\r').unwrap_or(answer.len());
            client.write_all(format!("HTTP/1.1 {status}").as_bytes()).await?;
            client.write_all(&answer[rest..]).await?;
            client.shutdown().await
        }
        Some(Fault::Reset) => client.set_zero_linger(),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::LoseAnswer) => {
            forward(&request, upstream).await?;
            client.set_zero_linger()
        }
        Some(Fault::CutAnswer(bytes)) => {
            let answer = forward(&request, upstream).await?;
            client.write_all(&answer[..bytes.min(answer.len())]).await?;
            client.shutdown().await
        }
        None => {
            let answer = forward(&request, upstream).await?;
            client.write_all(&answer).await?;
            client.shutdown().await
        }
    }
}

/// Head and body of one request. `Expect: 100-continue` is not used by the clients under test.
async fn read_request(client: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let head = loop {
        if client.read_buf(&mut request).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(at) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let text = String::from_utf8_lossy(&request[..head]).to_ascii_lowercase();
    let length: usize = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    while request.len() < head + length {
        if client.read_buf(&mut request).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    // One request per connection, so that faults meet requests one by one.
    let mut closing = request[..head - 2].to_vec();
    closing.extend_from_slice(b"connection: close\r\n\r\n");
    closing.extend_from_slice(&request[head..]);
    Ok(closing)
}

/// The whole answer of the server.
async fn forward(request: &[u8], upstream: &str) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(upstream).await?;
    server.write_all(request).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}
