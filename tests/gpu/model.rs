//! The whole transformer on both devices: velocity and every gradient.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Cpu, Cuda, Device, Int8Matrix, Precision, StoredMatrix, WeightFormat};
use finetune_compute::nn::DropoutKey;
use finetune_compute::nn::flow_matching::{LossKind, Weighting, mix};
use finetune_compute::optim::Param;
use finetune_model::Weights;
use finetune_model::lora::{EVERY_TARGET, LoraSpec};
use finetune_model::mmdit::{FlowResult, FlowTarget, Mmdit, MmditConfig, MmditInputs};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::support::{poison, random, relative};

fn config(heads: usize, head_dim: usize, dual: &[usize]) -> MmditConfig {
    MmditConfig {
        patch_size: 2,
        in_channels: 4,
        num_layers: 3,
        attention_head_dim: head_dim,
        num_attention_heads: heads,
        joint_attention_dim: 20,
        caption_projection_dim: heads * head_dim,
        pooled_projection_dim: 10,
        out_channels: None,
        pos_embed_max_size: 12,
        qk_norm: (!dual.is_empty()).then(|| "rms_norm".to_owned()),
        dual_attention_layers: dual.to_vec(),
    }
}

fn weights(config: &MmditConfig) -> (tempfile::TempDir, Arc<Weights>) {
    let (d, p) = (config.width(), config.patch_size);
    let mut tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
    let mut add = |name: String, shape: &[usize], scale: f64, offset: f64| {
        let values = random(shape.iter().product(), tensors.len() as u64).into_iter();
        tensors.insert(name, (shape.to_vec(), values.flat_map(|v| (v * scale as f32 + offset as f32).to_le_bytes()).collect()));
    };
    for site in config.linear_sites() {
        add(format!("{}.weight", site.name), &[site.out_features, site.in_features], 1.0 / (site.in_features as f64).sqrt(), 0.0);
        add(format!("{}.bias", site.name), &[site.out_features], 0.1, 0.0);
    }
    add("pos_embed.proj.weight".into(), &[d, config.in_channels, p, p], 0.2, 0.0);
    add("pos_embed.proj.bias".into(), &[d], 0.1, 0.0);
    add("pos_embed.pos_embed".into(), &[1, config.pos_embed_max_size.pow(2), d], 0.5, 0.0);
    for layer in 0..config.num_layers {
        let attentions = if config.is_dual(layer) { vec!["attn", "attn2"] } else { vec!["attn"] };
        for attention in attentions.iter().filter(|_| config.qk_norm.is_some()) {
            for norm in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
                add(format!("transformer_blocks.{layer}.{attention}.{norm}.weight"), &[config.attention_head_dim], 0.1, 1.0);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    let weights = Arc::new(Weights::open(dir.path()).unwrap());
    (dir, weights)
}

const ATTENTION: [&str; 8] = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];

struct Step {
    velocity: Vec<f32>,
    names: Vec<String>,
    gradients: Vec<Vec<f32>>,
}

fn step<D: Device>(
    (device, format): (&D, WeightFormat),
    config: &MmditConfig,
    weights: &Arc<Weights>,
    targets: &[&str],
    dropout: f64,
    recompute: &[bool],
) -> Step {
    let mut model = Mmdit::load_as(Arc::clone(weights), config.clone(), device, format).unwrap();
    let spec = LoraSpec { rank: 3, alpha: 6.0, dropout, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() };
    let mut params = model.attach_lora(&spec).unwrap().init(1);
    for (i, param) in params.iter_mut().enumerate().filter(|(_, p)| p.name.contains("lora_B")) {
        param.value = random(param.value.len(), 1000 + i as u64).iter().map(|v| v * 0.05).collect();
    }
    model.set_lora(&params).unwrap();
    model.set_recompute(recompute);
    let size = 3;
    let tensor = |shape: &[usize], seed| HostTensor::new(random(shape.iter().product(), seed), shape).unwrap();
    let latents = [size, config.in_channels, 18, 14];
    let key = DropoutKey { seed: 9, samples: (0..size as u64).map(|b| (2, b + 10)).collect() };
    let timestep = HostTensor::vector((0..size).map(|b| 100.0 + 250.5 * b as f32).collect());
    let (prompt, pooled) = (tensor(&[size, 27, config.joint_attention_dim], 51), tensor(&[size, config.pooled_projection_dim], 52));
    let run = || {
        let (velocity, saved) = model.forward(&tensor(&latents, 50), &timestep, &prompt, &pooled, Some(&key)).unwrap();
        (velocity.into_values(), model.backward(saved, &tensor(&latents, 53)).unwrap())
    };
    let (velocity, gradients) = run();
    assert!((velocity.clone(), gradients.clone()) == run(), "the second time gives other bits");
    Step { velocity, names: params.into_iter().map(|p| p.name).collect(), gradients }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-30)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_transformer_computes_the_same_on_both_devices() {
    let mut failures = Vec::new();
    for (heads, head_dim, dual, targets, dropout, format) in [
        (3, 12, &[][..], &ATTENTION[..], 0.0, WeightFormat::Float),
        (3, 12, &[0, 2], &EVERY_TARGET, 0.3, WeightFormat::Float),
        (2, 64, &[], &ATTENTION, 0.0, WeightFormat::Float),
        (2, 64, &[0, 1], &EVERY_TARGET, 0.2, WeightFormat::Float),
        (2, 64, &[0, 1], &ATTENTION, 0.0, WeightFormat::Float),
        (3, 12, &[1], &EVERY_TARGET, 0.0, WeightFormat::Float),
        (2, 64, &[], &["ff_context.net.0.proj"], 0.0, WeightFormat::Float),
        (3, 12, &[1], &EVERY_TARGET, 0.2, WeightFormat::Int8),
        (2, 64, &[0, 1], &ATTENTION, 0.0, WeightFormat::Int8),
    ] {
        let config = config(heads, head_dim, dual);
        let (_dir, weights) = weights(&config);
        let want = step((&Cpu::default(), format), &config, &weights, targets, dropout, &[]);
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::F16, 1e-2), (Precision::Bf16, 8e-2)] {
            let gpu = Cuda::open(0, precision).unwrap();
            poison(&gpu);
            let got = step((&gpu, format), &config, &weights, targets, dropout, &[]);
            let again = step((&gpu, format), &config, &weights, targets, dropout, &[true, false, true]);
            assert!(got.velocity == again.velocity && got.gradients == again.gradients, "{precision}: recomputed blocks give other bits");
            let mut worst = (relative(&got.velocity, &want.velocity), String::from("velocity"), 1.0);
            for ((name, got), want) in want.names.iter().zip(&got.gradients).zip(&want.gradients) {
                if want.iter().all(|v| *v == 0.0) {
                    assert!(got.iter().all(|v| *v == 0.0), "{name}");
                    continue;
                }
                let error = relative(got, want);
                if error > worst.0 {
                    worst = (error, name.clone(), cosine(got, want));
                }
            }
            let line = format!(
                "{precision} {format:?} {heads}x{head_dim} {dual:?} {} targets: worst {:.2e} at {} (cosine {:.6}), velocity {:.2e}",
                targets.len(),
                worst.0,
                worst.1,
                worst.2,
                relative(&got.velocity, &want.velocity)
            );
            println!("{line}");
            if worst.0 > tolerance {
                failures.push(line);
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// One step of `size` samples whose inputs are named by `seed`.
fn flow_step<D: Device>(model: &Mmdit<D>, seed: u64, size: usize) -> FlowResult {
    let config = model.config();
    let tensor = |shape: &[usize], seed| HostTensor::new(random(shape.iter().product(), seed), shape).unwrap();
    let kind = LossKind { weighting: Weighting::Cosmap, precondition_outputs: true };
    let latents = [size, config.in_channels, 10, 14];
    let (x0, noise) = (random(latents.iter().product(), seed), random(latents.iter().product(), seed + 1));
    let sigmas: Vec<f32> = (0..size).map(|b| 0.2 + 0.17 * b as f32).collect();
    let timesteps = HostTensor::vector(sigmas.iter().map(|s| 1000.0 * s).collect());
    let x = HostTensor::new(mix(&x0, &noise, &sigmas), latents).unwrap();
    let (prompt, pooled) = (tensor(&[size, 27, config.joint_attention_dim], seed + 2), tensor(&[size, config.pooled_projection_dim], seed + 3));
    let coefficients: Vec<f64> = (0..size).map(|b| 0.1 + 0.05 * b as f64).collect();
    let target = FlowTarget { kind, x0: &x0, noise: &noise, sigmas: &sigmas, coefficients: &coefficients };
    model.flow_step(MmditInputs { x: &x, timestep: &timesteps, prompt_embeds: &prompt, pooled: &pooled }, None, &target).unwrap()
}

/// A model with LoRA of rank 4 on all of attention, and its parameters, named by `seed`.
fn trained<D: Device>(device: &D, config: &MmditConfig, weights: &Arc<Weights>, seed: u64) -> (Mmdit<D>, Vec<Param>) {
    let spec = LoraSpec { rank: 4, alpha: 4.0, dropout: 0.0, target_modules: ATTENTION.map(str::to_owned).to_vec() };
    let mut model = Mmdit::load(Arc::clone(weights), config.clone(), device).unwrap();
    let mut params = model.attach_lora(&spec).unwrap().init(seed);
    for (i, param) in params.iter_mut().enumerate().filter(|(_, p)| p.name.contains("lora_B")) {
        param.value = random(param.value.len(), seed * 1000 + i as u64).iter().map(|v| v * 0.05).collect();
    }
    model.set_lora(&params).unwrap();
    (model, params)
}

/// Recorded steps against steps that are not recorded: other inputs, other LoRA values, another size between them.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn recorded_steps_give_the_same_bits_and_follow_inputs_and_parameters() {
    let config = config(2, 64, &[1]);
    let (_dir, weights) = weights(&config);
    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
        let gpu = Cuda::open(0, precision).unwrap();
        poison(&gpu);
        let (mut model, _) = trained(&gpu, &config, &weights, 1);
        let first = flow_step(&model, 70, 3);
        for size in [3, 2, 3, 2, 3] {
            let again = flow_step(&model, 70, size);
            assert!(size != 3 || again == first, "{precision}: a recorded step gives other bits");
        }
        let (fresh, params) = trained(&gpu, &config, &weights, 2);
        model.set_lora(&params).unwrap();
        assert!(flow_step(&model, 90, 3) == flow_step(&fresh, 90, 3), "{precision}: a recorded step does not follow its inputs");
        let (losses, gradients) = flow_step(&trained(&Cpu::default(), &config, &weights, 1).0, 70, 3);
        let tolerance = if precision == Precision::F32 { 2e-5 } else { 0.1 };
        for (got, want) in first.0.iter().zip(&losses) {
            assert!((got - want).abs() < tolerance * want, "{precision}: losses {:?} {losses:?}", first.0);
        }
        for (got, want) in first.1.iter().zip(&gradients) {
            let error = relative(got, want);
            assert!(want.iter().all(|v| *v == 0.0) || error < tolerance, "{precision}: {error}");
        }
    }
}

/// The codes and scales are those of the CPU, bit for bit, for weights stored in each type and rows of any length.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn weights_are_quantised_to_the_same_codes_on_both_devices() {
    struct Stored(Vec<f32>, usize, Option<(Precision, Vec<u8>)>);
    impl StoredMatrix for Stored {
        fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
            for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                out.copy_from_slice(&self.0[row * self.1..][columns.clone()]);
            }
        }

        fn stored(&self) -> Option<(Precision, &[u8])> {
            self.2.as_ref().map(|(precision, bytes)| (*precision, &bytes[..]))
        }
    }
    let gpu = Cuda::open(0, Precision::Bf16).unwrap();
    for (outputs, inputs) in [(64, 1536), (33, 50), (5, 7), (128, 64), (1, 4097)] {
        let values = random(outputs * inputs, 77);
        let half: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
        let brain: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
        for matrix in [
            Stored(values.clone(), inputs, None),
            Stored(values.clone(), inputs, Some((Precision::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()))),
            Stored(half.iter().map(|v| v.to_f32()).collect(), inputs, Some((Precision::F16, half.iter().flat_map(|v| v.to_le_bytes()).collect()))),
            Stored(brain.iter().map(|v| v.to_f32()).collect(), inputs, Some((Precision::Bf16, brain.iter().flat_map(|v| v.to_le_bytes()).collect()))),
        ] {
            let want = Int8Matrix::quantize(outputs, inputs, &matrix);
            let (codes, scales) = gpu.int8_codes(&gpu.frozen_int8(outputs, inputs, Arc::new(matrix))).unwrap();
            assert!(codes == want.codes() && scales == want.scales(), "{outputs} x {inputs}");
        }
    }
}
