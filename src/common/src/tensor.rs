//! Tensors in host memory, as they pass between data, model, trainer and sampler: f32 values, row-major, with their shape.
//!
//! What computes works on a device's buffers; nothing here computes beyond what puts batches together.

use std::ops::Range;

/// Why tensors cannot be made or put together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// The number of values is not the shape's.
    #[error("failed to make a tensor: {values} values do not fill the shape {shape:?}")]
    Length {
        /// The shape.
        shape: Vec<usize>,
        /// The number of values.
        values: usize,
    },
    /// Tensors that should be of one shape differ.
    #[error("failed to put tensors together: one has the shape {one:?}, another {other:?}")]
    Unlike {
        /// The first one's.
        one: Vec<usize>,
        /// The other's.
        other: Vec<usize>,
    },
    /// The tensor has not these samples.
    #[error("failed to take samples {range:?} of a tensor of shape {shape:?}")]
    Range {
        /// The samples.
        range: Range<usize>,
        /// The shape.
        shape: Vec<usize>,
    },
}

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostTensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl HostTensor {
    /// A tensor of these values.
    ///
    /// # Errors
    /// If they do not fill the shape.
    pub fn new(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> Result<Self, ShapeError> {
        let shape = shape.into();
        if shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d)) == Some(values.len()) {
            return Ok(Self { shape, values });
        }
        Err(ShapeError::Length { shape, values: values.len() })
    }

    /// A tensor that has this value everywhere.
    pub fn full(value: f32, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        Self { values: vec![value; shape.iter().product()], shape }
    }

    /// Zeros.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        Self::full(0.0, shape)
    }

    /// A vector.
    pub fn vector(values: Vec<f32>) -> Self {
        Self { shape: vec![values.len()], values }
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values alone.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// The first dimension: the number of samples of a batch.
    pub fn samples(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// The same values in another shape.
    ///
    /// # Errors
    /// If they do not fill it.
    pub fn reshaped(self, shape: impl Into<Vec<usize>>) -> Result<Self, ShapeError> {
        Self::new(self.values, shape)
    }

    /// Tensors of one shape along a new first dimension.
    ///
    /// # Errors
    /// If their shapes differ.
    pub fn stack(tensors: &[&Self]) -> Result<Self, ShapeError> {
        let mut shape = vec![tensors.len()];
        shape.extend(tensors.first().map(|t| t.shape()).unwrap_or_default());
        let mut values = Vec::with_capacity(shape.iter().product());
        for tensor in tensors {
            tensor.alike(tensors[0])?;
            values.extend_from_slice(&tensor.values);
        }
        Ok(Self { shape, values })
    }

    /// Batches one after another, along the first dimension.
    ///
    /// # Errors
    /// If their other dimensions differ.
    pub fn concat(batches: &[&Self]) -> Result<Self, ShapeError> {
        let Some(first) = batches.first() else { return Ok(Self::default()) };
        let mut values = Vec::with_capacity(batches.iter().map(|b| b.values.len()).sum());
        for batch in batches {
            if batch.shape.get(1..) != first.shape.get(1..) {
                return Err(ShapeError::Unlike { one: first.shape.clone(), other: batch.shape.clone() });
            }
            values.extend_from_slice(&batch.values);
        }
        let mut shape = first.shape.clone();
        if let Some(samples) = shape.first_mut() {
            *samples = batches.iter().map(|b| b.samples()).sum();
        }
        Ok(Self { shape, values })
    }

    /// Samples of a batch: a part along the first dimension.
    ///
    /// # Errors
    /// If there are not as many.
    pub fn part(&self, range: Range<usize>) -> Result<Self, ShapeError> {
        if range.start > range.end || range.end > self.samples() {
            return Err(ShapeError::Range { range, shape: self.shape.clone() });
        }
        let mut shape = self.shape.clone();
        let size: usize = shape.iter().skip(1).product();
        if let Some(samples) = shape.first_mut() {
            *samples = range.len();
        }
        Ok(Self { shape, values: self.values[range.start * size..range.end * size].to_vec() })
    }

    /// `f` of each value.
    #[must_use]
    pub fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        self.values.iter_mut().for_each(|v| *v = f(*v));
        self
    }

    /// `f` of each value and the other's.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn zip(mut self, other: &Self, f: impl Fn(f32, f32) -> f32) -> Result<Self, ShapeError> {
        self.alike(other)?;
        self.values.iter_mut().zip(&other.values).for_each(|(v, o)| *v = f(*v, *o));
        Ok(self)
    }

    /// Whether no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.values.iter().all(|v| v.is_finite())
    }

    fn alike(&self, other: &Self) -> Result<(), ShapeError> {
        if self.shape == other.shape { Ok(()) } else { Err(ShapeError::Unlike { one: other.shape.clone(), other: self.shape.clone() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(first: f32, shape: &[usize]) -> HostTensor {
        HostTensor::new((0..shape.iter().product()).map(|i| first + i as f32).collect(), shape).unwrap()
    }

    #[test]
    fn values_fill_the_shape() {
        assert_eq!(HostTensor::new(vec![0.0; 6], [2, 3]).unwrap().shape(), [2, 3]);
        assert_eq!(HostTensor::new(vec![1.0], []).unwrap().shape(), [0_usize; 0]);
        assert_eq!(HostTensor::new(vec![0.0; 5], [2, 3]), Err(ShapeError::Length { shape: vec![2, 3], values: 5 }));
        assert!(HostTensor::new(vec![], [usize::MAX, 2]).is_err());
    }

    #[test]
    fn batches_are_stacked_joined_and_taken_apart() {
        let (a, b) = (tensor(0.0, &[2, 2]), tensor(10.0, &[2, 2]));
        let stacked = HostTensor::stack(&[&a, &b]).unwrap();
        assert_eq!((stacked.shape(), stacked.values()), (&[2, 2, 2][..], &[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0][..]));
        let joined = HostTensor::concat(&[&a, &b, &tensor(20.0, &[1, 2])]).unwrap();
        assert_eq!(joined.shape(), [5, 2]);
        assert_eq!(joined.part(2..4).unwrap(), b);
        assert_eq!(joined.part(4..5).unwrap(), tensor(20.0, &[1, 2]));
        for range in [4..6, 6..6] {
            assert!(joined.part(range).is_err());
        }
        assert!(HostTensor::stack(&[&a, &tensor(0.0, &[4])]).is_err());
        assert!(HostTensor::concat(&[&a, &tensor(0.0, &[2, 3])]).is_err());
        assert_eq!(HostTensor::stack(&[]).unwrap().shape(), [0]);
    }

    #[test]
    fn values_are_computed_one_by_one() {
        let a = tensor(1.0, &[3]);
        assert_eq!(a.clone().map(|x| x * 2.0).values(), [2.0, 4.0, 6.0]);
        assert_eq!(a.clone().zip(&a, |x, y| x - y).unwrap().values(), [0.0; 3]);
        assert!(a.clone().zip(&tensor(0.0, &[1, 3]), |x, _| x).is_err());
        assert!(a.is_finite() && !a.map(|x| x / 0.0).is_finite());
    }
}
