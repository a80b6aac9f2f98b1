//! `finetune plan`: steps, memory per stage and work of a job, before anything runs.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::validate;
use finetune_api::plan::{self, Facts, FrozenWeights, ModelShape, Plan, PriorPreservationConfig};
use finetune_api::{FineTuneJob, Reason};

/// How to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(super) enum OutputFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The model whose sizes are assumed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Model {
    /// Stable Diffusion 3 Medium.
    #[value(name = "sd3-medium")]
    Sd3Medium,
    /// Stable Diffusion 3.5 Medium.
    #[value(name = "sd3.5-medium")]
    Sd35Medium,
    /// Stable Diffusion 3.5 Large.
    #[value(name = "sd3.5-large")]
    Sd35Large,
}

/// Arguments of `finetune plan`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Manifest with one or more FineTuneJobs; "-" reads standard input.
    file: PathBuf,
    /// Pictures in the dataset, for the length of an epoch.
    #[arg(long, value_name = "N")]
    dataset_size: Option<u64>,
    /// The model whose sizes are assumed. Default: the one that a single file or a repository of the hub is named after, else sd3-medium.
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// How to print the plan.
    #[arg(short, long, value_enum, default_value = "text")]
    output: OutputFormat,
}

/// Floating-point operations per second that a T4 reaches in practice on this work.
const T4_FLOPS: f64 = 25e12;

/// Resolves and prints each job.
#[expect(clippy::print_stdout, reason = "the plan goes to stdout")]
pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let jobs = match validate::check(&validate::read(&args.file)?) {
        Ok(jobs) => jobs,
        Err(violations) => {
            for violation in &violations {
                println!("{violation}");
            }
            return Ok(ExitCode::from(Reason::InvalidConfig.exit_code()));
        }
    };
    let asked = args.model.map(|model| match model {
        Model::Sd3Medium => ModelShape::SD3_MEDIUM,
        Model::Sd35Medium => ModelShape::SD35_MEDIUM,
        Model::Sd35Large => ModelShape::SD35_LARGE,
    });
    let mut plans = Vec::new();
    for job in &jobs {
        let named = ModelShape::of_source(&job.spec.model.source);
        let shape = asked.or(named).unwrap_or(ModelShape::SD3_MEDIUM);
        plans.push((resolve(job, shape, args.dataset_size)?, shape));
    }
    match args.output {
        OutputFormat::Json => {
            let values: Vec<_> = plans
                .iter()
                .map(|(plan, shape)| json!({"config": plan.config, "steps": plan.steps, "memory": plan.memory, "flops": flops(plan, shape)}))
                .collect();
            println!("{}", serde_json::to_string_pretty(&values)?);
        }
        OutputFormat::Text => plans.iter().for_each(|(plan, shape)| print!("{}", text(plan, shape))),
    }
    Ok(ExitCode::SUCCESS)
}

fn resolve(job: &FineTuneJob, shape: ModelShape, dataset_size: Option<u64>) -> anyhow::Result<Plan> {
    let facts = Facts { dataset_size, model: Some(shape), model_directory: Some(PathBuf::from("/model")), ..Facts::default() };
    let namespace = job.metadata.namespace.as_deref().unwrap_or("default");
    Ok(plan::resolve(&job.spec, namespace, job.metadata.name.as_deref().unwrap_or_default(), &facts)?)
}

fn flops(plan: &Plan, shape: &ModelShape) -> Option<f64> {
    plan.steps.total_steps.map(|steps| plan::run_flops(&plan.config.training, shape, &plan.memory, steps))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / 1_073_741_824.0
}

fn text(plan: &Plan, shape: &ModelShape) -> String {
    let config = &plan.config;
    let training = &config.training;
    let unknown = if training.buckets.is_some() { "known once the pictures are in their buckets" } else { "known once the dataset is (--dataset-size)" };
    let known = |value: Option<u64>| value.map_or_else(|| unknown.to_owned(), |value| value.to_string());
    let mut out = format!("{} ({})\n", config.job, config.spec_hash);
    let mut row = |name: &str, value: String| {
        let _infallible = writeln!(out, "  {name:<24}{value}");
    };
    row("steps", known(plan.steps.total_steps));
    row("updates per epoch", known(plan.steps.updates_per_epoch));
    row("epochs", known(plan.steps.epochs));
    row(
        "pictures per update",
        format!("{} ({} x {})", training.batch_size * training.gradient_accumulation_steps, training.batch_size, training.gradient_accumulation_steps),
    );
    if let Some(buckets) = &training.buckets {
        row("buckets", format!("{buckets}; the area of {0} x {0} at most; validate counts the pictures of each", training.resolution));
    }
    if let Some(prior) = &training.prior_preservation {
        let PriorPreservationConfig { images, sample_batch_size, weight, .. } = prior;
        row("class pictures", format!("{images}, drawn {sample_batch_size} at once; as many per update as pictures, with weight {weight}"));
    }
    if let Some(captions) = &config.dataset.captions {
        let mib = (shape.caption_bytes(training.max_sequence_length) * u64::from(captions.tag_orders)) as f64 / f64::from(1 << 20);
        row("captions", format!("{captions}; up to {mib:.1} MiB for each, prepared"));
    }
    row("checkpoints", config.checkpoint.uri.clone());
    row("model assumed", plan.memory.model.clone());
    let division = if plan.memory.micro_batch == training.batch_size {
        "the whole batch at once".to_owned()
    } else {
        format!("{} of {} pictures at once", plan.memory.micro_batch, training.batch_size)
    };
    row("division", format!("{division}, {} of {} blocks computed again", plan.memory.recomputed_blocks, shape.layers));
    let weights = match plan.memory.weights {
        FrozenWeights::Float => "in the precision of the training",
        FrozenWeights::Int8 => "in 8 bits",
    };
    row("frozen weights", weights.to_owned());
    if let Some(flops) = flops(plan, shape) {
        row("work", format!("{:.1} PFLOP, about {:.1} h on a T4", flops / 1e15, flops / T4_FLOPS / 3600.0));
        #[cfg(feature = "train")]
        row("on this machine's CPU", format!("about {}", super::estimate::duration(super::estimate::cpu_seconds(flops))));
    }
    let budget = plan.memory.budget_bytes.map_or_else(|| "on the CPU (no budget)".to_owned(), |budget| format!("against a budget of {:.2} GiB", gib(budget)));
    let _infallible = writeln!(out, "  memory {budget}");
    for stage in &plan.memory.stages {
        let _infallible = writeln!(out, "    {:<34}{:>8.2} GiB", stage.name, gib(stage.bytes()));
        for part in &stage.parts {
            let _infallible = writeln!(out, "      {:<32}{:>8.2}", part.name, gib(part.bytes));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_of_an_example_names_steps_memory_and_work() {
        let manifest = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a, namespace: n}\nspec:\n  model: {source: {objectStore: {uri: 's3://models/'}}}\n  \
                        dataset: {uri: 's3://data/'}\n  output: {uri: 's3://loras/'}\n";
        let job = validate::check(manifest).unwrap().remove(0);
        let shape = ModelShape::SD3_MEDIUM;
        let text = text(&resolve(&job, shape, Some(25)).unwrap(), &shape);
        for part in
            ["n/a (sha256:", "steps                   2000", "updates per epoch       3", "14.50 GiB", "train", "encode captions (T5)", "93.", "h on a T4"]
        {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("  captions "), "{text}");
        let manifest = manifest.replace("data/'}", "data/', captions: {triggerWord: ohwx, tagOrders: 4, keepTags: 1, dropout: '0.1'}}");
        let job = validate::check(&manifest).unwrap().remove(0);
        let text = self::text(&resolve(&job, shape, Some(25)).unwrap(), &shape);
        // (154 tokens of 4096 and 2048) of 4 bytes, four times.
        let row =
            "captions                \"ohwx\" in front, 4 orders of the tags after the first, left out in 0.1 of the draws; up to 9.7 MiB for each, prepared";
        assert!(text.contains(row), "{text}");
    }
}
