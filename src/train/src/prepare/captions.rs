//! The lengths of a dataset's captions, kept with what else is prepared: a resumed attempt fetches no tokenizer.

use candle_core::{Device, Tensor};

use super::{PrepareError, PreparedError, prepared};
use finetune_common::digest::Sha256Digest;
use finetune_data::cache::TensorCache;
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
    let tensor = Tensor::from_vec(values, (lengths.len() + 1, 2), &Device::Cpu)?;
    Ok(cache.put(key, &[(NAME, &tensor)])?)
}

pub(super) fn kept(cache: &TensorCache, key: &Sha256Digest) -> Result<(u32, Vec<CaptionLength>), PrepareError> {
    let malformed = PreparedError::Malformed { what: "the captions' lengths" };
    let Some(tensor) = prepared::read(cache, key, NAME)? else { return Err(malformed.into()) };
    let rows = tensor.to_vec2::<u32>()?;
    let mut pairs = rows.iter().filter_map(|row| match row[..] {
        [clip, t5] => Some(CaptionLength { clip, t5 }),
        _ => None,
    });
    let Some(CaptionLength { clip: limit, .. }) = pairs.next() else { return Err(malformed.into()) };
    Ok((limit, pairs.collect()))
}
