//! The LoRA files of a run: diffusers' and kohya's, with what their headers say.

use std::collections::BTreeMap;

use serde_json::json;

use finetune_api::OutputDtype;
use finetune_api::plan::{BucketsConfig, OutputFormat};
use finetune_common::digest;
use finetune_compute::optim::Param;
use finetune_data::buckets::{Bucket, Shapes};
use finetune_model::lora::{LoraLayout, kohya, metadata_json};

use super::about::{About, job_name};
use super::error::TrainError;
use super::tensor_file::{self, Entry};

/// The LoRA as diffusers' `load_lora_weights` takes it.
pub const DIFFUSERS_FILE: &str = "pytorch_lora_weights.safetensors";

/// The name of the kohya and ComfyUI file: `<job>.safetensors`, so that it keeps its name among other LoRA files.
pub fn kohya_file(job: &str) -> String {
    format!("{}.safetensors", job_name(job))
}

/// Version of ModelSpec (<https://github.com/Stability-AI/ModelSpec>) that the headers follow.
const MODELSPEC: &str = "1.0.0";

/// A LoRA file of a run.
#[derive(Debug)]
pub struct LoraFile {
    /// Which one.
    pub format: OutputFormat,
    /// Its name below the output.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The LoRA's files, and the number format that they have: that of [`About::dtype`], or F32 where its range is too small.
#[derive(Debug)]
pub struct LoraFiles {
    /// In the order of `output.formats`.
    pub files: Vec<LoraFile>,
    /// Number format of the values.
    pub dtype: OutputDtype,
    /// Why it is not the one that was asked for.
    pub warning: Option<String>,
}

/// Writes the files that the job asks for. `params`: those of `layout` in canonical order, f32; `blocks`: those of the transformer.
///
/// # Errors
/// If the LoRA has no kohya form.
pub fn make(about: &About<'_>, params: &[Param], layout: &LoraLayout, blocks: usize) -> Result<LoraFiles, TrainError> {
    let mut wanted = Vec::new();
    for format in &about.config.output.formats {
        let entries = match format {
            OutputFormat::Diffusers => tensor_file::param_entries(params),
            OutputFormat::Kohya => tensor_file::param_entries(&kohya::convert(layout, params, blocks)?),
        };
        wanted.push((*format, entries));
    }
    let asked = about.dtype();
    let rounded = wanted.iter().map(|(format, entries)| Some((*format, round(entries, asked)?))).collect::<Option<Vec<_>>>();
    let (dtype, entries, warning) = match rounded {
        Some(rounded) => (asked, rounded, None),
        None => (OutputDtype::F32, wanted, Some(format!("the LoRA has values that {asked} cannot hold: its files are written in F32"))),
    };
    let file = |(format, entries): (OutputFormat, Vec<Entry>)| match format {
        OutputFormat::Diffusers => LoraFile { format, name: DIFFUSERS_FILE.to_owned(), bytes: tensor_file::write(entries, &diffusers_header(about)) },
        OutputFormat::Kohya => {
            let header = kohya_header(about, &content_digest(&entries));
            LoraFile { format, name: kohya_file(&about.config.job), bytes: tensor_file::write(entries, &header) }
        }
    };
    Ok(LoraFiles { files: entries.into_iter().map(file).collect(), dtype, warning })
}

/// Every entry rounded, but a scalar: kohya's alpha is a setting and stays exact.
fn round(entries: &[Entry], dtype: OutputDtype) -> Option<Vec<Entry>> {
    entries.iter().map(|entry| if entry.shape.is_empty() { Some(entry.clone()) } else { entry.clone().rounded(dtype) }).collect()
}

/// What diffusers writes itself, so that the file of equal weights is equal: the adapter's configuration is there where alpha is not the rank, which readers
/// would assume.
fn diffusers_header(about: &About<'_>) -> BTreeMap<String, String> {
    let lora = &about.config.training.lora;
    let mut header: BTreeMap<String, String> = [("format".to_owned(), "pt".to_owned())].into();
    if (lora.alpha - f64::from(lora.rank)).abs() > f64::EPSILON {
        header.insert(finetune_model::lora::METADATA_KEY.to_owned(), metadata_json(lora.rank as usize, lora.alpha, lora.dropout, &lora.target_modules));
    }
    header
}

/// ModelSpec's keys, and those of kohya's scripts that tools show. There is no date, so that equal runs write equal files; `result.json` has it.
fn kohya_header(about: &About<'_>, content: &str) -> BTreeMap<String, String> {
    let config = about.config;
    let training = &config.training;
    let (lora, optimizer, schedule) = (&training.lora, &training.optimizer, &training.learning_rate_schedule);
    let architecture = about.published.map_or("stable-diffusion-v3", |published| published.architecture);
    let shape = match about.buckets() {
        [] => format!("of {} pixels", training.resolution),
        buckets => format!("in buckets of {} shapes, each of the area of {1} x {1} pixels at most", buckets.len(), training.resolution),
    };
    let description = format!(
        "LoRA of rank {} and alpha {} for {}, trained for {} steps on {} {} {shape}",
        lora.rank,
        lora.alpha,
        about.base_name(),
        about.steps,
        about.pictures,
        if about.pictures == 1 { "picture" } else { "pictures" }
    );
    let mut header: BTreeMap<&str, String> = [
        ("format", "pt".to_owned()),
        ("modelspec.sai_model_spec", MODELSPEC.to_owned()),
        ("modelspec.architecture", format!("{architecture}/lora")),
        // What kohya's scripts write for their files of these names.
        ("modelspec.implementation", "diffusers".to_owned()),
        ("modelspec.title", about.title().to_owned()),
        ("modelspec.description", description),
        ("modelspec.resolution", format!("{0}x{0}", training.resolution)),
        ("modelspec.hash_sha256", format!("0x{content}")),
        ("sshs_model_hash", content.to_owned()),
        ("ss_output_name", about.title().to_owned()),
        ("ss_network_module", "networks.lora_sd3".to_owned()),
        ("ss_network_dim", lora.rank.to_string()),
        ("ss_network_alpha", lora.alpha.to_string()),
        ("ss_base_model_version", about.published.map_or("sd3", |published| published.version).to_owned()),
        ("ss_sd_model_name", about.base_label()),
        ("ss_resolution", format!("({0}, {0})", training.resolution)),
        ("ss_num_train_images", about.pictures.to_string()),
        ("ss_steps", about.steps.to_string()),
        ("ss_epoch", about.epochs.ceil().to_string()),
        ("ss_batch_size_per_device", training.batch_size.to_string()),
        ("ss_gradient_accumulation_steps", training.gradient_accumulation_steps.to_string()),
        ("ss_learning_rate", optimizer.learning_rate.to_string()),
        ("ss_optimizer", format!("{:?}", optimizer.kind)),
        ("ss_lr_scheduler", format!("{:?}", schedule.kind)),
        ("ss_lr_warmup_steps", schedule.warmup_steps.to_string()),
        ("ss_max_grad_norm", training.max_grad_norm.to_string()),
        ("ss_network_dropout", lora.dropout.to_string()),
        ("ss_seed", training.seed.to_string()),
        ("ss_mixed_precision", about.precision.to_string()),
        ("ss_weighting_scheme", format!("{:?}", training.flow_matching.weighting_scheme)),
        // kohya's digest of a base model is that of a single file; this one is of every file that was read.
        ("finetune.base_model_digest", about.base_digest.to_owned()),
        ("finetune.spec_hash", config.spec_hash.clone()),
    ]
    .into();
    if let Some(trigger) = about.trigger_phrase() {
        header.insert("modelspec.trigger_phrase", trigger.to_owned());
    }
    if let (Some(buckets), Some(shapes)) = (&training.buckets, about.shapes) {
        header.extend(bucket_header(buckets, shapes, config.dataset.repeats));
    }
    header.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// What kohya's scripts write of buckets; their counts are those of the copies.
fn bucket_header(config: &BucketsConfig, shapes: &Shapes, repeats: u32) -> [(&'static str, String); 5] {
    let python = |given: bool| if given { "True" } else { "False" }.to_owned();
    let side = |side: Option<u32>| side.map_or_else(|| "None".to_owned(), |side| side.to_string());
    let bucket = |(i, bucket): (usize, &Bucket)| (i.to_string(), json!({"resolution": bucket.size, "count": bucket.pictures * u64::from(repeats)}));
    let buckets: serde_json::Map<_, _> = shapes.buckets().iter().enumerate().map(bucket).collect();
    [
        ("ss_enable_bucket", python(true)),
        ("ss_bucket_no_upscale", python(config.upscale.is_none())),
        ("ss_min_bucket_reso", side(config.upscale.map(|sides| sides.min))),
        ("ss_max_bucket_reso", side(config.upscale.map(|sides| sides.max))),
        ("ss_bucket_info", json!({"buckets": buckets, "mean_img_ar_error": shapes.ratio_error()}).to_string()),
    ]
}

/// SHA-256 of the values, without the header, in hexadecimal digits: ModelSpec's `hash_sha256` and kohya's `sshs_model_hash`.
fn content_digest(entries: &[Entry]) -> String {
    let bytes = tensor_file::write(entries.to_vec(), &BTreeMap::new());
    let header = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length) as usize);
    hex::encode(digest::sha256(bytes.get(8 + header..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::super::about::tests::{about, config};
    use super::*;
    use finetune_api::plan::TrainConfig;
    use finetune_compute::kernels::Precision;
    use finetune_model::lora::{LoraSpec, LoraState};
    use finetune_model::mmdit::MmditConfig;
    use finetune_model::survey;
    use safetensors::{Dtype, SafeTensors};

    fn transformer(change: &str) -> MmditConfig {
        let json = r#"{"patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 12,
            "caption_projection_dim": 8, "pooled_projection_dim": 6, "pos_embed_max_size": 8}"#;
        let mut value: serde_json::Value = serde_json::from_str(json).unwrap();
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        change.as_object().unwrap().iter().for_each(|(key, v)| value[key] = v.clone());
        serde_json::from_value(value).unwrap()
    }

    fn lora() -> (LoraLayout, Vec<Param>) {
        let spec = LoraSpec { rank: 4, alpha: 4.0, dropout: 0.0, target_modules: vec!["to_q".into(), "to_v".into()] };
        let layout = LoraLayout::new(&spec, &transformer("{}").linear_sites()).unwrap();
        let mut params = layout.init(3);
        for (index, param) in params.iter_mut().enumerate() {
            param.value.iter_mut().enumerate().for_each(|(i, x)| *x += 0.001 * (index + i) as f32);
        }
        (layout, params)
    }

    fn header(bytes: &[u8]) -> BTreeMap<String, String> {
        SafeTensors::read_metadata(bytes).unwrap().1.metadata().clone().unwrap().into_iter().collect()
    }

    fn both(config: &mut TrainConfig) {
        config.output.formats = vec![OutputFormat::Diffusers, OutputFormat::Kohya];
    }

    #[test]
    fn half_precision_files_hold_the_rounded_values_and_an_exact_alpha() {
        let (layout, params) = lora();
        for (dtype, wanted, relative) in [(OutputDtype::F16, Dtype::F16, 2f32.powi(-11)), (OutputDtype::BF16, Dtype::BF16, 2f32.powi(-8))] {
            let config = config(|config| {
                both(config);
                config.output.dtype = Some(dtype);
            });
            let made = make(&about(&config), &params, &layout, 2).unwrap();
            assert_eq!((made.dtype, made.warning), (dtype, None));
            for file in &made.files {
                let tensors = SafeTensors::deserialize(&file.bytes).unwrap();
                for (name, view) in tensors.tensors() {
                    assert_eq!(view.dtype(), if name.ends_with(".alpha") { Dtype::F32 } else { wanted }, "{name}");
                }
                // Read as anybody's LoRA, it is the one that was trained but for the rounding.
                let state = LoraState::parse(&file.bytes, std::path::Path::new(&file.name)).unwrap();
                let (given, read) = state.resolve(&transformer("{}").linear_sites()).unwrap();
                assert_eq!(given.modules.len(), layout.modules.len());
                for (param, read) in params.iter().zip(&read) {
                    assert_eq!(param.name, read.name);
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= a.abs() * relative + 1e-7;
                    assert!(param.value.iter().zip(&read.value).all(close), "{}", param.name);
                }
            }
        }
    }

    #[test]
    fn values_beyond_f16_are_written_in_f32_with_a_warning() {
        let (layout, mut params) = lora();
        params[1].value[0] = 70000.0;
        let config = config(both);
        let made = make(&about(&config), &params, &layout, 2).unwrap();
        assert_eq!(made.dtype, OutputDtype::F32);
        assert!(made.warning.unwrap().contains("F16 cannot hold"));
        for file in made.files {
            assert!(SafeTensors::deserialize(&file.bytes).unwrap().tensors().iter().all(|(_, view)| view.dtype() == Dtype::F32));
        }
    }

    #[test]
    fn each_model_has_its_own_architecture() {
        let (layout, params) = lora();
        let config = config(|config| config.output.formats = vec![OutputFormat::Kohya]);
        let medium = r#"{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64"#;
        let dual: Vec<String> = (0..13).map(|i| i.to_string()).collect();
        for (shape, architecture, version) in [
            (format!("{medium}}}"), "stable-diffusion-v3-medium/lora", "sd3_medium"),
            (
                format!(r#"{medium}, "qk_norm": "rms_norm", "dual_attention_layers": [{}]}}"#, dual.join(",")),
                "stable-diffusion-v3.5-medium/lora",
                "sd3.5_medium",
            ),
            (
                r#"{"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "qk_norm": "rms_norm"}"#.to_owned(),
                "stable-diffusion-v3.5-large/lora",
                "sd3.5_large",
            ),
            ("{}".to_owned(), "stable-diffusion-v3/lora", "sd3"),
        ] {
            let about = About { published: survey::published(&transformer(&shape)), common_caption: Some("a \"sks\" dog"), ..about(&config) };
            let made = make(&about, &params, &layout, 2).unwrap();
            let header = header(&made.files[0].bytes);
            let values =
                ["modelspec.architecture", "ss_base_model_version", "modelspec.title", "modelspec.resolution", "ss_resolution"].map(|key| &*header[key]);
            assert_eq!(values, [architecture, version, "corgi", "512x512", "(512, 512)"]);
            assert_eq!((&*header["modelspec.trigger_phrase"], &*header["finetune.base_model_digest"]), ("a \"sks\" dog", "sha256:00"));
            // The digest is of the values alone, as readers compute it.
            let bytes = &made.files[0].bytes;
            let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(header["modelspec.hash_sha256"], format!("0x{}", hex::encode(digest::sha256(&bytes[start..]))));
        }
    }

    #[test]
    fn precision_of_the_training_decides_where_the_job_does_not() {
        let (layout, params) = lora();
        let config = config(both);
        let made = make(&About { precision: Precision::F32, ..about(&config) }, &params, &layout, 2).unwrap();
        assert_eq!(made.dtype, OutputDtype::F32);
        // Nothing but the weights decides diffusers' file.
        assert_eq!(header(&made.files[0].bytes).keys().collect::<Vec<_>>(), ["format"]);
        assert_eq!(make(&about(&config), &params, &layout, 2).unwrap().dtype, OutputDtype::F16);
    }
}
