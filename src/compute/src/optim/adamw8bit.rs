//! AdamW with 8-bit moments, as bitsandbytes' `AdamW8bit` (0.50, CPU path).
//!
//! An update uses the moments before they are made codes again. The weights decay first, as in PyTorch; bitsandbytes'
//! CUDA kernels decay last, which differs by `lr*wd` of the update.

use std::ops::Range;

use super::adamw::AdamWSettings;
use super::layout::Layout;
use super::quantize::CodeTable;
use super::state::Incoming;
use super::{Optimizer, Param, StateData, StateError, StateTensor};
use crate::kernels::{self, BLOCK, CodedMoment, Device};

/// Parameters with fewer values keep f32 moments.
pub const MIN_8BIT_SIZE: usize = 4096;

/// AdamW whose moments are codes of 8 bits with one f32 scale per block of 256 values: 2.03 bytes per value instead of 8.
#[derive(Debug)]
pub struct AdamW8bit<D: Device> {
    device: D,
    settings: AdamWSettings,
    layout: Layout,
    step: u64,
    /// Where each parameter's moments lie.
    slots: Vec<Slot>,
    ranges: D::Ranges,
    /// First and second moments of the parameters that keep f32.
    full: (D::Buffer, D::Buffer),
    first: Coded<D>,
    second: Coded<D>,
}

/// Place of a parameter's moments.
#[derive(Debug, Clone)]
enum Slot {
    /// Among the f32 moments.
    Full(Range<usize>),
    /// Among the codes; begins at a multiple of [`BLOCK`].
    Codes(Range<usize>),
}

/// A moment as codes, with its table.
#[derive(Debug)]
struct Coded<D: Device> {
    codes: D::Bytes,
    largest: D::Buffer,
    table: D::Buffer,
    nearest: D::Bytes,
}

impl<D: Device> Coded<D> {
    fn zeros(device: &D, codes: usize, table: &CodeTable) -> Self {
        let (values, nearest) = table.tables();
        Self {
            codes: device.upload_bytes(&vec![0; codes]),
            largest: device.zeros_f32(codes / BLOCK),
            table: device.upload_f32(values),
            nearest: device.upload_bytes(nearest),
        }
    }

    fn moment(&mut self) -> CodedMoment<'_, D::Buffer, D::Bytes> {
        CodedMoment { codes: &mut self.codes, largest: &mut self.largest, table: &self.table, nearest: &self.nearest }
    }
}

/// Where each parameter's moments lie, how many there are in f32 and as codes, and the ranges of both.
fn slots(layout: &Layout) -> (Vec<Slot>, (usize, usize), Vec<kernels::Range>) {
    let (mut slots, mut ranges, mut full, mut codes) = (Vec::new(), Vec::new(), 0, 0);
    for (_, span) in layout.spans() {
        let len = span.len();
        let is_full = len < MIN_8BIT_SIZE;
        let end = if is_full { &mut full } else { &mut codes };
        let state = *end;
        *end += if is_full { len } else { len.next_multiple_of(BLOCK) };
        slots.push(if is_full { Slot::Full(state..state + len) } else { Slot::Codes(state..state + len) });
        ranges.extend((0..len).step_by(BLOCK).map(|i| kernels::Range {
            values: (span.start + i) as i64,
            state: (state + i) as i64,
            count: BLOCK.min(len - i) as i32,
            full: i32::from(is_full),
        }));
    }
    (slots, (full, codes), ranges)
}

impl<D: Device> AdamW8bit<D> {
    /// An optimizer at update 0 for parameters of this layout.
    pub fn new(device: &D, settings: AdamWSettings, params: &[Param]) -> Self {
        let layout = Layout::of(params);
        let (slots, (full, codes), ranges) = slots(&layout);
        Self {
            settings,
            step: 0,
            slots,
            ranges: device.upload_ranges(&ranges),
            full: (device.zeros_f32(full), device.zeros_f32(full)),
            first: Coded::zeros(device, codes, &CodeTable::dynamic(true)),
            second: Coded::zeros(device, codes, &CodeTable::dynamic(false)),
            device: device.clone(),
            layout,
        }
    }

    /// Each parameter's name and the place of its moments.
    fn named(&self) -> impl Iterator<Item = (&str, &Slot)> {
        self.layout.spans().map(|(name, _)| name).zip(&self.slots)
    }
}

/// Places of the scales of codes.
fn scales(codes: &Range<usize>) -> Range<usize> {
    codes.start / BLOCK..codes.end.div_ceil(BLOCK)
}

impl<D: Device> Optimizer<D> for AdamW8bit<D> {
    fn step(&mut self, values: &mut D::Buffer, grads: &D::Buffer, clip: f32, lr: f64) {
        self.step += 1;
        let scalars = self.settings.scalars(self.step, lr, clip);
        let full = (&mut self.full.0, &mut self.full.1);
        self.device.adamw_8bit(values, grads, &self.ranges, full, self.first.moment(), self.second.moment(), scalars);
    }

    fn state(&self) -> Vec<StateTensor> {
        let device = &self.device;
        let full = [&self.full.0, &self.full.1].map(|moments| device.download(moments));
        let coded = [&self.first, &self.second].map(|moment| (device.download_bytes(&moment.codes), device.download(&moment.largest)));
        let mut tensors = vec![StateTensor { name: "step".into(), shape: vec![], data: StateData::U64(vec![self.step]) }];
        for (name, slot) in self.named() {
            match slot {
                Slot::Full(span) => {
                    tensors.push(StateTensor::f32(format!("exp_avg.{name}"), full[0][span.clone()].to_vec()));
                    tensors.push(StateTensor::f32(format!("exp_avg_sq.{name}"), full[1][span.clone()].to_vec()));
                }
                Slot::Codes(span) => {
                    for (moment, (codes, largest)) in (1..).zip(&coded) {
                        let (shape, data) = (vec![span.len()], StateData::U8(codes[span.clone()].to_vec()));
                        tensors.push(StateTensor { name: format!("state{moment}.{name}"), shape, data });
                        tensors.push(StateTensor::f32(format!("absmax{moment}.{name}"), largest[scales(span)].to_vec()));
                    }
                }
            }
        }
        tensors
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        let mut incoming = Incoming::check(tensors, &self.state())?;
        let (_, (full_len, codes_len), _) = slots(&self.layout);
        let mut full = [vec![0.0; full_len], vec![0.0; full_len]];
        let mut coded = [(vec![0; codes_len], vec![0.0; codes_len / BLOCK]), (vec![0; codes_len], vec![0.0; codes_len / BLOCK])];
        for (name, slot) in self.named() {
            match slot {
                Slot::Full(span) => {
                    full[0][span.clone()].copy_from_slice(&incoming.f32(&format!("exp_avg.{name}")));
                    full[1][span.clone()].copy_from_slice(&incoming.f32(&format!("exp_avg_sq.{name}")));
                }
                Slot::Codes(span) => {
                    for (moment, (codes, largest)) in (1..).zip(&mut coded) {
                        codes[span.clone()].copy_from_slice(&incoming.u8(&format!("state{moment}.{name}")));
                        largest[scales(span)].copy_from_slice(&incoming.f32(&format!("absmax{moment}.{name}")));
                    }
                }
            }
        }
        self.step = incoming.u64("step");
        let device = self.device.clone();
        device.overwrite(&mut self.full.0, &full[0]);
        device.overwrite(&mut self.full.1, &full[1]);
        for (moment, (codes, largest)) in [&mut self.first, &mut self.second].into_iter().zip(&coded) {
            moment.codes = device.upload_bytes(codes);
            device.overwrite(&mut moment.largest, largest);
        }
        Ok(())
    }
}
