//! Preparation on a GPU: T5-XXL's encoder streamed from its file, and the autoencoder of Stable Diffusion 3, with random weights.
//!
//! `cargo bench --features cuda --bench gpu_encode -- MODEL [--precision bf16] [--layers 24] [--profile] [COUNT...]`: MODEL is a folder whose tokenizers and CLIP encoders
//! are used (as tests/golden/cases/encode-prompt-old-eos/model), COUNT numbers of distinct captions. Prints one JSON line per figure;
//! `--profile` adds the time by kind of kernel of one picture's encoding.
#![expect(clippy::print_stdout, reason = "a bench reports on stdout")]

use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Engine, Precision};
use finetune_model::ModelDir;
use finetune_model::text::{EncodeProgress, Encoder, PromptEncoder};
use finetune_model::vae::{VaeDecoder, VaeEncoder};
use rayon::prelude::*;
use serde_json::json;

/// Name, shape, mean and half the width of the values.
type Spec = (String, Vec<usize>, f32, f32);

/// Uniform f16 values as a safetensors file.
fn write(tensors: &[Spec], file: &Path) -> Result<()> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, shape, ..) in tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = std::fs::File::create(file)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (i, (_, shape, mean, range)) in tensors.iter().enumerate() {
        let mut bytes = vec![0_u8; 2 * shape.iter().product::<usize>()];
        bytes.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, bytes)| {
            let mut state = (i as u64) << 32 | chunk as u64 | 1;
            for pair in bytes.chunks_exact_mut(2) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 40) as f32 / 8_388_608.0 - 1.0;
                pair.copy_from_slice(&half::f16::from_f32(mean + uniform * range).to_le_bytes());
            }
        });
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// T5-XXL's encoder with the tokenizer's vocabulary.
fn write_t5(folder: &Path, vocabulary: usize, layers: usize) -> Result<()> {
    let (d, ff, heads) = (4096, 10_240, 64);
    let linear = |name: String, outputs: usize, inputs: usize, gain: f32| (name, vec![outputs, inputs], 0.0, gain * (3.0 / inputs as f32).sqrt());
    let mut tensors: Vec<Spec> = vec![
        ("shared.weight".into(), vec![vocabulary, d], 0.0, 1.0),
        ("encoder.final_layer_norm.weight".into(), vec![d], 1.0, 0.1),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".into(), vec![32, heads], 0.0, 1.0),
    ];
    for layer in 0..layers {
        let at = format!("encoder.block.{layer}.layer");
        // Queries carry 1/√64.
        for (name, gain) in [("q", 0.125), ("k", 1.0), ("v", 1.0), ("o", 1.0)] {
            tensors.push(linear(format!("{at}.0.SelfAttention.{name}.weight"), d, d, gain));
        }
        for name in ["wi_0", "wi_1"] {
            tensors.push(linear(format!("{at}.1.DenseReluDense.{name}.weight"), ff, d, 1.0));
        }
        tensors.push(linear(format!("{at}.1.DenseReluDense.wo.weight"), d, ff, 1.0));
        for norm in 0..2 {
            tensors.push((format!("{at}.{norm}.layer_norm.weight"), vec![d], 1.0, 0.1));
        }
    }
    std::fs::create_dir(folder)?;
    let config = json!({
        "d_model": d, "d_ff": ff, "d_kv": 64, "num_heads": heads, "num_layers": layers, "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu",
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    write(&tensors, &folder.join("model.safetensors"))
}

/// The autoencoder of Stable Diffusion 3.
fn write_vae(folder: &Path) -> Result<()> {
    let channels = [128, 256, 512, 512];
    let mut tensors: Vec<Spec> = Vec::new();
    let mut conv = |name: String, inputs: usize, outputs: usize, kernel: usize| {
        tensors.push((format!("{name}.weight"), vec![outputs, inputs, kernel, kernel], 0.0, (3.0 / (inputs * kernel * kernel) as f32).sqrt()));
        tensors.push((format!("{name}.bias"), vec![outputs], 0.0, 0.02));
    };
    let mut norms: Vec<(String, usize)> = Vec::new();
    let mut resnet = |conv: &mut dyn FnMut(String, usize, usize, usize), at: &str, inputs: usize, outputs: usize| {
        conv(format!("{at}.conv1"), inputs, outputs, 3);
        conv(format!("{at}.conv2"), outputs, outputs, 3);
        if inputs != outputs {
            conv(format!("{at}.conv_shortcut"), inputs, outputs, 1);
        }
        norms.extend([(format!("{at}.norm1"), inputs), (format!("{at}.norm2"), outputs)]);
    };
    for (side, ends) in [("encoder", (3, 32)), ("decoder", (16, 3))] {
        let encoder = side == "encoder";
        let order: Vec<usize> = if encoder { channels.to_vec() } else { channels.iter().rev().copied().collect() };
        conv(format!("{side}.conv_in"), ends.0, order[0], 3);
        conv(format!("{side}.conv_out"), order[3], ends.1, 3);
        for (level, &outputs) in order.iter().enumerate() {
            let at = format!("{side}.{}_blocks.{level}", if encoder { "down" } else { "up" });
            let inputs = order[level.saturating_sub(1)];
            for i in 0..if encoder { 2 } else { 3 } {
                resnet(&mut conv, &format!("{at}.resnets.{i}"), if i == 0 { inputs } else { outputs }, outputs);
            }
            if level < 3 {
                conv(format!("{at}.{}samplers.0.conv", if encoder { "down" } else { "up" }), outputs, outputs, 3);
            }
        }
        (0..2).for_each(|i| resnet(&mut conv, &format!("{side}.mid_block.resnets.{i}"), 512, 512));
    }
    for side in ["encoder", "decoder"] {
        for name in ["to_q", "to_k", "to_v", "to_out.0"] {
            let at = format!("{side}.mid_block.attentions.0.{name}");
            tensors.push((format!("{at}.weight"), vec![512, 512], 0.0, (3.0_f32 / 512.0).sqrt()));
            tensors.push((format!("{at}.bias"), vec![512], 0.0, 0.02));
        }
        norms.push((format!("{side}.mid_block.attentions.0.group_norm"), 512));
        norms.push((format!("{side}.conv_norm_out"), if side == "encoder" { 512 } else { 128 }));
    }
    for (name, size) in norms {
        tensors.push((format!("{name}.weight"), vec![size], 1.0, 0.1));
        tensors.push((format!("{name}.bias"), vec![size], 0.0, 0.1));
    }
    std::fs::create_dir(folder)?;
    let config = json!({
        "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": channels, "layers_per_block": 2, "norm_num_groups": 32,
        "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": false, "use_post_quant_conv": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    write(&tensors, &folder.join("diffusion_pytorch_model.safetensors"))
}

struct Options {
    model: std::path::PathBuf,
    precision: Precision,
    layers: usize,
    profile: bool,
    counts: Vec<usize>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
        let model = args.next().context("MODEL is missing")?.into();
        let mut options = Self { model, precision: Precision::Bf16, layers: 24, profile: false, counts: Vec::new() };
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
            match arg.as_str() {
                "--precision" => options.precision = value()?.parse()?,
                "--layers" => options.layers = value()?.parse()?,
                "--profile" => options.profile = true,
                count => options.counts.push(count.parse()?),
            }
        }
        Ok(options)
    }
}

const GIB: f64 = 1_073_741_824.0;

fn report(engine: &Engine, what: &str, figures: &serde_json::Value) {
    let (free, total) = engine.device_memory().unwrap_or_default();
    let mut line = json!({
        "what": what, "engine": "finetune", "precision": engine.precision().to_string(), "pool_peak_gib": engine.peak_memory() as f64 / GIB,
        "card_used_gib": (total - free) as f64 / GIB,
    });
    if let (Some(line), Some(figures)) = (line.as_object_mut(), figures.as_object()) {
        line.extend(figures.clone());
    }
    println!("{line}");
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(&options.model)? {
        let entry = entry?;
        if entry.file_name() != "text_encoder_3" && entry.file_name() != "vae" {
            std::os::unix::fs::symlink(std::fs::canonicalize(entry.path())?, folder.path().join(entry.file_name()))?;
        }
    }
    let stored: serde_json::Value = serde_json::from_slice(&std::fs::read(options.model.join("text_encoder_3/config.json"))?)?;
    let vocabulary = stored["vocab_size"].as_u64().context("vocab_size is missing")? as usize;
    let started = Instant::now();
    write_t5(&folder.path().join("text_encoder_3"), vocabulary, options.layers)?;
    write_vae(&folder.path().join("vae"))?;
    println!("weights written in {:.1} s", started.elapsed().as_secs_f64());
    let model = ModelDir::open(folder.path())?;

    let engine = Engine::cuda(0, options.precision)?;
    vae(&engine, &model, options.profile)?;
    engine.trim();
    let engine = Engine::cuda(0, options.precision)?;
    for &count in &options.counts {
        let encoder = PromptEncoder::open(&model, 77, &engine)?;
        let captions: Vec<String> = (0..count).map(|i| format!("a cup of coffee on a wooden table, picture {i} of {count}")).collect();
        let started = Instant::now();
        let mut embeddings = 0;
        let mut finite = true;
        // Seconds up to each kind of progress: an encoder's layers; "start" is everything between the last layer of T5 and the next group.
        let (mut phases, mut since) = (std::collections::BTreeMap::<String, f64>::new(), Instant::now());
        let mut progress = |progress: EncodeProgress| {
            let phase = if progress.encoder == Encoder::ClipL && progress.layers_done == 0 { "start".to_owned() } else { format!("{:?}", progress.encoder) };
            *phases.entry(phase).or_default() += since.elapsed().as_secs_f64();
            since = Instant::now();
            ControlFlow::Continue(())
        };
        encoder.encode_each::<anyhow::Error>(&captions, &mut progress, &mut |_, embedding| {
            embeddings += 1;
            finite &= embedding.embeds.part(100..101)?.is_finite();
            Ok(())
        })?;
        let seconds = started.elapsed().as_secs_f64();
        report(
            &engine,
            "t5_encode",
            &json!({"captions": embeddings, "seconds": seconds, "phases": phases, "per_s": f64::from(embeddings) / seconds, "finite": finite}),
        );
    }
    Ok(())
}

/// Milliseconds of the median of ten runs.
fn timed(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut times = Vec::new();
    for _ in 0..10 {
        let started = Instant::now();
        run()?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn random(shape: [usize; 4]) -> HostTensor {
    let mut tensor = HostTensor::zeros(shape);
    Stream::new(1, Purpose::Noise, 0, 0).fill_normal(tensor.values_mut());
    tensor
}

fn vae(engine: &Engine, model: &ModelDir, profile: bool) -> Result<()> {
    let encoder = VaeEncoder::load(model, engine)?;
    for side in [512, 1024] {
        let pixels = random([1, 3, side, side]);
        let ms = timed(|| encoder.encode(&pixels).map(drop).map_err(Into::into))?;
        report(engine, "vae_encode", &json!({"pixels": side, "batch": 1, "ms": ms, "per_s": 1e3 / ms}));
        // One after another, but given together.
        let many = random([8, 3, side, side]);
        let ms = timed(|| encoder.encode(&many).map(drop).map_err(Into::into))?;
        report(engine, "vae_encode", &json!({"pixels": side, "batch": 8, "ms": ms, "per_s": 8e3 / ms}));
        if profile {
            engine.start_profile();
            encoder.encode(&pixels)?;
            for (kernel, calls, ms) in engine.end_profile() {
                println!("{side} px: {kernel} {calls} calls {ms:.3} ms");
            }
        }
        engine.trim();
    }
    drop(encoder);
    let decoder = VaeDecoder::load(model, engine)?;
    for side in [64, 128] {
        let latents = random([1, 16, side, side]);
        let ms = timed(|| decoder.decode(&latents).map(drop).map_err(Into::into))?;
        report(engine, "vae_decode", &json!({"pixels": side * 8, "batch": 1, "ms": ms}));
        engine.trim();
    }
    Ok(())
}
