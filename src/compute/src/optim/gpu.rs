//! AdamW and its 8-bit form on a GPU: parameters, sums of gradients and moments stay there, and every update gives the bits that the host's
//! would give. The host's optimizers name and check the state, so that a checkpoint goes on anywhere.

use super::adamw::{Moments, Scalars};
use super::adamw8bit::{Quantized, Slot};
use super::quantize::BLOCK;
use super::{AdamW, AdamW8bit, Optimizer as _, Param, StateError, StateTensor};
use crate::kernels::{AdamWScalars, Buffer, CodedMoment, DeviceError, Engine, Range, UpdateOps, catch, flat_offsets};

/// An optimizer of the host that a GPU can replace.
#[derive(Debug, Clone)]
pub enum HostAdamW {
    /// Moments of 32 bits.
    Full(AdamW),
    /// Moments of 8 bits.
    Codes(Box<AdamW8bit>),
}

impl HostAdamW {
    fn state(&self) -> Vec<StateTensor> {
        match self {
            Self::Full(host) => host.state(),
            Self::Codes(host) => host.state(),
        }
    }

    fn load_state(&mut self, tensors: Vec<StateTensor>) -> Result<(), StateError> {
        match self {
            Self::Full(host) => host.load_state(tensors),
            Self::Codes(host) => host.load_state(tensors),
        }
    }
}

/// Moments on the device.
#[derive(Debug)]
enum DeviceMoments {
    Full { first: Buffer, second: Buffer },
    Codes(Box<Codes>),
}

#[derive(Debug)]
struct Codes {
    ranges: (Buffer, usize),
    /// Of the parameters that keep moments of 32 bits.
    full: (Buffer, Buffer),
    first: Coded,
    second: Coded,
}

#[derive(Debug)]
struct Coded {
    codes: Buffer,
    largest: Buffer,
    table: Buffer,
    nearest: Buffer,
}

impl Coded {
    fn moment(&self) -> CodedMoment<'_> {
        CodedMoment { codes: &self.codes, largest: &self.largest, table: &self.table, nearest: &self.nearest }
    }
}

/// Parameters with their optimizer on a GPU.
#[derive(Debug)]
pub struct GpuAdamW {
    engine: Engine,
    /// Names, shapes and the form of the state; its values are those of the beginning.
    host: HostAdamW,
    params: Vec<(String, Vec<usize>)>,
    /// Where each parameter begins, and the end.
    starts: Vec<usize>,
    values: Buffer,
    sums: Buffer,
    moments: DeviceMoments,
    step: u64,
    clip: f32,
}

impl GpuAdamW {
    /// Takes over from an optimizer of the host with the same parameters. `None` if the engine is not on a GPU.
    ///
    /// # Errors
    /// If the device fails or has too little memory.
    pub fn new(engine: &Engine, params: &[Param], host: HostAdamW) -> Result<Option<Self>, DeviceError> {
        let Some(ops) = engine.update_ops() else { return Ok(None) };
        let starts = flat_offsets(params.iter().map(|p| p.value.len()));
        let total = starts[params.len()];
        catch(|| {
            let (moments, step) = upload(ops, &host, &starts);
            Some(Self {
                engine: engine.clone(),
                params: params.iter().map(|p| (p.name.clone(), p.shape.clone())).collect(),
                values: ops.upload(&together(params.iter().map(|p| p.value.as_slice()), &starts)),
                sums: ops.zeros(total),
                moments,
                step,
                clip: 1.0,
                starts,
                host,
            })
        })
    }

    /// The parameters, laid out as [`flat_offsets`] says.
    pub fn values(&self) -> &Buffer {
        &self.values
    }

    /// Where gradients are added, laid out as the parameters.
    pub fn sums(&mut self) -> &mut Buffer {
        &mut self.sums
    }

    /// Sets the sums of gradients to zero.
    ///
    /// # Errors
    /// If the device fails.
    pub fn begin(&mut self) -> Result<(), DeviceError> {
        catch(|| ops_of(&self.engine).clear(&mut self.sums))
    }

    /// The gradients' global norm; the next step scales them by `min(1, max_norm / (norm + 1e-6))` if `max_norm` is above 0, as
    /// [`super::clip_global_norm`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn clip(&mut self, max_norm: f64) -> Result<f64, DeviceError> {
        let norm = catch(|| ops_of(&self.engine).square_sum(&self.sums))?.sqrt();
        let coefficient = max_norm / (norm + 1e-6);
        self.clip = if max_norm > 0.0 && norm.is_finite() && coefficient < 1.0 { coefficient as f32 } else { 1.0 };
        Ok(norm)
    }

    /// One update at learning rate `lr`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn step(&mut self, lr: f64) -> Result<(), DeviceError> {
        self.step += 1;
        let settings = match &self.host {
            HostAdamW::Full(host) => &host.settings,
            HostAdamW::Codes(host) => &host.settings,
        };
        let numbers = numbers(&Scalars::new(settings, self.step, lr), self.clip);
        let Self { engine, values, sums, moments, .. } = self;
        let ops = ops_of(engine);
        catch(|| match moments {
            DeviceMoments::Full { first, second } => ops.adamw(values, sums, first, second, numbers),
            DeviceMoments::Codes(codes) => {
                let Codes { ranges: (ranges, count), full: (full_first, full_second), first, second } = &mut **codes;
                ops.adamw_8bit(values, sums, (ranges, *count), (full_first, full_second), first.moment(), second.moment(), numbers);
            }
        })
    }

    /// The parameters on the host.
    ///
    /// # Errors
    /// If the device fails.
    pub fn params(&self) -> Result<Vec<Param>, DeviceError> {
        let values = catch(|| self.engine.download(&self.values))?;
        let param = |((name, shape), start): (&(String, Vec<usize>), &usize)| {
            let len: usize = shape.iter().product();
            Param { name: name.clone(), shape: shape.clone(), value: values[*start..start + len].to_vec() }
        };
        Ok(self.params.iter().zip(&self.starts).map(param).collect())
    }

    /// As [`super::Optimizer::state`] of the host's optimizer.
    ///
    /// # Errors
    /// If the device fails.
    pub fn state(&self) -> Result<Vec<StateTensor>, DeviceError> {
        let mut host = self.host.clone();
        catch(|| download(&self.engine, &self.moments, &self.starts, self.step, &mut host))?;
        Ok(host.state())
    }

    /// As [`super::Optimizer::load_state`], and replaces the parameters.
    ///
    /// # Errors
    /// If the state does not fit (nothing is changed then), or the device fails.
    pub fn restore(&mut self, params: &[Param], state: Vec<StateTensor>) -> Result<(), RestoreError> {
        let mut host = self.host.clone();
        host.load_state(state)?;
        if let Some(made) = Self::new(&self.engine, params, host)? {
            *self = made;
        }
        Ok(())
    }
}

/// The operations of an engine with which a [`GpuAdamW`] was made.
fn ops_of(engine: &Engine) -> UpdateOps<'_> {
    engine.update_ops().unwrap_or_else(|| unreachable!("made with an engine on a GPU"))
}

/// Why a state could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn numbers(scalars: &Scalars, clip: f32) -> AdamWScalars {
    let Scalars { keep, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step_size } = *scalars;
    AdamWScalars { keep, one_minus_beta1, beta2, one_minus_beta2, root_correction2, epsilon, step_size, clip }
}

/// Tensors at their places, zeros between them.
fn together<'a>(tensors: impl Iterator<Item = &'a [f32]>, starts: &[usize]) -> Vec<f32> {
    let mut all = vec![0.0; starts.last().copied().unwrap_or(0)];
    tensors.zip(starts).for_each(|(values, start)| all[*start..start + values.len()].copy_from_slice(values));
    all
}

/// Moments and step of the host's optimizer.
fn upload(ops: UpdateOps<'_>, host: &HostAdamW, starts: &[usize]) -> (DeviceMoments, u64) {
    match host {
        HostAdamW::Full(host) => {
            let place = |part: fn(&Moments) -> &[f32]| ops.upload(&together(host.moments.iter().map(part), starts));
            (DeviceMoments::Full { first: place(|m| &m.first), second: place(|m| &m.second) }, host.step)
        }
        HostAdamW::Codes(host) => {
            let (mut ranges, mut full) = (Vec::new(), (Vec::new(), Vec::new()));
            let mut coded = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
            for (slot, start) in host.slots.iter().zip(starts) {
                let (len, state, is_full) = match slot {
                    Slot::Full(moments) => {
                        let state = full.0.len();
                        full.0.extend(&moments.first);
                        full.1.extend(&moments.second);
                        (moments.first.len(), state, 1)
                    }
                    Slot::Codes { first, second } => {
                        let state = coded[0].0.len();
                        for ((codes, largest), from) in coded.iter_mut().zip([first, second]) {
                            codes.extend(&from.codes);
                            codes.resize(codes.len().next_multiple_of(BLOCK), 0);
                            largest.extend(&from.absmax);
                        }
                        (first.codes.len(), state, 0)
                    }
                };
                ranges.extend((0..len).step_by(BLOCK).map(|i| Range {
                    values: (start + i) as i64,
                    state: (state + i) as i64,
                    count: BLOCK.min(len - i) as i32,
                    full: is_full,
                }));
            }
            let [first, second] = [(&coded[0], &host.tables.first), (&coded[1], &host.tables.second)].map(|((codes, largest), table)| {
                let (values, nearest) = table.tables();
                Coded { codes: ops.upload_bytes(codes), largest: ops.upload(largest), table: ops.upload(values), nearest: ops.upload_bytes(nearest) }
            });
            let full = (ops.upload(&full.0), ops.upload(&full.1));
            (DeviceMoments::Codes(Box::new(Codes { ranges: (ops.upload_ranges(&ranges), ranges.len()), full, first, second })), host.step)
        }
    }
}

/// Moments and step back into the host's optimizer.
fn download(engine: &Engine, moments: &DeviceMoments, starts: &[usize], step: u64, host: &mut HostAdamW) {
    match (moments, host) {
        (DeviceMoments::Full { first, second }, HostAdamW::Full(host)) => {
            host.step = step;
            let (first, second) = (engine.download(first), engine.download(second));
            for (moments, start) in host.moments.iter_mut().zip(starts) {
                let len = moments.first.len();
                moments.first.copy_from_slice(&first[*start..start + len]);
                moments.second.copy_from_slice(&second[*start..start + len]);
            }
        }
        (DeviceMoments::Codes(codes), HostAdamW::Codes(host)) => {
            host.step = step;
            let full = (engine.download(&codes.full.0), engine.download(&codes.full.1));
            let coded = [&codes.first, &codes.second].map(|moment| {
                let words = engine.download(&moment.codes);
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_bits().to_le_bytes()).collect();
                (bytes, engine.download(&moment.largest))
            });
            let (mut at_full, mut at_codes) = (0, 0);
            for slot in &mut host.slots {
                match slot {
                    Slot::Full(moments) => {
                        let len = moments.first.len();
                        moments.first.copy_from_slice(&full.0[at_full..at_full + len]);
                        moments.second.copy_from_slice(&full.1[at_full..at_full + len]);
                        at_full += len;
                    }
                    Slot::Codes { first, second } => {
                        let len = first.codes.len();
                        for (to, (codes, largest)) in [first, second].into_iter().zip(&coded) {
                            let Quantized { codes: to_codes, absmax } = to;
                            to_codes.copy_from_slice(&codes[at_codes..at_codes + len]);
                            let scales = absmax.len();
                            absmax.copy_from_slice(&largest[at_codes / BLOCK..][..scales]);
                        }
                        at_codes += len.next_multiple_of(BLOCK);
                    }
                }
            }
        }
        _ => unreachable!("made from the same"),
    }
}
