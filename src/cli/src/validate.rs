//! `finetune validate`: what the API server and the planner would say about a manifest, and whether the dataset and the model that it names
//! can be used, where they can be reached.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;

use super::plan::OutputFormat;
use finetune_api::plan::{self, Facts, PlanError};
use finetune_api::validate::{self, Violation};
use finetune_api::{FineTuneJob, Reason};

/// Arguments of `finetune validate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Manifest with one or more FineTuneJobs; "-" reads standard input.
    file: PathBuf,
    /// How to print the findings.
    #[arg(short, long, value_enum, default_value = "text")]
    output: OutputFormat,
    /// A directory that stands in for a bucket, as s3://NAME=DIR. May be repeated.
    #[cfg(feature = "train")]
    #[arg(long, value_name = "URI=DIR")]
    bucket: Vec<String>,
    /// Look at the manifest alone, not at the dataset and the model.
    #[cfg(feature = "train")]
    #[arg(long)]
    offline: bool,
}

/// What has been found besides the manifest's own violations.
#[derive(Debug, Default, Serialize)]
pub(super) struct Reached {
    /// What is wrong with datasets and models.
    pub(super) violations: Vec<Violation>,
    /// What was looked at and is good.
    pub(super) good: Vec<String>,
    /// What is allowed and hardly ever meant.
    pub(super) warnings: Vec<String>,
    /// What could not be looked at, and why.
    pub(super) unchecked: Vec<String>,
}

/// Reads a manifest, from standard input where `path` is "-".
pub(super) fn read(path: &std::path::Path) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        return std::io::read_to_string(std::io::stdin()).context("failed to read standard input");
    }
    std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))
}

/// Every FineTuneJob of the text, or everything that the API server or the planner would refuse.
pub(super) fn check(text: &str) -> Result<Vec<FineTuneJob>, Vec<Violation>> {
    let jobs = validate::manifest(text).map_err(|violations| violations.0)?;
    let problems: Vec<Violation> = jobs.iter().enumerate().flat_map(|(index, job)| plan_problems(index + 1, job)).collect();
    if problems.is_empty() { Ok(jobs) } else { Err(problems) }
}

/// Warnings about a valid job's settings.
fn setting_warnings(job: &FineTuneJob) -> Vec<String> {
    let facts = Facts { model_directory: Some(PathBuf::from("/model")), ..Facts::default() };
    let name = job.metadata.name.clone().unwrap_or_default();
    let plan = plan::resolve(&job.spec, job.metadata.namespace.as_deref().unwrap_or("default"), &name, &facts);
    plan.iter().flat_map(|plan| plan::warnings(&plan.config.training, plan.steps.total_steps)).map(|warning| format!("{name}: {warning}")).collect()
}

fn plan_problems(document: usize, job: &FineTuneJob) -> Vec<Violation> {
    // The operator mounts a claim; here it is enough that it would.
    let facts = Facts { model_directory: Some(PathBuf::from("/model")), ..Facts::default() };
    let name = job.metadata.name.clone().unwrap_or_default();
    let violation = |path: String, message: String| Violation { document, object: Some(name.clone()), path, message };
    match plan::resolve(&job.spec, job.metadata.namespace.as_deref().unwrap_or("default"), &name, &facts) {
        Ok(_) => Vec::new(),
        Err(PlanError::Invalid(problems)) => problems.into_iter().map(|problem| violation(problem.path, problem.message)).collect(),
        Err(PlanError::TooSmall(error)) => vec![violation("spec.training".to_owned(), error.to_string())],
        Err(error @ PlanError::Identity(_)) => vec![violation(String::new(), error.to_string())],
    }
}

/// Looks at the datasets and models of valid jobs.
#[cfg(feature = "train")]
fn reached(jobs: &[FineTuneJob], args: &Args) -> anyhow::Result<Reached> {
    if args.offline { Ok(Reached::default()) } else { super::reach::look(jobs, &args.bucket) }
}

/// This build reads no datasets.
#[cfg(not(feature = "train"))]
fn reached(_: &[FineTuneJob], _: &Args) -> anyhow::Result<Reached> {
    Ok(Reached::default())
}

/// Checks and prints; the exit code is 0 or that of `InvalidConfig`.
#[expect(clippy::print_stdout, reason = "the findings go to stdout")]
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let checked = check(&read(&args.file)?);
    let Reached { violations: found, good, mut warnings, unchecked } =
        checked.as_deref().map_or_else(|_| Ok(Reached::default()), |jobs| reached(jobs, args))?;
    warnings.splice(0..0, checked.iter().flatten().flat_map(setting_warnings));
    let mut violations = checked.as_ref().err().cloned().unwrap_or_default();
    violations.extend(found);
    let bad = |name: &str| violations.iter().any(|violation| violation.object.as_deref() == Some(name));
    let jobs: Vec<&str> = checked.iter().flatten().filter_map(|job| job.metadata.name.as_deref()).filter(|name| !bad(name)).collect();
    match args.output {
        OutputFormat::Json => {
            let findings =
                json!({"valid": violations.is_empty(), "jobs": jobs, "violations": violations, "checked": good, "warnings": warnings, "unchecked": unchecked});
            println!("{}", serde_json::to_string_pretty(&findings)?);
        }
        OutputFormat::Text => {
            violations.iter().for_each(|violation| println!("{violation}"));
            good.iter().for_each(|line| println!("{line}"));
            warnings.iter().for_each(|line| println!("warning: {line}"));
            unchecked.iter().for_each(|line| println!("{line}"));
            jobs.iter().for_each(|name| println!("{name}: valid"));
        }
    }
    Ok(if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(Reason::InvalidConfig.exit_code()) })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_planners_problems_are_violations_too() {
        let job = |gpu: &str| {
            format!(
                "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: a}}\nspec:\n  model: {{source: {{persistentVolumeClaim: {{claimName: w}}}}}}\n  \
                 dataset: {{uri: 's3://data/'}}\n  output: {{uri: 's3://loras/'}}\n  scheduling: {{gpu: {gpu}}}\n"
            )
        };
        assert_eq!(super::check(&job("{}")).unwrap().len(), 1);
        let found = super::check(&job("{minMemoryMiB: 20000}")).unwrap_err();
        assert_eq!(found[0].path, "spec.scheduling.gpu");
        assert!(super::check(&job("{minMemoryMiB: 4000}")).unwrap_err()[0].message.contains("GiB"));
    }
}
