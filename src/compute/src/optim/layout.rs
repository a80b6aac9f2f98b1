//! Where parameters lie in a flat buffer.

use std::ops::Range;

use super::Param;
use crate::kernels::flat_offsets;

/// Names, shapes and places of the parameters, fixed when an optimizer is made.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    tensors: Vec<(String, Vec<usize>)>,
    offsets: Vec<usize>,
}

impl Layout {
    pub(super) fn of(params: &[Param]) -> Self {
        let tensors = params.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        Self { tensors, offsets: flat_offsets(params.iter().map(|p| p.value.len())) }
    }

    /// Values of the whole buffer, with the zeros between tensors.
    pub(super) fn len(&self) -> usize {
        self.offsets[self.tensors.len()]
    }

    /// Each tensor's name and place, in order.
    pub(super) fn spans(&self) -> impl Iterator<Item = (&str, Range<usize>)> {
        let len = |shape: &[usize]| shape.iter().product::<usize>();
        self.tensors.iter().zip(&self.offsets).map(move |((name, shape), &start)| (name.as_str(), start..start + len(shape)))
    }

    /// The tensors at their places, zeros between them.
    pub(super) fn join<'a>(&self, tensors: impl Iterator<Item = &'a [f32]>) -> Vec<f32> {
        let mut all = vec![0.0; self.len()];
        tensors.zip(self.spans()).for_each(|(values, (_, span))| all[span].copy_from_slice(values));
        all
    }

    /// The values of parameters at their places. Panics on a caller's mistake: a mixed-up order would train the wrong tensors without a sign.
    pub(super) fn values(&self, params: &[Param]) -> Vec<f32> {
        assert_eq!(self.tensors.len(), params.len(), "parameters should be those of the optimizer");
        for ((name, span), param) in self.spans().zip(params) {
            assert!(name == param.name && span.len() == param.value.len(), "parameter {name:?} should have {} values", span.len());
        }
        self.join(params.iter().map(|p| p.value.as_slice()))
    }

    /// Parameters of values at their places.
    pub(super) fn params(&self, values: &[f32]) -> Vec<Param> {
        let shapes = self.tensors.iter().map(|(_, shape)| shape.clone());
        self.spans().zip(shapes).map(|((name, span), shape)| Param { name: name.to_owned(), shape, value: values[span].to_vec() }).collect()
    }
}
