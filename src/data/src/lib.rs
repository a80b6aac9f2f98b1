//! Datasets, image transforms, the sampler and the content-addressed cache.

pub mod cache;
pub mod dataset;
pub mod image;
mod jpeg;
pub mod metadata;
mod pack;
pub mod problems;
mod resample;
pub mod sampler;
pub mod transform;
