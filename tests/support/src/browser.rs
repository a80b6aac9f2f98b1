//! A page in a headless Chromium (`tests/testbed/install-servers chromium`), driven by its DevTools protocol over a pipe.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::servers::program;

/// Version pinned in `tests/testbed/install-servers`.
const CHROMIUM: &str = "chromium-153.0.0";
/// How long a condition may take to become true.
const LIMIT: Duration = Duration::from_mins(1);
/// The protocol's descriptors, 3 and 4, are standard input and output here. Pixels are drawn by software, as machines that run tests have no GPU.
const START: &str = r#"exec "$0" --headless --no-sandbox --no-zygote --disable-dev-shm-usage --in-process-gpu --use-gl=angle --use-angle=swiftshader \
    --enable-unsafe-swiftshader --hide-scrollbars --no-first-run --lang=en-US --remote-debugging-pipe "--user-data-dir=$1" about:blank 3<&0 4>&1 >/dev/null"#;

/// A browser with one page. It ends when dropped.
pub struct Browser {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    session: String,
    commands: u64,
    /// Errors and warnings of the page: exceptions, the console, what could not be loaded.
    complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts a browser and opens `address` in a window of this size.
    pub fn open(address: &str, (width, height): (u32, u32)) -> Self {
        let profile = tempfile::tempdir().expect("a folder");
        let mut child = Command::new("sh")
            .args(["-c", START])
            .arg(program("chromium", CHROMIUM))
            .arg(profile.path())
            // "C" is no language of the web.
            .env("LANG", "en_US.UTF-8")
            .env_remove("LC_ALL")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let (input, output) = (child.stdin.take().expect("a pipe"), BufReader::new(child.stdout.take().expect("a pipe")));
        let mut browser = Self { child, input, output, session: String::new(), commands: 0, complaints: Vec::new(), _profile: profile };
        let targets = browser.command("Target.getTargets", json!({}));
        let pages = targets["targetInfos"].as_array().expect("targets");
        let page = pages.iter().find(|target| target["type"] == "page").expect("a page")["targetId"].clone();
        let session = browser.command("Target.attachToTarget", json!({"targetId": page, "flatten": true}));
        session["sessionId"].as_str().expect("a session").clone_into(&mut browser.session);
        for domain in ["Runtime.enable", "Log.enable", "Page.enable", "Network.enable"] {
            browser.command(domain, json!({}));
        }
        browser.window((width, height), 1);
        browser.command("Page.navigate", json!({"url": address}));
        browser.until("document.readyState === 'complete' && location.href !== 'about:blank'");
        browser
    }

    /// Sends a command and returns its result; what the page reports meanwhile is kept.
    pub fn command(&mut self, method: &str, parameters: Value) -> Value {
        self.attempt(method, parameters).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    #[expect(clippy::unwrap_in_result, reason = "an error is what the page answers; a browser that is gone fails the test")]
    fn attempt(&mut self, method: &str, parameters: Value) -> Result<Value, Value> {
        self.commands += 1;
        let mut message = json!({"id": self.commands, "method": method});
        message["params"] = parameters;
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        self.input.write_all(format!("{message}\0").as_bytes()).expect("the browser is alive");
        loop {
            let mut answer = Vec::new();
            self.output.read_until(0, &mut answer).expect("the browser is alive");
            assert_eq!(answer.pop(), Some(0), "the browser has ended during {method}");
            let mut answer: Value = serde_json::from_slice(&answer).expect("JSON");
            if answer["id"] == self.commands {
                return if answer["error"].is_null() { Ok(answer["result"].take()) } else { Err(answer["error"].take()) };
            }
            self.note(&answer);
        }
    }

    fn note(&mut self, event: &Value) {
        let parameters = &event["params"];
        let complaint = match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" | "Network.loadingFailed" => true,
            "Runtime.consoleAPICalled" => matches!(parameters["type"].as_str(), Some("error" | "warning" | "assert")),
            "Log.entryAdded" => matches!(parameters["entry"]["level"].as_str(), Some("error" | "warning")),
            _ => false,
        };
        if complaint {
            self.complaints.push(event.to_string());
        }
    }

    /// What the page has complained of so far.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// The value of an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let mut result = self.command("Runtime.evaluate", evaluation(expression));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].take()
    }

    /// Waits until an expression is true; a page that is being loaded has no expressions yet.
    pub fn until(&mut self, expression: &str) {
        let begin = Instant::now();
        while !self.attempt("Runtime.evaluate", evaluation(expression)).is_ok_and(|result| result["result"]["value"] == true) {
            assert!(begin.elapsed() < LIMIT, "waited in vain for {expression}; complaints: {:?}", self.complaints);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Gives the window another size, with so many device pixels for each of the page's.
    pub fn window(&mut self, (width, height): (u32, u32), scale: u32) {
        let phone = width < 600;
        self.command("Emulation.setDeviceMetricsOverride", json!({"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}));
    }

    /// `light` or `dark`, as the system's preference.
    pub fn color_scheme(&mut self, scheme: &str) {
        self.command("Emulation.setEmulatedMedia", json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}));
    }

    /// Moves the mouse to a place in the window.
    pub fn point_at(&mut self, (x, y): (f64, f64)) {
        self.command("Input.dispatchMouseEvent", json!({"type": "mouseMoved", "x": x, "y": y}));
    }

    /// The whole page, or what the window shows of it, as PNG in base64.
    pub fn screenshot(&mut self, whole: bool) -> String {
        let shot = self.command("Page.captureScreenshot", json!({"captureBeyondViewport": whole}));
        shot["data"].as_str().expect("a picture").to_owned()
    }
}

fn evaluation(expression: &str) -> Value {
    json!({"expression": expression, "returnByValue": true, "awaitPromise": true})
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}
