//! Against PyTorch, bitsandbytes, prodigyopt and diffusers (`reference/make_optim.py`), and what must hold for all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};

use super::*;
use crate::kernels::{Cpu, flat_offsets};

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "..", "tests", "golden", "optim", name].iter().collect()
}

/// Tensors of a file with their shapes, as f64, which holds all of them.
struct Trajectory(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Trajectory {
    fn load(name: &str) -> Self {
        let bytes = std::fs::read(golden(&format!("{name}.safetensors"))).unwrap();
        let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
                Dtype::F32 => data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
                Dtype::F64 => data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
                other => panic!("{name} is stored as {other}"),
            };
            (name, (view.shape().to_vec(), values))
        };
        Self(SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(tensor).collect())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.0[name].1.iter().map(|v| *v as f32).collect()
    }

    fn start(&self) -> Vec<Param> {
        ["a", "b"].map(|n| Param { name: n.into(), shape: self.0[&format!("start.{n}")].0.clone(), value: self.f32(&format!("start.{n}")) }).to_vec()
    }

    fn grads(&self, update: usize) -> Vec<Vec<f32>> {
        ["a", "b"].map(|n| self.f32(&format!("grad.{update}.{n}"))).to_vec()
    }
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let want_norm = norm(&mut want.iter().map(|w| f64::from(*w)));
    norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(*g) - f64::from(*w))) / want_norm.max(1e-30)
}

const RATES: [f64; 6] = [1e-3, 5e-4, 1e-3, 2e-3, 1e-3, 1e-3];
const SETTINGS: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.05 };

fn prodigy(variant: &str) -> (ProdigySettings, [f64; 6]) {
    let default = ProdigySettings::default();
    match variant {
        "default" => (default, [1.0; 6]),
        "all" => (
            ProdigySettings {
                beta2: 0.99,
                beta3: Some(0.98),
                weight_decay: 0.01,
                use_bias_correction: true,
                safeguard_warmup: true,
                d0: 1e-5,
                d_coef: 2.0,
                growth_rate: 1.5,
                ..default
            },
            [0.1, 0.5, 1.0, 1.0, 0.0, 0.7],
        ),
        _ => (ProdigySettings { weight_decay: 0.1, decouple: false, d0: 1e-4, ..default }, [1.0; 6]),
    }
}

/// Parameters with their optimizer on the CPU.
fn parameters(settings: OptimizerSettings, params: &[Param]) -> Parameters<Cpu> {
    Parameters::new(&Cpu::default(), settings, params)
}

/// One update with these gradients.
fn update(parameters: &mut Parameters<Cpu>, grads: &[Vec<f32>], rate: f64) {
    parameters.begin();
    for (grad, start) in grads.iter().zip(flat_offsets(grads.iter().map(Vec::len))) {
        parameters.sums()[start..start + grad.len()].copy_from_slice(grad);
    }
    assert_eq!(parameters.gradients(), grads);
    parameters.step(rate);
}

/// Follows a trajectory; the change of each parameter since the start is compared, which is stricter than its value.
fn follow(name: &str, settings: OptimizerSettings, rates: [f64; 6], tolerance: f64, mut after: impl FnMut(usize, &Trajectory, Vec<StateTensor>)) {
    let trajectory = Trajectory::load(name);
    let mut parameters = parameters(settings, &trajectory.start());
    for (step, rate) in rates.into_iter().enumerate() {
        update(&mut parameters, &trajectory.grads(step), rate);
        for param in parameters.params() {
            let change = |now: &[f32]| now.iter().zip(trajectory.f32(&format!("start.{}", param.name))).map(|(n, s)| n - s).collect::<Vec<_>>();
            let error = relative_error(&change(&param.value), &change(&trajectory.f32(&format!("value.{step}.{}", param.name))));
            assert!(error < tolerance, "{name}: {} after update {step}: {error:e}", param.name);
        }
        after(step, &trajectory, parameters.state());
    }
}

#[test]
fn adamw_follows_torch() {
    follow("adamw", OptimizerSettings::AdamW(SETTINGS), RATES, 1e-5, |_, _, _| {});
}

#[test]
fn adamw8bit_follows_bitsandbytes_to_the_code() {
    follow("adamw8bit", OptimizerSettings::AdamW8bit(SETTINGS), RATES, 1e-5, |update, trajectory, state| {
        if update < 5 {
            return;
        }
        let state: BTreeMap<String, StateData> = state.into_iter().map(|t| (t.name, t.data)).collect();
        for moment in [1, 2] {
            let StateData::U8(codes) = &state[&format!("state{moment}.b")] else { panic!("codes are bytes") };
            let want: Vec<u8> = trajectory.0[&format!("state{moment}.b")].1.iter().map(|code| *code as u8).collect();
            // A moment that differs in its last bit may round to the neighbouring code.
            let differing = codes.iter().zip(&want).filter(|(g, w)| g != w).count();
            assert!(differing * 1000 <= codes.len(), "moment {moment}: {differing} of {} codes differ", codes.len());
            assert!(codes.iter().zip(&want).all(|(g, w)| g.abs_diff(*w) <= 1), "moment {moment}");
            let StateData::F32(absmax) = &state[&format!("absmax{moment}.b")] else { panic!("scales are f32") };
            assert!(relative_error(absmax, &trajectory.f32(&format!("absmax{moment}.b"))) < 1e-6);
        }
    });
}

#[test]
fn prodigy_follows_prodigyopt() {
    for variant in ["default", "all", "coupled"] {
        let name = format!("prodigy-{variant}");
        let (settings, rates) = prodigy(variant);
        follow(&name, OptimizerSettings::Prodigy(settings), rates, 1e-5, |update, trajectory, state| {
            let Some(StateData::F64(d)) = state.iter().find(|t| t.name == "d").map(|t| &t.data) else { panic!("d is f64") };
            let want: f64 = trajectory.0[&format!("d.{update}")].1[0];
            assert!((d[0] / want - 1.0).abs() < 1e-6, "{name}: d after update {update}: {} for {want}", d[0]);
        });
    }
}

#[test]
fn schedules_follow_diffusers() {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        warmup: u64,
        total: u64,
        cycles: f64,
        power: f64,
        lr: f64,
        values: Vec<f64>,
    }
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("schedules.json")).unwrap()).unwrap();
    let cases: Vec<Case> = serde_json::from_value(file["schedules"].clone()).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for case in cases {
        let shape = match case.name.as_str() {
            "constant" => schedule::Shape::Constant,
            "constant_with_warmup" => schedule::Shape::ConstantWithWarmup,
            "linear" => schedule::Shape::Linear,
            "cosine" => schedule::Shape::Cosine,
            "cosine_with_restarts" => schedule::Shape::CosineWithRestarts,
            _ => schedule::Shape::Polynomial,
        };
        let schedule = Schedule { shape, learning_rate: case.lr, warmup_steps: case.warmup, total_steps: case.total, cycles: case.cycles, power: case.power };
        for (index, want) in case.values.iter().enumerate() {
            let got = schedule.lr(index as u64);
            assert!((got - want).abs() <= 1e-15 + 1e-12 * want, "{schedule:?} at {index}: {got} for {want}");
        }
        names.insert(case.name);
    }
    assert_eq!(names.len(), 6);
    // Where diffusers divides by zero.
    let flat = Schedule { shape: schedule::Shape::Polynomial, learning_rate: 1e-3, warmup_steps: 5, total_steps: 5, cycles: 1.0, power: 1.0 };
    assert!(flat.lr(5).is_finite() && flat.lr(6).is_finite());
}

const OPTIMIZERS: usize = 5;

fn optimizer(index: usize) -> OptimizerSettings {
    let prodigy = |variant| OptimizerSettings::Prodigy(prodigy(variant).0);
    [OptimizerSettings::AdamW(SETTINGS), OptimizerSettings::AdamW8bit(SETTINGS), prodigy("default"), prodigy("all"), prodigy("coupled")][index]
}

fn bits(params: &[Param]) -> Vec<u32> {
    params.iter().flat_map(|p| p.value.iter().map(|v| v.to_bits())).collect()
}

/// Through bytes, as a checkpoint does, into parameters that were made from the values of the start.
#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let trajectory = Trajectory::load("adamw8bit");
    let start = trajectory.start();
    for index in 0..OPTIMIZERS {
        let mut whole = parameters(optimizer(index), &start);
        (0..6).for_each(|t| update(&mut whole, &trajectory.grads(t), RATES[t]));
        for stop in 0..6 {
            let mut before = parameters(optimizer(index), &start);
            (0..stop).for_each(|t| update(&mut before, &trajectory.grads(t), RATES[t]));
            let saved: Vec<_> = before.state().iter().map(|t| (t.name.clone(), t.dtype(), t.shape.clone(), t.to_bytes())).collect();
            let loaded = saved.iter().map(|(name, dtype, shape, bytes)| StateTensor::from_bytes(name, *dtype, shape, bytes).unwrap()).collect();
            let mut after = parameters(optimizer(index), &start);
            after.restore(&before.params(), loaded).unwrap();
            (stop..6).for_each(|t| update(&mut after, &trajectory.grads(t), RATES[t]));
            assert_eq!(bits(&after.params()), bits(&whole.params()), "optimizer {index}, stopped after {stop}");
            assert_eq!(after.state(), whole.state());
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let trajectory = Trajectory::load("adamw8bit");
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let mut all = Vec::new();
            for index in 0..OPTIMIZERS {
                let mut parameters = parameters(optimizer(index), &trajectory.start());
                (0..6).for_each(|t| update(&mut parameters, &trajectory.grads(t), RATES[t]));
                all.extend(bits(&parameters.params()));
                all.push(parameters.clip(1.0).to_bits() as u32);
            }
            all
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn a_state_of_other_parameters_is_refused() {
    let trajectory = Trajectory::load("adamw");
    let params = trajectory.start();
    let mut other = params.clone();
    other[1].name = "c".into();
    for index in 0..OPTIMIZERS {
        let (mut own, theirs) = (parameters(optimizer(index), &params), parameters(optimizer(index), &other));
        let before = (own.params(), own.state());
        assert!(matches!(own.restore(&params, theirs.state()), Err(StateError::Missing { .. })));
        assert_eq!((own.params(), own.state()), before);
    }
}

#[test]
#[should_panic(expected = "should have 40 values")]
fn mixed_up_parameters_are_a_panic() {
    let mut params = Trajectory::load("adamw").start();
    let mut own = parameters(OptimizerSettings::AdamW(SETTINGS), &params);
    let state = own.state();
    params.swap(0, 1);
    let _ = own.restore(&params, state);
}

/// Gradients above the limit are scaled to it, as if they had been scaled before; those below it stay.
#[test]
fn gradients_are_clipped_to_their_global_norm() {
    let params: Vec<Param> = [("a", 2), ("b", 1)].map(|(name, len)| Param { name: name.into(), shape: vec![len], value: vec![1.0; len] }).to_vec();
    let plain = |grads: &[Vec<f32>], max_norm: Option<f64>| {
        let mut own = parameters(OptimizerSettings::AdamW(SETTINGS), &params);
        for (grad, start) in grads.iter().zip(flat_offsets([2, 1].into_iter())) {
            own.sums()[start..start + grad.len()].copy_from_slice(grad);
        }
        let norm = max_norm.map(|most| own.clip(most));
        own.step(1e-2);
        (norm, own.state())
    };
    let grads = [vec![3.0, 0.0], vec![4.0]];
    let (norm, below) = plain(&grads, Some(10.0));
    assert!((norm.unwrap() - 5.0).abs() < 1e-12);
    assert_eq!(below, plain(&grads, None).1);
    let factor = (1.0 / (5.0 + 1e-6)) as f32;
    let scaled = grads.clone().map(|g| g.iter().map(|g| g * factor).collect::<Vec<f32>>());
    assert_eq!(plain(&grads, Some(1.0)).1, plain(&scaled, None).1);
    assert_eq!(plain(&grads, Some(0.0)).1, below, "0 is no limit");
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(!plain(&[vec![1.0, bad], vec![2.0]], Some(1.0)).0.unwrap().is_finite());
    }
}
