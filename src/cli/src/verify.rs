//! `finetune verify DIR`: numbers of this build against cases of the reference implementation; with `--model`, a model of the user's own against
//! candle-transformers.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use super::device::{DeviceName, PrecisionName};
use super::model::{self, ModelArgs};
use finetune_compute::kernels::Precision;
use finetune_train::verify::{self, Case, Report, Row};

/// Arguments of `finetune verify`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A case, or a folder of cases.
    #[arg(required_unless_present = "model")]
    dir: Option<PathBuf>,

    /// Instead of cases: a model, as a folder in diffusers layout, a folder with single files, or a single file. Its T5 is run by this build and, in 32 bits on the CPU, by candle-transformers, a second
    /// implementation that shares no code with it.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dir", "kind"])]
    model: Option<PathBuf>,

    #[command(flatten)]
    files: ModelArgs,

    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,

    /// What the GPU computes in. In half precision an error may be 1.1 times the reference implementation's own, which the case has to tell.
    #[arg(long, value_enum, default_value = "fp32")]
    precision: PrecisionName,

    /// Only cases of this kind (train, encode_prompt, encode_image, preprocess, sample).
    #[arg(long)]
    kind: Option<String>,

    /// Print only the tensors that fail, and one line per case.
    #[arg(long, short)]
    quiet: bool,
}

/// Exit code 0 when every tensor of every case is within its tolerance, 1 otherwise.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let engine = args.device.open(args.precision)?;
    if let Some(model) = &args.model {
        let report = verify::text_encoder(&model::open(model, &args.files)?, &engine)?;
        say(&format!("{} against candle-transformers", model.display()));
        print_rows(&report, args.quiet);
        return Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let Some(dir) = &args.dir else { bail!("give a folder of cases, or --model") };
    let mut cases = Case::find(dir)?;
    if let Some(kind) = &args.kind {
        cases.retain(|case| case.kind() == kind);
    }
    if cases.is_empty() {
        bail!("no case found in {}: a case is a folder with a case.json", dir.display());
    }
    let mut failed = 0;
    for case in &cases {
        match verify::run(case, &engine) {
            Ok(report) => {
                print(case, &report, engine.precision() != Precision::F32, args.quiet);
                failed += usize::from(!report.passed());
            }
            Err(error) => {
                failed += 1;
                say(&format!("{} ({}): FAILED\n  {:#}", case.name(), case.kind(), anyhow::Error::from(error)));
            }
        }
    }
    say(&format!("{} of {} cases passed", cases.len() - failed, cases.len()));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(case: &Case, report: &Report, half: bool, quiet: bool) {
    let verdict = if report.passed() { "passed" } else { "FAILED" };
    let allowed = if half { "each tensor as the case says".to_owned() } else { format!("{:.1e}", case.tolerance()) };
    say(&format!("{} ({}): {verdict}, largest relative error {:.2e}, allowed {allowed}", case.name(), case.kind(), report.worst()));
    print_rows(report, quiet);
}

fn print_rows(report: &Report, quiet: bool) {
    let width = report.rows().iter().map(|r| r.name.len()).max().unwrap_or(0);
    for row in report.rows().iter().filter(|row| !quiet || !row.passed) {
        let allowed = row.tolerance.map_or_else(|| "-".to_owned(), |tolerance| format!("{tolerance:.1e}"));
        let verdict = match row {
            Row { passed: false, .. } => "FAILED",
            Row { tolerance: None, .. } => "not judged",
            Row { .. } => "ok",
        };
        say(&format!("  {:width$}  {:>9.2e}  {allowed:>7}  {verdict}", row.name, row.error));
    }
}

#[expect(clippy::print_stdout, reason = "the command's result")]
fn say(line: &str) {
    println!("{line}");
}
