//! Programs that the tests run: the test cluster's script, kubectl, helm.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The repository's folder.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("this crate is at tests/support").to_owned()
}

/// `tests/testbed/cluster ARGS`, whose output is returned; it must succeed.
pub fn cluster(args: &[&str]) -> String {
    run(Command::new(repository().join("tests/testbed/cluster")).args(args)).unwrap_or_else(|error| panic!("{error}"))
}

/// Path of the kubeconfig of the cluster under test.
pub fn kubeconfig() -> PathBuf {
    std::env::var_os("KUBECONFIG").map_or_else(|| PathBuf::from(cluster(&["kubeconfig"]).trim()), PathBuf::from)
}

/// Runs kubectl as the cluster's admin: its standard output, or what it wrote to standard error.
pub fn kubectl(args: &[&str]) -> Result<String, String> {
    run(program("kubectl").args(args))
}

/// Runs kubectl with `input` as its standard input.
pub fn kubectl_with_input(args: &[&str], input: &str) -> Result<String, String> {
    run_with_input(program("kubectl").args(args), input)
}

/// Runs helm: its standard output, or what it wrote to standard error.
pub fn helm<S: AsRef<OsStr>>(args: &[S]) -> Result<String, String> {
    run(program("helm").args(args))
}

/// kubectl or helm: the one that the test cluster's script built, else the one on PATH.
fn program(name: &str) -> Command {
    let built = Path::new(cluster(&["bin"]).trim()).join(name);
    let mut command = Command::new(if built.exists() { built } else { PathBuf::from(name) });
    command.env("KUBECONFIG", kubeconfig());
    command
}

/// Runs a command: its standard output, or its name with what it wrote.
pub fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| missing(command, &error))?;
    outcome(command, &output)
}

fn run_with_input(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|error| missing(command, &error))?;
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).map_err(|error| error.to_string())?;
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    outcome(command, &output)
}

fn missing(command: &Command, error: &std::io::Error) -> String {
    format!("failed to run {}: {error}; `make cluster-up` makes it", command.get_program().display())
}

fn outcome(command: &Command, output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{} {}: {}{}", command.get_program().display(), output.status, text(&output.stdout), text(&output.stderr)))
    }
}
