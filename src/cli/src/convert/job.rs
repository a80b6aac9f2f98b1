//! From flags to a FineTuneJob.

mod buckets;
mod captions;

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::flags::{Becomes, Takes, find};
use finetune_api::{API_VERSION, KIND, MAX_NAME_LENGTH};

/// Where things go that a command line has as local folders.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
    /// Such as `s3://team-a`, without a "/" at the end.
    pub(super) bucket: String,
}

/// A FineTuneJob, and what had to be left out.
#[derive(Debug)]
pub(super) struct Converted {
    pub(super) manifest: Value,
    pub(super) remarks: Vec<String>,
}

/// The script of today's diffusers.
const DIFFUSERS_SCRIPT: &str = "train_dreambooth_lora_sd3.py";
/// Where it puts a LoRA, in its order.
const DIFFUSERS_LAYERS: [&str; 8] = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"];
/// Blocks of Stable Diffusion 3.5 Large, the largest.
const MOST_BLOCKS: usize = 38;
/// Prompts that a job may have.
const MOST_PROMPTS: usize = 16;

/// The flags as given: name to value, "" for those that take none.
type Given = BTreeMap<&'static str, String>;

/// Reads `args` (with or without `accelerate launch script.py` before them).
pub(super) fn convert(args: &[String], place: &Place) -> anyhow::Result<Converted> {
    let script = args.iter().position(|arg| std::path::Path::new(arg).extension().is_some_and(|extension| extension == "py"));
    let (launcher, flags) = script.map_or((&args[..0], args), |script| (&args[..script], &args[script + 1..]));
    let mut remarks = Vec::new();
    let mut given = parse(flags, &mut remarks)?;
    launch(launcher, &mut given, &mut remarks);
    let script = script.map(|script| last_part(&args[script]).to_owned());
    let mut job = Job { given, script, spec: json!({}), remarks };
    job.places(place)?;
    job.training()?;
    job.the_rest()?;
    let name = place.name.clone().unwrap_or_else(|| object_name(last_part(job.given.get("output_dir").map_or("sd3-lora", String::as_str))));
    let mut manifest = json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": job.spec});
    if let Some(namespace) = &place.namespace {
        manifest["metadata"]["namespace"] = json!(namespace);
    }
    Ok(Converted { manifest, remarks: job.remarks })
}

/// What `accelerate launch` (or `torchrun`) is given before the script's name.
fn launch(args: &[String], given: &mut Given, remarks: &mut Vec<String>) {
    let mut args = args.iter().map(|arg| arg.trim()).peekable();
    while let Some(arg) = args.next() {
        let Some(text) = arg.strip_prefix("--") else { continue };
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, args.next_if(|next| !next.starts_with("--"))),
        };
        match (name, value) {
            // The script takes the launcher's precision where it is given none of its own.
            ("mixed_precision", Some(precision)) if !given.contains_key("mixed_precision") => {
                given.insert("mixed_precision", precision.to_owned());
            }
            ("num_processes" | "nproc_per_node" | "num_machines" | "nnodes", Some("1")) => {}
            ("num_processes" | "nproc_per_node", Some(count)) => remarks.push(format!(
                "--{name} {count} of the launcher has no counterpart: a job has one GPU; {count} times the gradientAccumulationSteps give the same number of \
                 pictures per update"
            )),
            _ => remarks.push(format!("--{name} of the launcher has no counterpart")),
        }
    }
}

/// `--flag value`, `--flag=value` and `--flag`; every unknown one is named.
fn parse(args: &[String], remarks: &mut Vec<String>) -> anyhow::Result<Given> {
    let mut given = Given::new();
    let mut problems = Vec::new();
    let mut args = args.iter().map(String::as_str).filter(|arg| !arg.trim().is_empty() && *arg != "\\").peekable();
    while let Some(arg) = args.next() {
        let Some(text) = arg.strip_prefix("--") else {
            problems.push(format!("{arg:?} belongs to no flag"));
            continue;
        };
        let (name, inline) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let Some(flag) = find(name) else {
            problems.push(format!("--{name} is not a flag of the article's script or of diffusers', nor one of kohya's on captions and buckets"));
            if inline.is_none() && args.peek().is_some_and(|next| !next.starts_with("--")) {
                args.next();
            }
            continue;
        };
        let value = match (flag.takes, inline) {
            (Takes::Nothing, None) => String::new(),
            (Takes::Nothing, Some(_)) => {
                problems.push(format!("--{name} takes no value"));
                continue;
            }
            (Takes::Value, Some(value)) => value.to_owned(),
            (Takes::Value, None) => {
                let Some(value) = args.next_if(|next| !next.starts_with("--")) else {
                    problems.push(format!("--{name} needs a value"));
                    continue;
                };
                value.to_owned()
            }
        };
        if let Becomes::Nothing(reason) = flag.becomes {
            remarks.push(format!("--{name} has no counterpart: {reason}"));
        }
        given.insert(flag.name, value);
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(given)
}

struct Job {
    given: Given,
    /// The script's file name, where the command line has it.
    script: Option<String>,
    spec: Value,
    remarks: Vec<String>,
}

impl Job {
    fn text(&self, flag: &str) -> Option<&str> {
        self.given.get(flag).map(String::as_str)
    }

    fn has(&self, flag: &str) -> bool {
        self.given.contains_key(flag)
    }

    fn set(&mut self, path: &str, value: impl Into<Value>) {
        let mut at = &mut self.spec;
        for key in path.split('.') {
            at = &mut at[key];
        }
        *at = value.into();
    }

    fn whole(&self, flag: &str) -> anyhow::Result<Option<u64>> {
        self.text(flag).map(|text| text.parse().with_context(|| format!("--{flag}: {text:?} is not a whole number"))).transpose()
    }

    fn number(&self, flag: &str) -> anyhow::Result<Option<f64>> {
        let Some(text) = self.text(flag) else { return Ok(None) };
        let value: f64 = text.parse().with_context(|| format!("--{flag}: {text:?} is not a number"))?;
        ensure!(value.is_finite(), "--{flag}: {text:?} is not a finite number");
        Ok(Some(value))
    }

    fn set_whole(&mut self, flag: &str, path: &str) -> anyhow::Result<()> {
        if let Some(value) = self.whole(flag)? {
            self.set(path, value);
        }
        Ok(())
    }

    fn set_decimal(&mut self, flag: &str, path: &str) -> anyhow::Result<()> {
        if let Some(value) = self.number(flag)? {
            self.set(path, decimal(value));
        }
        Ok(())
    }

    fn set_truth(&mut self, flag: &str, path: &str) -> anyhow::Result<()> {
        let value = match self.text(flag).map(str::to_ascii_lowercase).as_deref() {
            None => return Ok(()),
            Some("1" | "true" | "yes") => true,
            Some("0" | "false" | "no") => false,
            Some(other) => bail!("--{flag}: {other:?} is neither true nor false"),
        };
        self.set(path, value);
        Ok(())
    }

    /// A choice from `table`.
    fn choice(&self, flag: &str, table: &[(&str, &'static str)]) -> anyhow::Result<Option<&'static str>> {
        let Some(text) = self.text(flag) else { return Ok(None) };
        let found = table.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        let names: Vec<_> = table.iter().map(|(name, _)| *name).collect();
        Ok(Some(found.with_context(|| format!("--{flag}: {text:?} is none of {}", names.join(", ")))?.1))
    }

    /// Model, dataset and outputs: local folders become folders in the bucket.
    fn places(&mut self, place: &Place) -> anyhow::Result<()> {
        let bucket = &place.bucket;
        let Some(dataset) = self.text("dataset_name").or(self.text("instance_data_dir")).map(str::to_owned) else {
            bail!("--dataset_name (or --instance_data_dir) is needed");
        };
        ensure!(!(self.has("dataset_name") && self.has("instance_data_dir")), "give --dataset_name or --instance_data_dir, not both");
        let model = self.text("pretrained_model_name_or_path").context("--pretrained_model_name_or_path is needed")?.to_owned();
        let dataset_uri = format!("{bucket}/datasets/{}/", key(last_part(&dataset)));
        let captions = if self.has("instance_prompt") { "" } else { " with its captions (metadata.jsonl, metadata.csv or a .txt for each picture)" };
        self.remarks.push(format!("copy the folder {dataset:?}{captions} to {dataset_uri}"));
        self.set("dataset.uri", dataset_uri);
        let is_commit = |text: &str| text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match self.text("revision").map(str::to_owned) {
            Some(revision) if is_commit(&revision) && model.split('/').count() == 2 && !model.starts_with(['.', '/', '~']) => {
                self.set("model.source.huggingFace", json!({"repo": model, "revision": revision}));
            }
            revision => {
                let uri = format!("{bucket}/models/{}/", key(last_part(&model)));
                let branch = revision.map(|r| format!(" ({r:?} is not a commit)")).unwrap_or_default();
                self.remarks.push(format!(
                    "copy the model {model:?} to {uri}, or take it from the hub with --revision and a commit of 40 hexadecimal digits{branch}; \
                         git ls-remote https://huggingface.co/ORGANISATION/NAME HEAD prints the newest"
                ));
                self.set("model.source.objectStore.uri", uri);
            }
        }
        let output = self.text("output_dir").unwrap_or("sd3-lora").to_owned();
        self.set("output.uri", format!("{bucket}/loras/{}/", key(last_part(&output))));
        Ok(())
    }

    /// `spec.training`. Where the script's own default differs from the API's, it is written out.
    fn training(&mut self) -> anyhow::Result<()> {
        match (self.whole("max_train_steps")?, self.whole("num_train_epochs")?) {
            (Some(steps), epochs) => {
                self.set("training.maxSteps", steps);
                if epochs.is_some() {
                    self.remarks.push("--num_train_epochs is without effect beside --max_train_steps".to_owned());
                }
            }
            (None, epochs) => self.set("training.epochs", epochs.unwrap_or(1)),
        }
        for (flag, path) in [("resolution", "resolution"), ("train_batch_size", "batchSize"), ("seed", "seed"), ("max_sequence_length", "maxSequenceLength")] {
            self.set_whole(flag, &format!("training.{path}"))?;
        }
        let accumulation = self.whole("gradient_accumulation_steps")?.unwrap_or(1);
        self.set("training.gradientAccumulationSteps", accumulation);
        for (flag, path) in [("center_crop", "centerCrop"), ("random_flip", "randomFlip")] {
            if self.has(flag) {
                self.set(&format!("training.{path}"), true);
            }
        }
        if self.has("upcast_before_saving") {
            self.set("output.dtype", "F32");
        }
        if self.has("gradient_checkpointing") {
            self.set("training.gradientCheckpointing", "Auto");
        }
        if self.has("fp8_base") {
            self.set("training.weights", "Int8");
        }
        if let Some(precision) = self.choice("mixed_precision", &[("no", "FP32"), ("fp16", "FP16"), ("bf16", "Auto")])? {
            self.set("training.precision", precision);
        }
        let schemes = [("logit_normal", "LogitNormal"), ("mode", "Mode"), ("sigma_sqrt", "SigmaSqrt"), ("cosmap", "CosMap"), ("none", "None")];
        if let Some(scheme) = self.choice("weighting_scheme", &schemes)? {
            self.set("training.flowMatching.weightingScheme", scheme);
        }
        for (flag, path) in [("logit_mean", "logitMean"), ("logit_std", "logitStd"), ("mode_scale", "modeScale")] {
            self.set_decimal(flag, &format!("training.flowMatching.{path}"))?;
        }
        self.set_truth("precondition_outputs", "training.flowMatching.preconditionOutputs")?;
        self.set_decimal("max_grad_norm", "training.maxGradNorm")?;
        self.optimizer(accumulation)?;
        self.schedule()?;
        self.lora()?;
        self.buckets()?;
        self.prior_preservation()
    }

    fn optimizer(&mut self, accumulation: u64) -> anyhow::Result<()> {
        let prodigy = self.choice("optimizer", &[("adamw", "AdamW"), ("prodigy", "Prodigy")])? == Some("Prodigy");
        let kind = match (prodigy, self.has("use_8bit_adam")) {
            (true, _) => "Prodigy",
            (false, true) => "AdamW8bit",
            (false, false) => "AdamW",
        };
        self.set("training.optimizer.type", kind);
        let rate = self.number("learning_rate")?;
        if self.has("scale_lr") {
            let batch = self.whole("train_batch_size")?.unwrap_or(4);
            self.set("training.optimizer.learningRate", decimal(rate.unwrap_or(1e-4) * (accumulation * batch) as f64));
        } else if let Some(rate) = rate {
            self.set("training.optimizer.learningRate", decimal(rate));
        }
        for (flag, path) in [("adam_beta1", "beta1"), ("adam_beta2", "beta2"), ("adam_weight_decay", "weightDecay"), ("adam_epsilon", "epsilon")] {
            self.set_decimal(flag, &format!("training.optimizer.{path}"))?;
        }
        if prodigy {
            self.set_decimal("prodigy_beta3", "training.optimizer.prodigy.beta3")?;
            self.set_truth("prodigy_use_bias_correction", "training.optimizer.prodigy.useBiasCorrection")?;
            self.set_truth("prodigy_safeguard_warmup", "training.optimizer.prodigy.safeguardWarmup")?;
        } else {
            self.without_effect(&["prodigy_beta3", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"], "--optimizer prodigy");
        }
        Ok(())
    }

    fn schedule(&mut self) -> anyhow::Result<()> {
        let kinds = [
            ("constant", "Constant"),
            ("constant_with_warmup", "ConstantWithWarmup"),
            ("linear", "Linear"),
            ("cosine", "Cosine"),
            ("cosine_with_restarts", "CosineWithRestarts"),
            ("polynomial", "Polynomial"),
        ];
        let kind = self.choice("lr_scheduler", &kinds)?.unwrap_or("Constant");
        self.set("training.learningRateSchedule.type", kind);
        let warmup = self.whole("lr_warmup_steps")?;
        if kind == "Constant" {
            if warmup.is_some_and(|steps| steps > 0) {
                self.remarks.push("--lr_warmup_steps is without effect for --lr_scheduler constant".to_owned());
            }
        } else {
            self.set("training.learningRateSchedule.warmupSteps", warmup.unwrap_or(500));
        }
        if kind == "CosineWithRestarts" {
            self.set_decimal("lr_num_cycles", "training.learningRateSchedule.cycles")?;
        } else {
            self.without_effect(&["lr_num_cycles"], "--lr_scheduler cosine_with_restarts");
        }
        if kind == "Polynomial" {
            self.set_decimal("lr_power", "training.learningRateSchedule.power")?;
        } else {
            self.without_effect(&["lr_power"], "--lr_scheduler polynomial");
        }
        Ok(())
    }

    fn lora(&mut self) -> anyhow::Result<()> {
        self.set_whole("rank", "training.lora.rank")?;
        self.set_whole("lora_alpha", "training.lora.alpha")?;
        self.set_decimal("lora_dropout", "training.lora.dropout")?;
        let split = |text: &str| text.split(',').map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect::<Vec<_>>();
        let layers = self.text("lora_layers").map(split).or_else(|| self.script_layers());
        let blocks = self.text("lora_blocks").map(split);
        for block in blocks.iter().flatten() {
            let known = block.parse::<usize>().is_ok_and(|block| block < MOST_BLOCKS);
            ensure!(known, "--lora_blocks: {block:?} is no block: the largest Stable Diffusion 3 has blocks 0 to {}", MOST_BLOCKS - 1);
        }
        if layers.is_some() || blocks.is_some() {
            let layers = layers.unwrap_or_else(|| finetune_api::LoraSpec::default().target_modules);
            let modules: Vec<String> = match blocks {
                Some(blocks) => blocks.iter().flat_map(|block| layers.iter().map(move |layer| format!("transformer_blocks.{block}.{layer}"))).collect(),
                None => layers,
            };
            self.set("training.lora.targetModules", modules);
        }
        Ok(())
    }

    /// The modules of the script that is named: diffusers' own trains eight projections by default, the article's four.
    fn script_layers(&mut self) -> Option<Vec<String>> {
        match self.script.as_deref() {
            Some(DIFFUSERS_SCRIPT) => Some(DIFFUSERS_LAYERS.iter().map(|layer| format!("attn.{layer}")).collect()),
            Some(_) => None,
            None => {
                self.remarks.push(format!(
                    "without --lora_layers the LoRA is on the article's four projections; diffusers' {DIFFUSERS_SCRIPT} takes eight: name the script before its \
                     flags for those"
                ));
                None
            }
        }
    }

    fn prior_preservation(&mut self) -> anyhow::Result<()> {
        let flags = ["class_prompt", "num_class_images", "prior_loss_weight", "sample_batch_size", "prior_generation_precision"];
        if !self.has("with_prior_preservation") {
            self.without_effect(&flags, "--with_prior_preservation");
            return Ok(());
        }
        let prompt = self.text("class_prompt").context("--with_prior_preservation needs --class_prompt")?.to_owned();
        self.set("training.priorPreservation.classPrompt", prompt);
        self.set_whole("num_class_images", "training.priorPreservation.images")?;
        self.set_decimal("prior_loss_weight", "training.priorPreservation.weight")?;
        self.set_whole("sample_batch_size", "training.priorPreservation.sampleBatchSize")?;
        if let Some(precision) = self.choice("prior_generation_precision", &[("no", "Auto"), ("fp32", "FP32"), ("fp16", "FP16"), ("bf16", "Auto")])? {
            self.set("training.priorPreservation.precision", precision);
        }
        Ok(())
    }

    fn the_rest(&mut self) -> anyhow::Result<()> {
        if let Some(column) = self.text("caption_column").map(str::to_owned) {
            self.set("dataset.captionColumn", column);
        }
        if let Some(prompt) = self.text("instance_prompt").map(str::to_owned) {
            self.set("dataset.caption", prompt);
            if !self.has("caption_column") {
                self.remarks.push(
                    "--instance_prompt is the caption of pictures without one of their own: leave metadata files and .txt files out of the folder \
                     if all are to have it"
                        .to_owned(),
                );
            }
        }
        self.captions()?;
        self.set_whole("repeats", "dataset.repeats")?;
        let pictures = self.whole("num_validation_images")?;
        if let Some(prompt) = self.text("validation_prompt").map(str::to_owned) {
            if pictures.is_none() {
                self.remarks.push("one picture is drawn of --validation_prompt, where the script draws 4: --num_validation_images says how many".to_owned());
            }
            // A prompt that is repeated is drawn from other noise.
            let count = pictures.unwrap_or(1).min(MOST_PROMPTS as u64) as usize;
            if pictures.is_some_and(|pictures| pictures > count as u64) {
                self.remarks.push(format!("--num_validation_images: {count} pictures, the most there can be"));
            }
            self.set("validation.prompts", vec![prompt; count]);
        } else {
            self.without_effect(&["num_validation_images"], "--validation_prompt");
        }
        self.set_whole("checkpointing_steps", "checkpoint.everySteps")?;
        self.set_whole("checkpoints_total_limit", "checkpoint.keepLast")?;
        match self.text("resume_from_checkpoint") {
            None => {}
            Some("latest") => self.set("resume.policy", "Auto"),
            Some(folder) => {
                let remark = format!("--resume_from_checkpoint {folder} has no counterpart: checkpoints of the script hold pickled state and cannot be read");
                self.remarks.push(remark);
            }
        }
        Ok(())
    }

    fn without_effect(&mut self, flags: &[&str], unless: &str) {
        for flag in flags {
            if self.has(flag) {
                self.remarks.push(format!("--{flag} is without effect unless {unless} is given"));
            }
        }
    }
}

/// A number as the API writes it.
fn decimal(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:e}") } else { format!("{value}") }
}

fn last_part(path: &str) -> &str {
    path.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default()
}

/// A folder's name as part of a key.
fn key(name: &str) -> String {
    let key: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' }).collect();
    let key = key.trim_matches(['.', '-']);
    if key.is_empty() { "data".to_owned() } else { key.to_owned() }
}

/// A folder's name as the name of an object.
fn object_name(name: &str) -> String {
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let name = name.trim_matches('-');
    let name = if name.starts_with(|c: char| c.is_ascii_lowercase()) { name.to_owned() } else { format!("lora-{name}") };
    name.chars().take(MAX_NAME_LENGTH).collect::<String>().trim_end_matches('-').to_owned()
}
