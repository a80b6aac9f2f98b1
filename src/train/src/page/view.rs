//! What the template and the script are given.

use indicatif::{BinaryBytes, FormattedDuration};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::{Curves, Embedded, Page, Run, TrainingPicture};
use crate::comparison;
use crate::result::RunResult;
use finetune_api::plan::Stage as MemoryStage;
use finetune_api::{OutputFormat, Stage};
use finetune_data::buckets::Size;

/// The fixed parts and the data of the page.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Assets<'a> {
    pub(super) style: &'static str,
    pub(super) script: &'static str,
    pub(super) uplot: &'static str,
    pub(super) uplot_style: &'static str,
    pub(super) uplot_licence: &'static str,
    /// [`Live`].
    pub(super) data: &'a str,
    /// [`Slider`].
    pub(super) gallery: &'a str,
}

/// Everything that the template shows.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct View<'a> {
    assets: Assets<'a>,
    job: &'a str,
    status: String,
    done: bool,
    /// Numbers at the top: name, value.
    numbers: Vec<(&'static str, String)>,
    warnings: &'a [String],
    /// Steps measured and steps on the page, where these are fewer.
    thinned: Option<(usize, usize)>,
    has_pictures: bool,
    pictures_left_out: usize,
    comparison: Option<&'a Embedded>,
    comparison_file: &'static str,
    training: &'a [TrainingPicture],
    samples: usize,
    /// Shape and number of pictures of each bucket.
    buckets: Vec<(String, u64)>,
    /// How buckets are chosen.
    bucket_rule: Option<String>,
    /// What is done to the captions.
    captions: Option<String>,
    memory: Vec<MemoryRow>,
    measured: Vec<(&'static str, String)>,
    stages: Vec<(&'static str, String, u32)>,
    settings: Vec<(String, Vec<(String, String)>)>,
    digests: Vec<(String, String, String)>,
    loads: Vec<Load>,
    version: &'static str,
}

/// A stage of the memory plan.
#[derive(Serialize)]
struct MemoryRow {
    stage: String,
    bytes: String,
    parts: String,
}

/// How a program takes the LoRA.
#[derive(Serialize)]
struct Load {
    reader: &'static str,
    text: String,
}

/// What changes while a run lasts.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Live {
    status: String,
    done: bool,
    numbers: Vec<(&'static str, String)>,
    curves: Curves,
    /// The page is loaded again when this changes: pictures and tables are in the page itself.
    edition: String,
}

impl Live {
    pub(super) fn of(page: &Page) -> Self {
        let pictures: usize = page.gallery.steps().map(|(_, pictures)| pictures.len()).sum();
        let edition = format!(
            "{}-{pictures}-{}-{}-{}",
            page.run.is_some(),
            page.training.len(),
            page.result.is_some(),
            page.warnings.len() + usize::from(page.memory.is_some())
        );
        Self { status: status(page), done: is_done(page), numbers: numbers(page), curves: Curves::of(&page.history), edition }
    }
}

/// Validation pictures for the slider.
#[derive(Serialize)]
pub(super) struct Slider<'a> {
    prompts: &'a [String],
    /// Step, and the pictures by prompt.
    steps: Vec<(u64, Vec<Option<&'a Embedded>>)>,
}

impl<'a> Slider<'a> {
    pub(super) fn of(page: &'a Page) -> Self {
        let prompts = page.run.as_ref().and_then(|run| run.config.validation.as_ref()).map_or(&[][..], |validation| &validation.prompts);
        let steps = page.gallery.steps().map(|(step, pictures)| (step, (0..prompts.len()).map(|prompt| pictures.get(&prompt)).collect())).collect();
        Self { prompts, steps }
    }
}

impl<'a> View<'a> {
    pub(super) fn of(page: &'a Page, assets: Assets<'a>) -> Self {
        let curves = Curves::of(&page.history);
        let run = page.run.as_ref();
        Self {
            assets,
            job: run.map_or("finetune", |run| &run.config.job),
            status: status(page),
            done: is_done(page),
            numbers: numbers(page),
            warnings: &page.warnings,
            thinned: (curves.step.len() < curves.measured_steps).then_some((curves.measured_steps, curves.step.len())),
            has_pictures: page.gallery.steps().len() > 0,
            pictures_left_out: page.gallery.left_out(),
            comparison: page.comparison.as_ref(),
            comparison_file: comparison::FILE_NAME,
            training: &page.training,
            samples: run.map_or(0, |run| run.samples),
            buckets: run.map_or(&[][..], |run| &run.buckets).iter().map(|bucket| (shape(bucket.size), bucket.pictures)).collect(),
            bucket_rule: run.and_then(|run| run.config.training.buckets.as_ref()).map(ToString::to_string),
            captions: run.and_then(|run| run.config.dataset.captions.as_ref()).map(ToString::to_string),
            memory: memory(page),
            measured: measured(page),
            stages: stages(page),
            settings: run.map(settings).unwrap_or_default(),
            digests: digests(page),
            loads: page.result.as_ref().zip(run).map(|(result, run)| loads(result, run)).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// Width and height of a bucket.
pub(crate) fn shape((width, height): Size) -> String {
    format!("{width} × {height}")
}

fn is_done(page: &Page) -> bool {
    page.result.is_some() || page.progress.stage == Stage::Finished
}

fn status(page: &Page) -> String {
    let (step, total) = (page.progress.step, page.progress.total_steps);
    if let Some(result) = &page.result {
        let done = result.completed.parse::<Timestamp>().map_or_else(|_| result.completed.clone(), |done| format!("{done:.0}"));
        return format!("trained: {} steps, done {done}", result.steps);
    }
    match page.progress.stage {
        Stage::Starting => "starting".to_owned(),
        Stage::DownloadingModel => "fetching the model".to_owned(),
        Stage::DownloadingDataset => "reading the dataset".to_owned(),
        Stage::PreparingData => "preparing data".to_owned(),
        Stage::RestoringCheckpoint => "looking for a checkpoint".to_owned(),
        Stage::Training => format!("training: step {step} of {total}"),
        Stage::Publishing => format!("publishing after {step} steps"),
        Stage::Finished => format!("ended at step {step} of {total}"),
    }
}

/// The numbers at the top of the page.
fn numbers(page: &Page) -> Vec<(&'static str, String)> {
    let history = &page.history;
    let evaluation = |step| history.evaluation_at(step).map(|loss| format!("{loss:.4}"));
    let last = history.records().iter().rev().find_map(|record| record.evaluation_loss.map(|_| record.step)).filter(|step| *step > 0);
    let fixed = match (evaluation(0), last.and_then(evaluation)) {
        (Some(start), Some(end)) => Some(format!("{start} → {end}")),
        (start, _) => start,
    };
    let left = page.progress.estimated_completion_time.filter(|_| !is_done(page)).map(|end| format!("{end:.0}"));
    let distances = page.result.as_ref().and_then(|result| result.comparison);
    [
        ("Training loss, smoothed", history.smoothed_loss().map(|loss| format!("{loss:.4}"))),
        ("Loss, fixed noise", fixed),
        ("Held-out distance", distances.map(|c| format!("{:.3} → {:.3}", c.base_distance, c.lora_distance))),
        ("Epochs", page.progress.epoch.map(|epochs| format!("{epochs:.1}"))),
        ("Steps per second", page.progress.steps_per_second.map(|rate| format!("{rate:.2}"))),
        ("Ends at about", left),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect()
}

fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

fn memory(page: &Page) -> Vec<MemoryRow> {
    let parts = |stage: &MemoryStage| stage.parts.iter().map(|part| format!("{} {}", part.name, size(part.bytes))).collect::<Vec<_>>();
    let row = |stage: &MemoryStage| MemoryRow { stage: stage.name.clone(), bytes: size(stage.bytes()), parts: parts(stage).join(", ") };
    page.memory.iter().flat_map(|plan| plan.stages.iter().map(row)).collect()
}

/// What memory was in fact, beside the plan's peak.
fn measured(page: &Page) -> Vec<(&'static str, String)> {
    let memory = page.progress.memory.unwrap_or_default();
    let plan = page.memory.as_ref();
    [
        ("Planned, largest stage", plan.map(|plan| size(plan.peak_bytes()))),
        ("Budget", plan.and_then(|plan| plan.budget_bytes).map(size)),
        ("Measured on the GPU, buffers at their peak", memory.device_peak_bytes.map(size)),
        ("Measured on the host, whole process at its peak", memory.host_peak_bytes.map(size)),
        ("Frozen weights of the blocks", plan.filter(|plan| !plan.weights.is_float()).map(|_| "in 8 bits".to_owned())),
        ("Pictures per pass", page.progress.micro_batch.map(|n| n.to_string())),
        ("Blocks computed again", page.progress.recomputed_blocks.map(|n| n.to_string())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect()
}

/// Stage, time, share of the whole in percent.
fn stages(page: &Page) -> Vec<(&'static str, String, u32)> {
    let times = page.stages.times();
    let whole: f64 = times.iter().map(|(_, time)| time.as_secs_f64()).sum();
    let text =
        |seconds: f64| if seconds < 60.0 { format!("{seconds:.1} s") } else { FormattedDuration(std::time::Duration::from_secs_f64(seconds)).to_string() };
    times.into_iter().map(|(what, time)| (what, text(time.as_secs_f64()), (100.0 * time.as_secs_f64() / whole.max(1e-9)).round() as u32)).collect()
}

/// The configuration as groups of (path, value).
fn settings(run: &Run) -> Vec<(String, Vec<(String, String)>)> {
    let Ok(Value::Object(config)) = serde_json::to_value(&run.config) else { return Vec::new() };
    let mut groups = vec![("run".to_owned(), vec![("device".to_owned(), run.device.clone()), ("numbers".to_owned(), run.dtype.clone())])];
    for (group, value) in &config {
        let mut rows = Vec::new();
        flatten("", value, &mut rows);
        match value {
            Value::Object(_) => groups.push((group.clone(), rows)),
            _ => groups[0].1.extend(rows.into_iter().map(|(_, value)| (group.clone(), value))),
        }
    }
    groups
}

fn flatten(path: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, value, rows);
            }
        }
        Value::Array(items) => rows.push((path.to_owned(), items.iter().map(plain).collect::<Vec<_>>().join("\n"))),
        value => rows.push((path.to_owned(), plain(value))),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Name, size, digest: what the run was made from, then its files.
fn digests(page: &Page) -> Vec<(String, String, String)> {
    let sources = page.run.iter().flat_map(|run| {
        [("settings", &run.config.spec_hash), ("dataset", &run.dataset_digest), ("base model", &run.model_digest)]
            .map(|(name, digest)| (name.to_owned(), String::new(), digest.clone()))
    });
    let files = page.result.iter().flat_map(|result| result.files.iter()).map(|(name, file)| (name.clone(), size(file.size), file.sha256.clone()));
    sources.chain(files).collect()
}

fn loads(result: &RunResult, run: &Run) -> Vec<Load> {
    let load = |artifact: &crate::result::Artifact| match artifact.format {
        OutputFormat::Diffusers => {
            let text = format!(
                "# download {uri}{file}, then:\npipeline.load_lora_weights(\"FOLDER\", weight_name=\"{file}\")",
                uri = run.config.output.uri,
                file = artifact.file
            );
            Load { reader: "diffusers", text }
        }
        OutputFormat::Kohya => Load {
            reader: "ComfyUI, kohya",
            text: format!("put {}{} into ComfyUI's models/loras/ and add a \"Load LoRA\" node", run.config.output.uri, artifact.file),
        },
    };
    result.artifacts.iter().map(load).collect()
}
