//! A bucket with the micro model and dataset, and the program run on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The LoRA below the output.
pub(crate) const LORA: &str = "pytorch_lora_weights.safetensors";

/// A folder of its own for each test: `bucket/` stands in for `s3://test`.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The program.
pub(crate) fn finetune() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finetune"));
    command
        .env("RAYON_NUM_THREADS", "2")
        .env_remove("FINETUNE_FAULT")
        .env_remove("FINETUNE_JOB_UID")
        .env("FINETUNE_LOG_FORMAT", "json")
        .env("RUST_LOG", "info");
    command
}

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        copy(&fixtures().join("micro-sd3"), &bench.bucket("models/micro"));
        copy(&fixtures().join("dataset"), &bench.bucket("data"));
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn bucket(&self, name: &str) -> PathBuf {
        self.dir.path().join("bucket").join(name)
    }

    /// Makes the last weight of the transformer, in f16, a NaN.
    pub(crate) fn spoil_a_weight(&self) {
        let path = self.bucket("models/micro/transformer/diffusion_pytorch_model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&0x7e00_u16.to_le_bytes());
        fs::write(&path, bytes).unwrap();
    }

    pub(crate) fn output(&self, name: &str) -> PathBuf {
        self.bucket("out").join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.output(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn result(&self) -> Value {
        serde_json::from_slice(&self.read("result.json")).unwrap()
    }

    /// Writes the manifest, with changes merged into its spec.
    pub(crate) fn manifest(&self, changes: &Value) -> PathBuf {
        let path = self.path("job.yaml");
        let mut job = job();
        merge(&mut job["spec"], changes);
        // YAML is a superset of JSON.
        fs::write(&path, job.to_string()).unwrap();
        path
    }

    /// `finetune run` of the manifest with these changes.
    pub(crate) fn command(&self, changes: &Value) -> Command {
        let mut command = finetune();
        command.arg("run").arg(self.manifest(changes)).arg("--bucket").arg(format!("s3://test={}", self.bucket("").display()));
        command.arg("--cache-dir").arg(self.path("cache")).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, changes: &Value) -> Output {
        self.command(changes).output().unwrap()
    }

    /// Runs to success.
    pub(crate) fn complete(&self, changes: &Value) {
        let output = self.run(changes);
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Starts the program with its log in a file.
    pub(crate) fn start(&self, changes: &Value, environment: &[(&str, &str)]) -> Running {
        let log = self.path(&format!("log-{}", std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos()));
        let file = fs::File::create(&log).unwrap();
        let mut command = self.command(changes);
        command.envs(environment.iter().copied()).stdout(Stdio::null()).stderr(file);
        Running { child: command.spawn().unwrap(), log }
    }

    /// How many attempts have claimed the output.
    pub(crate) fn claims(&self) -> usize {
        self.files("claims").iter().filter(|(path, _)| !path.to_string_lossy().ends_with(".state.json")).count()
    }

    pub(crate) fn wipe_cache(&self) {
        if self.path("cache").exists() {
            fs::remove_dir_all(self.path("cache")).unwrap();
        }
    }

    /// All files below the output, by name, with their contents.
    pub(crate) fn files(&self, below: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        collect(&self.output(below), &mut files);
        files.sort();
        files
    }
}

/// What a killed writer leaves in a directory that stands in for a bucket: `name#1`. No listing of the store shows it.
fn is_unfinished(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).and_then(|name| name.rsplit_once('#')).is_some_and(|(_, number)| number.parse::<u32>().is_ok())
}

/// A running job may delete what has just been listed.
fn collect(dir: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if !is_unfinished(&path) {
            match fs::read(&path) {
                Ok(bytes) => files.push((path, bytes)),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{}", path.display()),
            }
        }
    }
}

/// The manifest of all tests: 40 updates of two batches each, with a short last batch and window in every epoch.
pub(crate) fn job() -> Value {
    json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "micro"},
        "spec": {
            "model": {"source": {"objectStore": {"uri": "s3://test/models/micro/"}}},
            "dataset": {"uri": "s3://test/data/", "repeats": 2},
            "training": {
                "maxSteps": 40, "resolution": 32, "batchSize": 2, "gradientAccumulationSteps": 4, "maxSequenceLength": 8, "randomFlip": true,
                "optimizer": {"type": "AdamW", "learningRate": "1e-2"},
                "learningRateSchedule": {"type": "Cosine", "warmupSteps": 5},
                "lora": {"dropout": "0.1"},
            },
            "checkpoint": {"everySteps": 6, "keepLast": 2},
            "output": {"uri": "s3://test/out/"},
            "scheduling": {"gpu": {"perReplica": 0}},
        },
    })
}

pub(crate) fn merge(into: &mut Value, changes: &Value) {
    match (into, changes) {
        (Value::Object(into), Value::Object(changes)) => {
            for (key, value) in changes {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, changes) => *into = changes.clone(),
    }
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}\n{}\n{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A running program; killed when dropped.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    pub(crate) fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits until the log has this text.
    pub(crate) fn await_log(&mut self, wanted: &str) {
        until(|| self.log().contains(wanted) || self.has_ended());
        assert!(self.log().contains(wanted), "ended without {wanted:?}: {}", self.log());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// Waits for a condition.
pub(crate) fn until(mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_mins(2), "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The LoRA files of an undisturbed run of the unchanged manifest, and how long it took.
pub(crate) fn reference() -> &'static (Vec<u8>, Vec<u8>, Duration) {
    static REFERENCE: OnceLock<(Vec<u8>, Vec<u8>, Duration)> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let bench = Bench::new();
        let begin = Instant::now();
        bench.complete(&json!({}));
        (bench.read(LORA), bench.read("micro.safetensors"), begin.elapsed())
    })
}
