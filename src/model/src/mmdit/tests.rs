//! The whole model on small random weights. Numbers against the reference implementation are in `tests/golden`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::load::load;
use super::*;
use crate::lora::EVERY_TARGET;
use finetune_common::rng::{Purpose, Stream};
use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Cpu, Int8Matrix, StoredMatrix as _};
use finetune_compute::nn::DropoutKey;
use finetune_compute::nn::flow_matching::{LossKind, Weighting, loss};
use finetune_compute::optim::{AdamWSettings, OptimizerSettings, Parameters};

fn config(dual: &[usize]) -> MmditConfig {
    MmditConfig {
        patch_size: 2,
        in_channels: 4,
        num_layers: 3,
        attention_head_dim: 12,
        num_attention_heads: 3,
        joint_attention_dim: 20,
        caption_projection_dim: 36,
        pooled_projection_dim: 10,
        out_channels: None,
        pos_embed_max_size: 8,
        qk_norm: (!dual.is_empty()).then(|| "rms_norm".to_owned()),
        dual_attention_layers: dual.to_vec(),
    }
}

fn random(len: usize, seed: u64, scale: f64) -> Vec<f32> {
    let mut stream = Stream::new(seed, Purpose::Noise, 0, 0);
    (0..len).map(|_| (stream.normal_f64() * scale) as f32).collect()
}

/// Weights of `config` in a safetensors file: f32, or f16.
fn weights(config: &MmditConfig, half: bool) -> (tempfile::TempDir, Arc<Weights>) {
    let d = config.width();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], scale: f64, offset: f64| {
        let values = random(shape.iter().product(), tensors.len() as u64, scale).into_iter().map(|v| v + offset as f32);
        let bytes = if half { values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect() } else { values.flat_map(f32::to_le_bytes).collect() };
        tensors.insert(name, (shape.to_vec(), bytes));
    };
    for site in config.linear_sites() {
        add(format!("{}.weight", site.name), &[site.out_features, site.in_features], 1.0 / (site.in_features as f64).sqrt(), 0.0);
        add(format!("{}.bias", site.name), &[site.out_features], 0.1, 0.0);
    }
    let p = config.patch_size;
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
    let dtype = if half { Dtype::F16 } else { Dtype::F32 };
    let views = tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    let weights = Arc::new(Weights::open(dir.path()).unwrap());
    (dir, weights)
}

fn spec(targets: &[&str], dropout: f64) -> LoraSpec {
    LoraSpec { rank: 3, alpha: 6.0, dropout, target_modules: targets.iter().map(|t| (*t).to_owned()).collect() }
}

const ATTENTION: [&str; 8] = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];

fn model(config: &MmditConfig, spec: &LoraSpec) -> (tempfile::TempDir, Mmdit<Cpu>, Vec<Param>) {
    let (dir, weights) = weights(config, false);
    let mut model = Mmdit::load(weights, config.clone(), &Cpu::default()).unwrap();
    let mut params = model.attach_lora(spec).unwrap().init(1);
    for (i, param) in params.iter_mut().enumerate().filter(|(_, p)| p.name.contains("lora_B")) {
        param.value = random(param.value.len(), 1000 + i as u64, 0.05);
    }
    model.set_lora(&params).unwrap();
    (dir, model, params)
}

struct Batch {
    x: HostTensor,
    timestep: HostTensor,
    prompt: HostTensor,
    pooled: HostTensor,
    d_velocity: HostTensor,
    key: DropoutKey,
}

fn batch(config: &MmditConfig, size: usize) -> Batch {
    let tensor = |shape: &[usize], seed| HostTensor::new(random(shape.iter().product(), seed, 1.0), shape).unwrap();
    let latents = [size, config.in_channels, 6, 4];
    Batch {
        x: tensor(&latents, 50),
        timestep: HostTensor::vector((0..size).map(|b| 100.0 + 250.5 * b as f32).collect()),
        prompt: tensor(&[size, 7, config.joint_attention_dim], 51),
        pooled: tensor(&[size, config.pooled_projection_dim], 52),
        d_velocity: tensor(&latents, 53),
        key: DropoutKey { seed: 9, samples: (0..size as u64).map(|b| (2, b + 10)).collect() },
    }
}

impl Batch {
    fn part(&self, start: usize, len: usize) -> Self {
        let cut = |t: &HostTensor| t.part(start..start + len).unwrap();
        Self {
            x: cut(&self.x),
            timestep: cut(&self.timestep),
            prompt: cut(&self.prompt),
            pooled: cut(&self.pooled),
            d_velocity: cut(&self.d_velocity),
            key: DropoutKey { seed: self.key.seed, samples: self.key.samples[start..start + len].to_vec() },
        }
    }

    fn step(&self, model: &Mmdit<Cpu>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let (velocity, saved) = model.forward(&self.x, &self.timestep, &self.prompt, &self.pooled, Some(&self.key)).unwrap();
        let gradients = model.backward(saved, &self.d_velocity).unwrap();
        (values(&velocity), gradients)
    }

    fn sample(&self, model: &Mmdit<Cpu>, scale: f64, skip: &[usize]) -> Vec<f32> {
        values(&model.forward_only(&self.x, &self.timestep, &self.prompt, &self.pooled, scale, skip).unwrap())
    }
}

fn values(tensor: &HostTensor) -> Vec<f32> {
    tensor.values().to_vec()
}

fn relative(got: &[f32], want: &[f32]) -> f64 {
    let square = |f: &dyn Fn(usize) -> f64| (0..want.len()).map(|i| f(i).powi(2)).sum::<f64>().sqrt();
    square(&|i| f64::from(got[i]) - f64::from(want[i])) / square(&|i| f64::from(want[i])).max(1e-30)
}

/// Threads, and dropout on, so that the masks take part.
#[test]
fn results_are_bit_identical_for_any_number_of_threads() {
    for dual in [&[][..], &[0, 2]] {
        let config = config(dual);
        let (_dir, model, _) = model(&config, &spec(&EVERY_TARGET, 0.3));
        let batch = batch(&config, 3);
        let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| batch.step(&model));
        let one = run(1);
        assert!(one.0.iter().chain(one.1.iter().flatten()).all(|v| v.is_finite()));
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    let config = config(&[1]);
    let (_dir, mut model, _) = model(&config, &spec(&EVERY_TARGET, 0.2));
    let batch = batch(&config, 2);
    let kept = batch.step(&model);
    for flags in [&[true, true, true][..], &[false, true, false], &[true]] {
        model.set_recompute(flags);
        assert_eq!(kept, batch.step(&model), "{flags:?}");
    }
}

/// A weight that stays in its file is multiplied in the same order as a packed one.
#[test]
fn stored_weights_give_the_same_bits_as_converted_ones() {
    let config = config(&[0]);
    let (_dir, weights) = weights(&config, true);
    let batch = batch(&config, 2);
    let run = |convert| {
        let mut model = load(&weights, config.clone(), Cpu::default(), WeightFormat::Float, convert).unwrap();
        let params = model.attach_lora(&spec(&ATTENTION, 0.0)).unwrap().init(3);
        model.set_lora(&params).unwrap();
        batch.step(&model)
    };
    assert_eq!(run(true), run(false));
}

/// A model in 8 bits is, bit for bit, one whose attentions and feed-forwards have the widened values; everything else stays as it is.
#[test]
fn weights_in_8_bits_are_their_widened_values() {
    let config = config(&[0]);
    let (dir, float) = weights(&config, false);
    let batch = batch(&config, 2);
    let run = |weights: &Arc<Weights>, format| {
        let mut model = Mmdit::load_as(Arc::clone(weights), config.clone(), &Cpu::default(), format).unwrap();
        let mut params = model.attach_lora(&spec(&ATTENTION, 0.0)).unwrap().init(3);
        params.iter_mut().enumerate().for_each(|(i, param)| param.value = random(param.value.len(), 700 + i as u64, 0.05));
        model.set_lora(&params).unwrap();
        batch.step(&model)
    };
    let int8 = run(&float, WeightFormat::Int8);
    assert!(int8 != run(&float, WeightFormat::Float), "rounding changes something");
    let in_8_bits = |name: &str| ["attn.", "attn2.", "ff.", "ff_context."].iter().any(|part| name.contains(part)) && !name.contains("norm");
    let mut tensors = HashMap::new();
    for name in float.names() {
        let view = float.view(name).unwrap();
        let (shape, mut values) = (view.shape.to_vec(), view.to_f32().unwrap());
        if in_8_bits(name) && shape.len() == 2 {
            let (outputs, inputs) = (shape[0], shape[1]);
            Int8Matrix::quantize(outputs, inputs, &view).read_block(0..outputs, 0..inputs, &mut values);
        }
        tensors.insert(name.to_owned(), (shape, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()));
    }
    let widened = dir.path().join("widened");
    std::fs::create_dir(&widened).unwrap();
    let views = tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &widened.join("diffusion_pytorch_model.safetensors")).unwrap();
    assert!(int8 == run(&Arc::new(Weights::open(&widened).unwrap()), WeightFormat::Float));
}

/// Each sample's velocity has the same bits in any batch; gradients of the parts add up to those of the whole.
#[test]
fn micro_batches_add_up() {
    let config = config(&[0, 1]);
    let (_dir, model, _) = model(&config, &spec(&EVERY_TARGET, 0.25));
    let batch = batch(&config, 3);
    let (velocity, gradients) = batch.step(&model);
    let (first, mut sum) = batch.part(0, 1).step(&model);
    let (rest, more) = batch.part(1, 2).step(&model);
    assert_eq!(velocity, [first, rest].concat());
    sum.iter_mut().flatten().zip(more.iter().flatten()).for_each(|(s, m)| *s += m);
    for (whole, parts) in gradients.iter().zip(&sum) {
        assert!(relative(parts, whole) < 1e-5 || whole.iter().all(|g| *g == 0.0));
    }
}

/// After one update every parameter has a finite gradient that is not zero, but for the last block's add_q_proj, whose output is
/// discarded: exactly zero. Before it (B = 0) A has none.
#[test]
fn every_parameter_is_trained() {
    for (dual, targets) in [(&[][..], &ATTENTION[..]), (&[0, 2], &EVERY_TARGET)] {
        let config = config(dual);
        let (_dir, mut model, _) = model(&config, &spec(targets, 0.0));
        let layout = model.layout().clone();
        let params = layout.init(5);
        model.set_lora(&params).unwrap();
        let batch = batch(&config, 2);
        let (_, gradients) = batch.step(&model);
        assert!(params.iter().zip(&gradients).filter(|(p, _)| p.name.contains("lora_A")).all(|(_, g)| g.iter().all(|v| *v == 0.0)));
        let device = Cpu::default();
        let mut parameters = Parameters::new(&device, OptimizerSettings::AdamW(AdamWSettings::default()), &params);
        let starts = flat_offsets(gradients.iter().map(Vec::len));
        gradients.iter().zip(starts).for_each(|(g, start)| parameters.sums()[start..start + g.len()].copy_from_slice(g));
        parameters.step(1e-3);
        model.set_lora_from(parameters.values());
        let (_, gradients) = batch.step(&model);
        for (param, gradient) in params.iter().zip(&gradients) {
            let discarded = param.name.contains("transformer_blocks.2.attn.add_q_proj");
            assert!(gradient.iter().all(|g| g.is_finite()), "{}", param.name);
            assert_eq!(gradient.iter().all(|g| *g == 0.0), discarded, "{}", param.name);
        }
    }
}

/// Along random directions in parameter space the objective's slope is the gradient's. With dropout: its masks are fixed by name.
#[test]
fn gradients_are_slopes_of_the_objective() {
    for (dual, targets) in [(&[][..], &EVERY_TARGET[..]), (&[0, 1], &EVERY_TARGET), (&[], &["ff_context.net.0.proj"]), (&[1], &["attn2.to_k"])] {
        let config = config(dual);
        let (_dir, mut model, params) = model(&config, &spec(targets, 0.2));
        let batch = batch(&config, 2);
        let (_, gradients) = batch.step(&model);
        let direction = values(&batch.d_velocity);
        let mut objective = |step: f32, along: &[Vec<f32>]| {
            let mut moved = params.clone();
            for (param, along) in moved.iter_mut().zip(along) {
                param.value.iter_mut().zip(along).for_each(|(p, a)| *p += step * a);
            }
            model.set_lora(&moved).unwrap();
            let (velocity, _) = model.forward(&batch.x, &batch.timestep, &batch.prompt, &batch.pooled, Some(&batch.key)).unwrap();
            values(&velocity).iter().zip(&direction).map(|(v, d)| f64::from(*v) * f64::from(*d)).sum::<f64>()
        };
        for trial in 0..3 {
            // Each parameter alone is too small a part to be seen in f32: move along the signs of the gradient with random sizes.
            let sizes: Vec<Vec<f32>> = gradients.iter().enumerate().map(|(i, g)| random(g.len(), 7000 + trial * 500 + i as u64, 1.0)).collect();
            let along: Vec<Vec<f32>> = gradients.iter().zip(&sizes).map(|(g, s)| g.iter().zip(s).map(|(g, s)| g.signum() * s.abs()).collect()).collect();
            let step = 1e-4;
            let slope = (objective(step, &along) - objective(-step, &along)) / f64::from(2.0 * step);
            let expected: f64 = gradients.iter().flatten().zip(along.iter().flatten()).map(|(g, a)| f64::from(*g) * f64::from(*a)).sum();
            assert!((slope - expected).abs() < 5e-3 * expected.abs(), "{dual:?} {targets:?}: {slope} {expected}");
        }
    }
}

/// A whole step is forward, loss and backward one after another: the same gradients, bit for bit; losses come in two floats.
#[test]
fn a_step_is_forward_loss_and_backward() {
    for precondition_outputs in [true, false] {
        let config = config(&[1]);
        let (_dir, model, params) = model(&config, &spec(&EVERY_TARGET, 0.2));
        let batch = batch(&config, 2);
        let (x0, noise) = (random(batch.x.values().len(), 60, 1.0), random(batch.x.values().len(), 61, 1.0));
        let (sigmas, coefficients) = ([0.3, 0.8], [0.25, 0.7]);
        let kind = LossKind { weighting: Weighting::Cosmap, precondition_outputs };
        let (velocity, saved) = model.forward(&batch.x, &batch.timestep, &batch.prompt, &batch.pooled, Some(&batch.key)).unwrap();
        let want = loss(kind, velocity.values(), &x0, &noise, &sigmas, &coefficients);
        let gradients = model.backward(saved, &HostTensor::new(want.d_velocity, velocity.shape()).unwrap()).unwrap();

        let inputs = MmditInputs { x: &batch.x, timestep: &batch.timestep, prompt_embeds: &batch.prompt, pooled: &batch.pooled };
        let target = FlowTarget { kind, x0: &x0, noise: &noise, sigmas: &sigmas, coefficients: &coefficients };
        let (losses, got) = model.flow_step(inputs, Some(&batch.key), &target).unwrap();
        assert!(got == gradients && got.iter().flatten().any(|g| *g != 0.0));
        for (got, want) in losses.iter().zip(&want.per_sample) {
            assert!((got - want).abs() < 1e-12 * want, "{got} {want}");
        }
        let mut sum = Cpu::default().zeros_f32(flat_offsets(params.iter().map(|p| p.value.len()))[params.len()]);
        for _ in 0..2 {
            assert_eq!(model.flow_step_into(inputs, Some(&batch.key), &target, &mut sum).unwrap().receive(&Cpu::default()), losses);
        }
        for (gradient, start) in gradients.iter().zip(flat_offsets(gradients.iter().map(Vec::len))) {
            assert!(sum[start..].iter().zip(gradient).all(|(sum, g)| *sum == g + g), "twice");
        }
    }
}

#[test]
fn sampling_scales_lora_and_skips_blocks() {
    let config = config(&[1]);
    let (_dir, mut model, params) = model(&config, &spec(&ATTENTION, 0.5));
    let batch = batch(&config, 2);
    let with = batch.sample(&model, 1.0, &[]);
    let (trained, _) = model.forward(&batch.x, &batch.timestep, &batch.prompt, &batch.pooled, None).unwrap();
    assert_eq!(with, values(&trained));
    let skipped = batch.sample(&model, 1.0, &[1]);
    assert!(relative(&skipped, &with) > 1e-2);
    assert_eq!(skipped, batch.sample(&model, 1.0, &[1, 1]));

    let half = batch.sample(&model, 0.5, &[]);
    let base = batch.sample(&model, 0.0, &[]);
    let mut scaled = params.clone();
    scaled.iter_mut().filter(|p| p.name.contains("lora_B")).for_each(|p| p.value.iter_mut().for_each(|v| *v *= 0.5));
    model.set_lora(&scaled).unwrap();
    assert!(relative(&batch.sample(&model, 1.0, &[]), &half) < 1e-6);
    model.attach_layout(LoraLayout::default()).unwrap();
    assert_eq!(batch.sample(&model, 1.0, &[]), base);
    assert!(relative(&half, &base) > 1e-3);
}

#[test]
fn what_does_not_fit_is_named() {
    let config = config(&[]);
    let (dir, weights) = weights(&config, false);
    let model = Mmdit::load(Arc::clone(&weights), config.clone(), &Cpu::default()).unwrap();
    let good = batch(&config, 2);
    let error = |x: &HostTensor, t: &HostTensor, e: &HostTensor, p: &HostTensor| model.forward_only(x, t, e, p, 1.0, &[]).unwrap_err().to_string();
    let odd = HostTensor::zeros([2, 4, 5, 4]);
    assert!(error(&odd, &good.timestep, &good.prompt, &good.pooled).contains("multiples of 2"));
    let wide = HostTensor::zeros([2, 4, 20, 4]);
    assert!(error(&wide, &good.timestep, &good.prompt, &good.pooled).contains("up to 16"));
    assert!(error(&good.x, &good.timestep.part(0..1).unwrap(), &good.prompt, &good.pooled).contains("timestep"));
    assert!(error(&good.x, &good.timestep, &HostTensor::zeros([2, 7, 3]), &good.pooled).contains("prompt"));
    assert!(error(&good.x, &good.timestep, &good.prompt, &good.prompt).contains("pooled"));
    let other = MmditConfig { num_layers: 4, ..config };
    assert!(Mmdit::load(weights, other, &Cpu::default()).unwrap_err().to_string().contains("transformer_blocks.2.norm1_context"));
    drop(dir);
}
