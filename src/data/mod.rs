//! Datasets, image transforms, the sampler and the content-addressed cache.

pub mod dataset;
pub mod image;
mod jpeg;
pub mod metadata;
pub mod problems;
mod resample;
pub mod sampler;
pub mod transform;
