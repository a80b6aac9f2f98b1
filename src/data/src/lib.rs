//! Datasets, image transforms, the sampler and the content-addressed cache.

pub mod buckets;
pub mod cache;
mod caption_rules;
pub mod captions;
pub mod dataset;
pub mod image;
mod jpeg;
mod layout;
pub mod metadata;
mod pack;
mod png_exif;
pub mod problems;
mod resample;
pub mod sampler;
mod scan;
mod shard;
mod sniff;
mod tiff;
pub mod transform;
