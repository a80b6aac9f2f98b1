//! AdamW and its 8-bit form on the GPU against the host's: the same bits, whatever the sizes, also after a checkpoint.

use finetune_common::rng::{Purpose, Stream};
use finetune_compute::kernels::{Engine, Precision, flat_offsets};
use finetune_compute::optim::gpu::{GpuAdamW, HostAdamW};
use finetune_compute::optim::{AdamW, AdamW8bit, AdamWSettings, Optimizer, Param, clip};

/// Around the sizes of blocks: 256 values share a scale, below 4,096 moments keep 32 bits.
const SIZES: [usize; 7] = [1, 255, 4095, 4096, 5000, 64 * 1536, 70_001];
const SETTINGS: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.05 };
const RATES: [f64; 5] = [1e-3, 5e-4, 1e-3, 2e-3, 1e-4];

fn random(size: usize, index: u64) -> Vec<f32> {
    let mut values = vec![0.0; size];
    Stream::new(11, Purpose::Noise, 0, index).fill_normal(&mut values);
    values
}

fn params() -> Vec<Param> {
    SIZES.iter().enumerate().map(|(i, &size)| Param { name: format!("p{i}"), shape: vec![size], value: random(size, i as u64) }).collect()
}

/// Of very different sizes, some of them zero.
fn gradients(update: usize) -> Vec<Vec<f32>> {
    let gradient = |(i, &size): (usize, &usize)| {
        let values = random(size, (100 * update + i + 1000) as u64);
        values.iter().enumerate().map(|(k, v)| if (k / 256) % 5 == 4 { 0.0 } else { v * 10_f32.powi((k % 7) as i32 - 5) }).collect()
    };
    SIZES.iter().enumerate().map(gradient).collect()
}

/// Adds the gradients to the sums, in two halves.
fn add(engine: &Engine, gpu: &mut GpuAdamW, gradients: &[Vec<f32>]) {
    let starts = flat_offsets(gradients.iter().map(Vec::len));
    let mut all = vec![0.0; starts[gradients.len()]];
    gradients.iter().zip(starts).for_each(|(g, start)| all[start..start + g.len()].copy_from_slice(g));
    let ops = engine.update_ops().unwrap();
    let all = ops.upload(&all);
    gpu.begin().unwrap();
    ops.add_scaled(gpu.sums(), &all, 0.5);
    ops.add_scaled(gpu.sums(), &all, 0.5);
}

fn bits(params: &[Param]) -> Vec<Vec<u32>> {
    params.iter().map(|p| p.value.iter().map(|v| v.to_bits()).collect()).collect()
}

/// An optimizer of the host, and the same one for the GPU to replace.
type Twins = (Box<dyn Optimizer>, HostAdamW);

/// `max_norm`: one that clips, and one that does not.
fn compare(make: fn(&[Param]) -> Twins, max_norm: f64) {
    let engine = Engine::cuda(0, Precision::Bf16).unwrap();
    let mut host_params = params();
    let (mut host, taken) = make(&host_params);
    let mut gpu = GpuAdamW::new(&engine, &host_params, taken).unwrap().unwrap();
    for (update, rate) in RATES.into_iter().enumerate() {
        let mut grads = gradients(update);
        add(&engine, &mut gpu, &grads);
        let norm = gpu.clip(max_norm).unwrap();
        let expected = clip::clip_global_norm(&mut grads, max_norm);
        assert!((norm / expected - 1.0).abs() < 1e-12, "{norm} {expected}");
        gpu.step(rate).unwrap();
        host.step(&mut host_params, &grads, rate);
        assert_eq!(bits(&gpu.params().unwrap()), bits(&host_params), "parameters after update {update}");
        assert_eq!(gpu.state().unwrap(), host.state(), "state after update {update}");
        if update == 2 {
            // Another process goes on from the checkpoint.
            let (params, state) = (gpu.params().unwrap(), gpu.state().unwrap());
            gpu = GpuAdamW::new(&engine, &self::params(), make(&self::params()).1).unwrap().unwrap();
            gpu.restore(&params, state).unwrap();
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn adamw_gives_the_hosts_bits() {
    let make = |params: &[Param]| -> Twins { (Box::new(AdamW::new(SETTINGS, params)), HostAdamW::Full(AdamW::new(SETTINGS, params))) };
    compare(make, 1.0);
    compare(make, 1e9);
}

#[test]
#[ignore = "needs a GPU"]
fn adamw_with_8_bits_gives_the_hosts_bits() {
    let make = |params: &[Param]| -> Twins { (Box::new(AdamW8bit::new(SETTINGS, params)), HostAdamW::Codes(Box::new(AdamW8bit::new(SETTINGS, params)))) };
    compare(make, 1.0);
    compare(make, 1e9);
}

#[test]
#[ignore = "needs a GPU"]
fn a_gradient_that_is_not_finite_shows_in_the_norm_and_a_foreign_state_is_refused() {
    let engine = Engine::cuda(0, Precision::Bf16).unwrap();
    let mut gpu = GpuAdamW::new(&engine, &params(), HostAdamW::Full(AdamW::new(SETTINGS, &params()))).unwrap().unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut grads = gradients(0);
        grads[6][69_999] = bad;
        add(&engine, &mut gpu, &grads);
        assert!(!gpu.clip(1.0).unwrap().is_finite());
    }
    let state = AdamW8bit::new(SETTINGS, &params()).state();
    let before = gpu.state().unwrap();
    assert!(gpu.restore(&params(), state).is_err());
    assert_eq!(gpu.state().unwrap(), before, "a refused state changes nothing");
}
