//! The lengths of a dataset's captions, kept with what else is prepared: a resumed attempt fetches no tokenizer.

use safetensors::Dtype;

use super::{PrepareError, PreparedError};
use finetune_common::digest::Sha256Digest;
use finetune_data::cache::{CachedTensor, TensorCache};
use finetune_data::dataset::Dataset;
use finetune_model::ModelDir;
use finetune_model::text::{CaptionLength, CaptionLengths};
use finetune_store::model_source::ModelFolder;

/// Name of the tensor: CLIP's limit, then a pair for each caption.
const NAME: &str = "tokens";

/// CLIP's limit and the length of every caption, from the tokenizers in `folder`.
///
/// # Errors
/// If a tokenizer is missing or cannot be used.
pub(crate) fn lengths(folder: &ModelFolder, dataset: &Dataset) -> Result<(u32, Vec<CaptionLength>), PrepareError> {
    let tokenizers = CaptionLengths::open(&ModelDir::open(folder.folder())?, !folder.is_without_t5())?;
    let lengths = dataset.captions().map(|(_, caption)| tokenizers.of(caption)).collect::<Result<_, _>>()?;
    Ok((tokenizers.clip_limit(), lengths))
}

pub(super) fn keep(cache: &mut TensorCache, key: Sha256Digest, clip_limit: u32, lengths: &[CaptionLength]) -> Result<(), PrepareError> {
    let values: Vec<u32> = [clip_limit, 0].into_iter().chain(lengths.iter().flat_map(|length| [length.clip, length.t5])).collect();
    Ok(cache.put(key, &[(NAME, CachedTensor::u32(&values, &[lengths.len() + 1, 2])?)])?)
}

pub(super) fn kept(cache: &TensorCache, key: &Sha256Digest) -> Result<(u32, Vec<CaptionLength>), PrepareError> {
    let malformed = PreparedError::Malformed { what: "the captions' lengths" };
    let Some(tensor) = cache.get(key, NAME)?.filter(|tensor| tensor.dtype() == Dtype::U32 && matches!(tensor.shape(), [_, 2])) else {
        return Err(malformed.into());
    };
    let values: Vec<u32> = tensor.bytes().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let mut pairs = values.as_chunks().0.iter().map(|&[clip, t5]| CaptionLength { clip, t5 });
    let Some(CaptionLength { clip: limit, .. }) = pairs.next() else { return Err(malformed.into()) };
    Ok((limit, pairs.collect()))
}
