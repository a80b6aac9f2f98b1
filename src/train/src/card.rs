//! The model card: `README.md` beside the LoRA, as the Hugging Face hub shows it and people read it anywhere.
//!
//! The YAML in front is the hub's (<https://huggingface.co/docs/hub/model-cards>), with the tags that diffusers' training scripts set. Strings in it are
//! written as JSON, which YAML reads. People edit model cards: see [`super::publish`] for what a run may replace.

use std::fmt::Write as _;

use finetune_api::OutputDtype;
use finetune_api::plan::OutputFormat;

use super::about::About;
use super::history::Picture;
use super::lora_files::{DIFFUSERS_FILE, kohya_file};

/// The name below the output.
pub const FILE_NAME: &str = "README.md";

/// Pictures that the card shows at most.
const SHOWN: usize = 4;
/// Tags of every LoRA that was trained for diffusers.
const TAGS: [&str; 5] = ["text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora"];

/// The card of a run. `pictures`: those of its validation prompts; `dtype`: that of the LoRA files.
pub fn make(about: &About<'_>, pictures: &[Picture], dtype: OutputDtype) -> String {
    let shown = last(pictures);
    let mut card = front_matter(about, &shown);
    let _infallible = write!(card, "\n# {}\n\n{}\n", about.title(), summary(about));
    for picture in &shown {
        let _infallible = write!(card, "\n![{}]({})\n", alternative(prompt(about, picture)), picture.file_name());
    }
    let trigger = match (about.trigger_word(), about.common_caption) {
        (Some(word), _) => format!("Every caption had the words {}: put them into the prompt.", code(word)),
        (None, Some(caption)) => format!("Every picture had the caption {}: use it, or its rare words, in the prompt.", code(caption)),
        (None, None) => String::new(),
    };
    if !trigger.is_empty() {
        let _infallible = write!(card, "\n## Trigger phrase\n\n{trigger}\n");
    }
    card.push_str(&diffusers(about));
    card.push_str(&comfyui(about));
    card.push_str(&settings(about, dtype));
    card
}

/// The pictures of the last step that has any.
fn last(pictures: &[Picture]) -> Vec<&Picture> {
    let step = pictures.iter().map(|picture| picture.step).max();
    pictures.iter().filter(|picture| Some(picture.step) == step).take(SHOWN).collect()
}

fn prompt<'a>(about: &About<'a>, picture: &Picture) -> &'a str {
    about.config.validation.as_ref().and_then(|validation| validation.prompts.get(picture.prompt)).map_or("", String::as_str)
}

/// The repository that a reader loads the LoRA onto.
fn repository<'a>(about: &'a About<'_>) -> Option<&'a str> {
    about.repository().or(about.published.map(|published| published.repository))
}

fn summary(about: &About<'_>) -> String {
    let pictures = if about.pictures == 1 { "1 picture".to_owned() } else { format!("{} pictures", about.pictures) };
    let shape = match about.published {
        Some(published) if about.base_name() != published.name => format!(" ({})", published.name),
        _ => String::new(),
    };
    format!("A LoRA for {}{shape}, trained on {pictures} for {} steps.", about.base_name(), about.steps)
}

/// A string as YAML reads it.
fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

fn front_matter(about: &About<'_>, shown: &[&Picture]) -> String {
    let mut lines = vec!["---".to_owned()];
    if let Some(repository) = repository(about) {
        lines.push(format!("base_model: {}", text(repository)));
        lines.push("base_model_relation: adapter".to_owned());
    }
    if let Some(published) = about.published {
        let licence = format!("https://huggingface.co/{}/blob/main/LICENSE.md", published.repository);
        lines.extend(["license: other".to_owned(), "license_name: stabilityai-ai-community".to_owned(), format!("license_link: {}", text(&licence))]);
    }
    lines.extend(["library_name: diffusers".to_owned(), "pipeline_tag: text-to-image".to_owned()]);
    if let Some(trigger) = about.trigger_phrase() {
        lines.push(format!("instance_prompt: {}", text(trigger)));
    }
    lines.push("tags:".to_owned());
    let own = about.published.map_or(&["sd3", "sd3-diffusers"][..], |published| published.tags);
    lines.extend(TAGS.iter().chain(own).map(|tag| format!("- {}", text(tag))));
    if !shown.is_empty() {
        lines.push("widget:".to_owned());
    }
    for picture in shown {
        lines.extend([format!("- text: {}", text(prompt(about, picture))), "  output:".to_owned(), format!("    url: {}", text(&picture.file_name()))]);
    }
    lines.extend(["---".to_owned(), String::new()]);
    lines.join("\n")
}

/// Text for people who do not see the picture; within its brackets.
fn alternative(prompt: &str) -> String {
    let mut text = String::new();
    for c in prompt.chars() {
        match c {
            '\\' | '[' | ']' | '`' | '<' | '*' | '_' | '!' => text.extend(['\\', c]),
            '\n' | '\r' => text.push(' '),
            other => text.push(other),
        }
    }
    text
}

/// A code span that holds `text`, backticks in it included.
fn code(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or_default();
    let ticks = "`".repeat(longest + 1);
    let space = if longest > 0 { " " } else { "" };
    format!("{ticks}{space}{}{space}{ticks}", text.replace(['\n', '\r'], " "))
}

fn has(about: &About<'_>, format: OutputFormat) -> bool {
    about.config.output.formats.contains(&format)
}

fn diffusers(about: &About<'_>) -> String {
    let mut part = "\n## diffusers\n\n".to_owned();
    if !has(about, OutputFormat::Diffusers) {
        part.push_str("This run has written no file for diffusers (`output.formats`).\n");
        return part;
    }
    let model = repository(about).unwrap_or("PATH/TO/THE/MODEL");
    let prompt = about
        .common_caption
        .or(about.config.validation.as_ref().and_then(|v| v.prompts.first()).map(String::as_str))
        .or(about.trigger_word())
        .unwrap_or("your prompt");
    let sampling = about
        .config
        .validation
        .as_ref()
        .map_or(String::new(), |validation| format!(", num_inference_steps={}, guidance_scale={:?}", validation.steps, validation.guidance_scale));
    let _infallible = write!(
        part,
        "```python\nimport torch\nfrom diffusers import StableDiffusion3Pipeline\n\n\
         pipeline = StableDiffusion3Pipeline.from_pretrained({}, torch_dtype=torch.bfloat16).to(\"cuda\")\n\
         pipeline.load_lora_weights(\"PATH/TO/THIS/FOLDER\", weight_name=\"{DIFFUSERS_FILE}\")\n\
         image = pipeline({}{sampling}).images[0]\nimage.save(\"picture.png\")\n```\n",
        text(model),
        text(prompt)
    );
    part
}

fn comfyui(about: &About<'_>) -> String {
    let lora = &about.config.training.lora;
    let file = if has(about, OutputFormat::Kohya) { kohya_file(&about.config.job) } else { DIFFUSERS_FILE.to_owned() };
    // ComfyUI reads alpha from kohya's keys alone and takes the rank for it otherwise.
    let strength = if has(about, OutputFormat::Kohya) { 1.0 } else { lora.alpha / f64::from(lora.rank) };
    format!(
        "\n## ComfyUI\n\nCopy `{file}` into `ComfyUI/models/loras/`, put the node *LoraLoaderModelOnly* between the checkpoint and the sampler, and choose the file \
         with strength {strength}. Only the transformer was trained, so CLIP stays connected to the checkpoint.\n"
    )
}

fn settings(about: &About<'_>, dtype: OutputDtype) -> String {
    let training = &about.config.training;
    let (lora, optimizer, schedule) = (&training.lora, &training.optimizer, &training.learning_rate_schedule);
    let published = about.published.map_or("a size of its own", |published| published.name);
    let buckets = about.buckets().iter().map(|bucket| format!("{} x {} ({})", bucket.size.0, bucket.size.1, bucket.pictures)).collect::<Vec<_>>().join(", ");
    let weights = if about.weights.is_float() { "" } else { ", the blocks' frozen weights in 8 bits" };
    let rows = [
        ("base model", format!("{} ({published})", about.base_label())),
        ("digest of the base model's files", about.base_digest.to_owned()),
        ("rank, alpha, dropout", format!("{}, {}, {}", lora.rank, lora.alpha, lora.dropout)),
        ("modules", lora.target_modules.iter().map(|module| code(module)).collect::<Vec<_>>().join(" ")),
        ("resolution", format!("{0} x {0}{1}", training.resolution, if about.buckets().is_empty() { "" } else { ", the area of a bucket at most" })),
        ("buckets", buckets),
        ("steps, epochs", format!("{}, {:.1}", about.steps, about.epochs)),
        ("pictures per step", format!("{} x {} accumulated", training.batch_size, training.gradient_accumulation_steps)),
        ("optimizer", format!("{:?}, learning rate {}, weight decay {}", optimizer.kind, optimizer.learning_rate, optimizer.weight_decay)),
        ("learning rate schedule", format!("{:?}, {} steps of warm-up", schedule.kind, schedule.warmup_steps)),
        ("noise levels", format!("{:?}", training.flow_matching.weighting_scheme)),
        ("precision", format!("{} (LoRA f32; files {dtype}){weights}", about.precision)),
        ("seed", training.seed.to_string()),
    ];
    let mut part = "\n## Training\n\n| setting | value |\n|---|---|\n".to_owned();
    for (name, value) in rows.into_iter().filter(|(_, value)| !value.is_empty()) {
        let _infallible = writeln!(part, "| {name} | {value} |");
    }
    let _infallible = write!(part, "\nLosses and digests of all files are in `result.json`. Trained with finetune-operator {}.\n", env!("CARGO_PKG_VERSION"));
    part
}

#[cfg(test)]
mod tests {
    use super::super::about::tests::{about, config};
    use super::*;
    use finetune_api::plan::{ModelSource, TrainConfig};

    fn picture(step: u64, prompt: usize) -> Picture {
        Picture { step, time: 0.0, prompt, png: Vec::new(), width: 1, height: 1 }
    }

    fn yaml(card: &str) -> serde_json::Value {
        let (_, rest) = card.split_once("---\n").unwrap();
        let (front, _) = rest.split_once("\n---\n").unwrap();
        finetune_common::yaml::from_str(front).unwrap()
    }

    fn prompts(prompts: &[&str]) -> impl FnOnce(&mut TrainConfig) {
        let prompts = prompts.iter().map(|&prompt| prompt.to_owned()).collect();
        |config| config.validation.as_mut().unwrap().prompts = prompts
    }

    #[test]
    fn the_front_matter_is_yaml_whatever_the_captions_hold() {
        let odd = "a \"corgi\": #1 [x](y) | `z`\n---\n- 'é' \\n";
        let config = config(prompts(&["first", odd]));
        let about = About { common_caption: Some(odd), ..about(&config) };
        let card = make(&about, &[picture(250, 0), picture(500, 0), picture(500, 1)], OutputDtype::F16);
        let front = yaml(&card);
        assert_eq!(front["instance_prompt"], odd);
        assert_eq!(front["widget"].as_array().unwrap().len(), 2);
        assert_eq!((&front["widget"][1]["text"], &front["widget"][1]["output"]["url"]), (&odd.into(), &"validation/step-000500/1.png".into()));
        assert_eq!((&front["library_name"], &front["tags"][5]), (&"diffusers".into(), &"sd3".into()));
        assert!(card.contains("\n![first](validation/step-000500/0.png)\n"), "{card}");
        assert!(card.contains(r"![a "), "{card}");
        // The snippet's prompt is a string of Python.
        assert!(card.contains(r#"image = pipeline("a \"corgi\": #1"#), "{card}");
    }

    #[test]
    fn the_base_model_is_the_repository_of_the_job_or_of_the_published_shape() {
        let published = Some(finetune_model::survey::PUBLISHED[1]);
        let stored = config(|_| {});
        let card = make(&About { published, ..about(&stored) }, &[], OutputDtype::F16);
        let front = yaml(&card);
        assert_eq!((&front["base_model"], &front["license"]), (&"stabilityai/stable-diffusion-3.5-medium".into(), &"other".into()));
        assert_eq!(front["tags"].as_array().unwrap().iter().filter(|tag| *tag == "sd3.5-medium").count(), 1);
        assert!(front.get("widget").is_none() && front.get("instance_prompt").is_none() && !card.contains("s3://"), "{card}");
        let hub = config(|config| config.model.source = ModelSource::HuggingFace { repo: "me/my-sd35".into(), revision: "0".repeat(40) });
        let front = yaml(&make(&About { published, ..about(&hub) }, &[], OutputDtype::F16));
        assert_eq!(front["base_model"], "me/my-sd35");
        // A model that nobody has published has no repository to name.
        let card = make(&about(&stored), &[], OutputDtype::F16);
        assert!(yaml(&card).get("base_model").is_none() && card.contains("PATH/TO/THE/MODEL"), "{card}");
    }

    #[test]
    fn only_files_that_there_are_are_named() {
        let alone = |format| config(|config: &mut TrainConfig| (config.output.formats, config.training.lora.alpha) = (vec![format], 8.0));
        let kohya = alone(OutputFormat::Kohya);
        let card = make(&about(&kohya), &[], OutputDtype::F32);
        assert!(!card.contains("load_lora_weights") && card.contains("`corgi.safetensors`") && card.contains("strength 1."), "{card}");
        let diffusers = alone(OutputFormat::Diffusers);
        let card = make(&about(&diffusers), &[], OutputDtype::F32);
        assert!(card.contains("load_lora_weights") && !card.contains("corgi.safetensors") && card.contains("strength 2."), "{card}");
        assert!(card.contains("| rank, alpha, dropout | 4, 8, 0 |"), "{card}");
    }

    #[test]
    fn code_spans_hold_backticks() {
        assert_eq!([code("a"), code("a`b``c"), code("`")], ["`a`", "``` a`b``c ```", "`` ` ``"]);
    }
}
