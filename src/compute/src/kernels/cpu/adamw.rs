//! Updates of AdamW with f32 moments, and with moments as codes of 8 bits.

use rayon::prelude::*;

use crate::kernels::training::{AdamWScalars, BLOCK, GRID, Range};

/// Values of a task: elementwise work, so that no result depends on it.
const CHUNK: usize = 16 * BLOCK;

/// One update with f32 moments, in the order of `torch.optim.AdamW`.
pub(crate) fn update(values: &mut [f32], grads: &[f32], first: &mut [f32], second: &mut [f32], s: AdamWScalars) {
    assert!(values.len() == grads.len() && values.len() == first.len() && values.len() == second.len(), "should be alike");
    let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    values.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).zip(moments).for_each(|((values, grads), (first, second))| one(values, grads, first, second, s));
}

fn one(values: &mut [f32], grads: &[f32], first: &mut [f32], second: &mut [f32], s: AdamWScalars) {
    for (((p, g), m), v) in values.iter_mut().zip(grads).zip(first).zip(second) {
        let g = g * s.clip;
        *p *= s.keep;
        *m += s.one_minus_beta1 * (g - *m);
        *v = *v * s.beta2 + s.one_minus_beta2 * g * g;
        *p -= s.step_size * *m / (v.sqrt() / s.root_correction2 + s.epsilon);
    }
}

/// A moment as codes: the codes, the largest magnitude of each [`BLOCK`], the value of each code, the code of each point of the grid.
pub(crate) struct Coded<'a> {
    pub(crate) codes: &'a mut [u8],
    pub(crate) largest: &'a mut [f32],
    pub(crate) table: &'a [f32],
    pub(crate) nearest: &'a [u8],
}

/// Moments of a range.
enum State<'a> {
    Full(&'a mut [f32], &'a mut [f32]),
    Codes((&'a mut [u8], &'a mut f32), (&'a mut [u8], &'a mut f32)),
}

/// Parts of a slice, from its beginning on.
struct Cut<'a, T> {
    rest: &'a mut [T],
    at: usize,
}

impl<'a, T> Cut<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self { rest: slice, at: 0 }
    }

    /// `count` values from `start` on, which lies after what was taken before.
    fn take(&mut self, start: usize, count: usize) -> &'a mut [T] {
        let (_, rest) = std::mem::take(&mut self.rest).split_at_mut(start - self.at);
        let (part, rest) = rest.split_at_mut(count);
        (self.rest, self.at) = (rest, start + count);
        part
    }
}

/// One update with moments as codes, or as f32 in the ranges that ask for it.
pub(crate) fn update_8bit(
    values: &mut [f32],
    grads: &[f32],
    ranges: &[Range],
    (full_first, full_second): (&mut [f32], &mut [f32]),
    [first, second]: [Coded<'_>; 2],
    s: AdamWScalars,
) {
    let Coded { codes: first_codes, largest: first_largest, table: first_table, nearest: first_nearest } = first;
    let Coded { codes: second_codes, largest: second_largest, table: second_table, nearest: second_nearest } = second;
    let (mut values, mut full_first, mut full_second) = (Cut::new(values), Cut::new(full_first), Cut::new(full_second));
    let (mut first_codes, mut second_codes) = (Cut::new(first_codes), Cut::new(second_codes));
    let (mut first_largest, mut second_largest) = (first_largest.iter_mut(), second_largest.iter_mut());
    let mut tasks = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (start, state, count) = (range.values as usize, range.state as usize, range.count as usize);
        let state = if range.full == 1 {
            State::Full(full_first.take(state, count), full_second.take(state, count))
        } else {
            let (Some(a), Some(b)) = (first_largest.next(), second_largest.next()) else { break };
            State::Codes((first_codes.take(state, count), a), (second_codes.take(state, count), b))
        };
        tasks.push((values.take(start, count), &grads[start..start + count], state));
    }
    assert_eq!(tasks.len(), ranges.len(), "should have a scale for every range of codes");
    tasks.into_par_iter().with_min_len(16).for_each(|(values, grads, state)| match state {
        State::Full(first, second) => one(values, grads, first, second, s),
        State::Codes((first_codes, first_largest), (second_codes, second_largest)) => {
            let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
            let (first, second) = (&mut first[..values.len()], &mut second[..values.len()]);
            decode(first_codes, *first_largest, first_table, first);
            decode(second_codes, *second_largest, second_table, second);
            one(values, grads, first, second, s);
            *first_largest = encode(first, first_nearest, first_codes);
            *second_largest = encode(second, second_nearest, second_codes);
        }
    });
}

fn decode(codes: &[u8], largest: f32, table: &[f32], values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = table[usize::from(*code)] * largest;
    }
}

/// The codes of a block and its largest magnitude; an all-zero block has codes 0.
fn encode(values: &[f32], nearest: &[u8], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
    if largest == 0.0 {
        codes.fill(0);
        return largest;
    }
    let inverse = 1.0 / largest;
    for (code, v) in codes.iter_mut().zip(values) {
        let point = ((v * inverse).clamp(-1.0, 1.0) + 1.0) * 0.5 * (GRID - 1) as f32 + 0.5;
        *code = nearest[(point as usize).min(GRID - 1)];
    }
    largest
}

/// Σ x² in f64 over a fixed partition.
pub(crate) fn square_sum(x: &[f32]) -> f64 {
    let sums: Vec<f64> = x.par_chunks(CHUNK).map(|x| x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()).collect();
    sums.iter().sum()
}

/// `sum += factor · x`.
pub(crate) fn add_scaled(sum: &mut [f32], x: &[f32], factor: f32) {
    assert_eq!(sum.len(), x.len(), "should be alike");
    sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(sum, x)| sum.iter_mut().zip(x).for_each(|(s, x)| *s += factor * x));
}
