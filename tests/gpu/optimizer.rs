//! Optimizers on the GPU against the same on the CPU: the same bits, whatever the sizes, also after a checkpoint.

use finetune_common::rng::{Purpose, Stream};
use finetune_compute::kernels::{Cpu, Cuda, Device, Precision, flat_offsets};
use finetune_compute::optim::{AdamWSettings, OptimizerSettings, Param, Parameters, ProdigySettings};

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
fn add<D: Device>(device: &D, parameters: &mut Parameters<D>, gradients: &[Vec<f32>]) {
    let starts = flat_offsets(gradients.iter().map(Vec::len));
    let mut all = vec![0.0; starts[gradients.len()]];
    gradients.iter().zip(starts).for_each(|(g, start)| all[start..start + g.len()].copy_from_slice(g));
    let all = device.upload_f32(&all);
    parameters.begin();
    device.add_scaled(parameters.sums(), &all, 0.5);
    device.add_scaled(parameters.sums(), &all, 0.5);
}

fn bits(params: &[Param]) -> Vec<Vec<u32>> {
    params.iter().map(|p| p.value.iter().map(|v| v.to_bits()).collect()).collect()
}

/// `max_norm`: one that clips, and one that does not.
fn compare(settings: OptimizerSettings, max_norm: f64) {
    let (gpu, cpu) = (Cuda::open(0, Precision::Bf16).unwrap(), Cpu::default());
    let (mut got, mut want) = (Parameters::new(&gpu, settings, &params()), Parameters::new(&cpu, settings, &params()));
    for (update, rate) in RATES.into_iter().enumerate() {
        add(&gpu, &mut got, &gradients(update));
        add(&cpu, &mut want, &gradients(update));
        let (norm, expected) = (got.clip(max_norm), want.clip(max_norm));
        assert!((norm / expected - 1.0).abs() < 1e-12, "{norm} {expected}");
        got.step(rate);
        want.step(rate);
        assert_eq!(bits(&got.params()), bits(&want.params()), "parameters after update {update}");
        assert_eq!(got.state(), want.state(), "state after update {update}");
        if update == 2 {
            // Another process goes on from the checkpoint.
            let (params, state) = (got.params(), got.state());
            got = Parameters::new(&gpu, settings, &self::params());
            got.restore(&params, state).unwrap();
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn adamw_gives_the_hosts_bits() {
    compare(OptimizerSettings::AdamW(SETTINGS), 1.0);
    compare(OptimizerSettings::AdamW(SETTINGS), 1e9);
}

#[test]
#[ignore = "needs a GPU"]
fn adamw_with_8_bits_gives_the_hosts_bits() {
    compare(OptimizerSettings::AdamW8bit(SETTINGS), 1.0);
    compare(OptimizerSettings::AdamW8bit(SETTINGS), 1e9);
}

#[test]
#[ignore = "needs a GPU"]
fn prodigy_gives_the_hosts_bits() {
    compare(OptimizerSettings::Prodigy(ProdigySettings::default()), 1e9);
}

#[test]
#[ignore = "needs a GPU"]
fn a_gradient_that_is_not_finite_shows_in_the_norm_and_a_foreign_state_is_refused() {
    let gpu = Cuda::open(0, Precision::Bf16).unwrap();
    let mut parameters = Parameters::new(&gpu, OptimizerSettings::AdamW(SETTINGS), &params());
    for bad in [f32::NAN, f32::INFINITY] {
        let mut grads = gradients(0);
        grads[6][69_999] = bad;
        add(&gpu, &mut parameters, &grads);
        assert!(!parameters.clip(1.0).is_finite());
    }
    let state = Parameters::new(&Cpu::default(), OptimizerSettings::AdamW8bit(SETTINGS), &params()).state();
    let before = parameters.state();
    assert!(parameters.restore(&params(), state).is_err());
    assert_eq!(parameters.state(), before, "a refused state changes nothing");
}
