//! AdamW with 8-bit moments, as bitsandbytes' `AdamW8bit` (0.50, CPU path).
//!
//! An update uses the moments before they are made codes again. The weights decay first, as in PyTorch; bitsandbytes'
//! CUDA kernels decay last, which differs by `lr*wd` of the update.

use rayon::prelude::*;

use super::adamw::{self, AdamWSettings, Moments, Scalars};
use super::quantize::{BLOCK, CodeTable};
use super::state::Incoming;
use super::{Layout, Optimizer, Param, StateData, StateError, StateTensor};

/// Parameters with fewer values keep f32 moments.
pub const MIN_8BIT_SIZE: usize = 4096;

/// AdamW whose moments are codes of 8 bits with one f32 scale per block of 256 values: 2.03 bytes per value instead of 8.
#[derive(Debug, Clone)]
pub struct AdamW8bit {
    pub(super) settings: AdamWSettings,
    layout: Layout,
    pub(super) step: u64,
    pub(super) slots: Vec<Slot>,
    pub(super) tables: Tables,
}

#[derive(Debug, Clone)]
pub(super) struct Tables {
    pub(super) first: CodeTable,
    pub(super) second: CodeTable,
}

/// State of a parameter.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    Full(Moments),
    Codes { first: Quantized, second: Quantized },
}

/// Codes and one scale per block.
#[derive(Debug, Clone)]
pub(super) struct Quantized {
    pub(super) codes: Vec<u8>,
    pub(super) absmax: Vec<f32>,
}

impl Quantized {
    fn zeros(len: usize) -> Self {
        Self { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] }
    }
}

impl AdamW8bit {
    /// An optimizer at update 0 for parameters of this layout.
    pub fn new(settings: AdamWSettings, params: &[Param]) -> Self {
        let slot = |p: &Param| match p.value.len() {
            n if n < MIN_8BIT_SIZE => Slot::Full(Moments::zeros(n)),
            n => Slot::Codes { first: Quantized::zeros(n), second: Quantized::zeros(n) },
        };
        let tables = Tables { first: CodeTable::dynamic(true), second: CodeTable::dynamic(false) };
        Self { settings, layout: Layout::of(params), step: 0, slots: params.iter().map(slot).collect(), tables }
    }
}

impl Optimizer for AdamW8bit {
    fn step(&mut self, params: &mut [Param], grads: &[Vec<f32>], lr: f64) {
        self.layout.check(params, grads);
        self.step += 1;
        let scalars = Scalars::new(&self.settings, self.step, lr);
        let tables = &self.tables;
        params.par_iter_mut().zip(grads).zip(&mut self.slots).for_each(|((param, grad), slot)| match slot {
            Slot::Full(moments) => adamw::update(&mut param.value, grad, moments, scalars),
            Slot::Codes { first, second } => {
                let blocks = param.value.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
                let firsts = first.codes.chunks_mut(BLOCK).zip(&mut first.absmax);
                let seconds = second.codes.chunks_mut(BLOCK).zip(&mut second.absmax);
                for (((p, g), m), v) in blocks.zip(firsts).zip(seconds) {
                    update_block(p, g, m, v, tables, scalars);
                }
            }
        });
    }

    fn state(&self) -> Vec<StateTensor> {
        let mut tensors = vec![StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![self.step]) }];
        let codes = |name: String, values: &[u8]| StateTensor { name, shape: vec![values.len()], data: StateData::U8(values.to_vec()) };
        for ((name, _), slot) in self.layout.0.iter().zip(&self.slots) {
            match slot {
                Slot::Full(moments) => {
                    tensors.push(StateTensor::f32(format!("exp_avg.{name}"), moments.first.clone()));
                    tensors.push(StateTensor::f32(format!("exp_avg_sq.{name}"), moments.second.clone()));
                }
                Slot::Codes { first, second } => {
                    tensors.push(codes(format!("state1.{name}"), &first.codes));
                    tensors.push(StateTensor::f32(format!("absmax1.{name}"), first.absmax.clone()));
                    tensors.push(codes(format!("state2.{name}"), &second.codes));
                    tensors.push(StateTensor::f32(format!("absmax2.{name}"), second.absmax.clone()));
                }
            }
        }
        tensors
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        let mut incoming = Incoming::check(tensors, &self.state())?;
        self.step = incoming.u64("step");
        for ((name, _), slot) in self.layout.0.iter().zip(&mut self.slots) {
            match slot {
                Slot::Full(moments) => {
                    *moments = Moments { first: incoming.f32(&format!("exp_avg.{name}")), second: incoming.f32(&format!("exp_avg_sq.{name}")) };
                }
                Slot::Codes { first, second } => {
                    *first = Quantized { codes: incoming.u8(&format!("state1.{name}")), absmax: incoming.f32(&format!("absmax1.{name}")) };
                    *second = Quantized { codes: incoming.u8(&format!("state2.{name}")), absmax: incoming.f32(&format!("absmax2.{name}")) };
                }
            }
        }
        Ok(())
    }
}

/// One update of up to 256 values that share their scales.
fn update_block(
    value: &mut [f32],
    grad: &[f32],
    (first_codes, first_absmax): (&mut [u8], &mut f32),
    (second_codes, second_absmax): (&mut [u8], &mut f32),
    tables: &Tables,
    s: Scalars,
) {
    let mut moments = Moments::zeros(value.len());
    for i in 0..value.len() {
        moments.first[i] = tables.first.value(first_codes[i]) * *first_absmax;
        moments.second[i] = tables.second.value(second_codes[i]) * *second_absmax;
    }
    adamw::update(value, grad, &mut moments, s);
    *first_absmax = tables.first.quantize(&moments.first, first_codes);
    *second_absmax = tables.second.quantize(&moments.second, second_codes);
}
