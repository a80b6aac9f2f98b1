//! Datasets, image transforms, the sampler and the content-addressed cache.

pub mod sampler;
