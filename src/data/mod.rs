//! Datasets, image transforms, the sampler and the content-addressed cache.

pub mod image;
mod jpeg;
mod resample;
pub mod sampler;
pub mod transform;
