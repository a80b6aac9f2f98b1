//! Captions to prompt embeddings: three tokenizers, CLIP-L, CLIP-G and T5, one after the other and each streamed layer by
//! layer, so that one layer's weights are in memory at a time.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;

use super::digest::{DigestError, component_digest};
use super::layout::{LayoutError, ModelDir, Part};
use super::weights::{Weights, WeightsError};
use finetune_common::digest::{Sha256Digest, sha256_parts};
use finetune_common::tensor::{HostTensor, ShapeError};
use finetune_compute::kernels::{DeviceError, Engine, catch};
use finetune_compute::with_device;

mod clip;
mod layers;
mod lengths;
mod sentencepiece;
mod t5;
mod tokenizer;

pub use clip::ClipConfig;
use layers::Batching;
pub use lengths::{CaptionLength, CaptionLengths};
pub use t5::T5Config;
pub use tokenizer::CaptionTokenizer;

/// Why captions could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model folder is not as it should be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The weights are not as they should be.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An encoder's identity could not be made.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// A tokenizer cannot be read, or refuses a caption.
    #[error("failed to use the tokenizer {path}")]
    Tokenizer {
        /// Its folder or file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: tokenizers::Error,
    },
    /// A special token is not in the vocabulary.
    #[error("the special token {token:?} is not in the vocabulary of the tokenizer {path}")]
    SpecialToken {
        /// The tokenizer's folder.
        path: PathBuf,
        /// The token.
        token: String,
    },
    /// The tokenizer knows more tokens than the encoder.
    #[error("token {id} is outside the vocabulary of {vocabulary} of {path}: tokenizer and text encoder do not belong together")]
    TokenOutOfRange {
        /// The token's id.
        id: u32,
        /// The encoder's number of ids.
        vocabulary: usize,
        /// The encoder's weights.
        path: PathBuf,
    },
    /// The tokenizer gives longer sequences than the encoder takes.
    #[error("the tokenizer gives {tokens} tokens, {path} takes {limit}: tokenizer and text encoder do not belong together")]
    TooManyTokens {
        /// The tokenizer's length.
        tokens: usize,
        /// The encoder's length.
        limit: usize,
        /// The encoder's weights.
        path: PathBuf,
    },
    /// The encoders' widths do not fit together.
    #[error("the CLIP encoders together are {clip} wide, but prompt embeddings {joint}: the encoders do not belong to one model")]
    Width {
        /// Width of both CLIP encoders' states.
        clip: usize,
        /// Width of the prompt embeddings.
        joint: usize,
    },
    /// `max_sequence_length` is not usable.
    #[error("the maximum sequence length is {0}, it must lie between 1 and 512")]
    SequenceLength(usize),
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The GPU failed.
    #[error("failed to compute prompt embeddings")]
    Device(#[from] DeviceError),
    /// The caller asked to stop.
    #[error("encoding of captions was stopped")]
    Stopped,
}

/// The MMDiT's input for a caption.
#[derive(Debug, Clone)]
pub struct PromptEmbedding {
    /// [77 + S, J]: CLIP's states padded with zeros to width J, then T5's.
    pub embeds: HostTensor,
    /// `[P]`: the pooled outputs of CLIP-L and CLIP-G.
    pub pooled: HostTensor,
}

/// Shape of prompt embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptShape {
    /// Tokens: 77 of CLIP and S of T5.
    pub tokens: usize,
    /// Width J of the states.
    pub width: usize,
    /// Width P of the pooled output.
    pub pooled: usize,
}

/// One of the text encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoder {
    /// `text_encoder`.
    ClipL,
    /// `text_encoder_2`.
    ClipG,
    /// `text_encoder_3`.
    T5,
}

/// How far encoding has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeProgress {
    /// The encoder at work.
    pub encoder: Encoder,
    /// Its layers that are done.
    pub layers_done: usize,
    /// Its layers.
    pub layers: usize,
    /// Distinct captions that are wholly done.
    pub captions_done: usize,
    /// Distinct captions.
    pub captions: usize,
}

/// Token ids of a caption.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// CLIP-L's.
    pub clip_l: Vec<u32>,
    /// CLIP-G's.
    pub clip_g: Vec<u32>,
    /// T5's; empty if the model has no T5.
    pub t5: Vec<u32>,
}

/// Called with the progress; `Break` stops the encoding with [`TextError::Stopped`].
pub type OnProgress<'a> = &'a mut dyn FnMut(EncodeProgress) -> ControlFlow<()>;

/// Values of states that wait between layers: bounds the captions of one pass through the encoders (1 GiB of f32).
const GROUP_VALUES: usize = 1 << 28;

/// The text encoders of a model folder.
#[derive(Debug)]
pub struct PromptEncoder {
    model: ModelDir,
    engine: Engine,
    length: usize,
    tokenizers: [CaptionTokenizer; 2],
    tokenizer_3: Option<CaptionTokenizer>,
    clip: [ClipConfig; 2],
    t5: Option<T5Config>,
    width: usize,
}

impl PromptEncoder {
    /// Reads tokenizers and configurations; weights are opened when captions are encoded.
    ///
    /// `max_sequence_length` is T5's number of tokens S. A model that leaves `text_encoder_3` out gets zeros in T5's place.
    ///
    /// # Errors
    /// If a part is missing, cannot be understood or does not fit the others.
    pub fn open(model: &ModelDir, max_sequence_length: usize, engine: &Engine) -> Result<Self, TextError> {
        #[derive(Deserialize)]
        struct TransformerConfig {
            joint_attention_dim: usize,
        }
        if !(1..=512).contains(&max_sequence_length) {
            return Err(TextError::SequenceLength(max_sequence_length));
        }
        let clip: [ClipConfig; 2] = [model.config(Part::TextEncoder)?, model.config(Part::TextEncoder2)?];
        let t5: Option<T5Config> = if model.has(Part::TextEncoder3)? { Some(model.config(Part::TextEncoder3)?) } else { None };
        let width = match &t5 {
            Some(t5) => t5.d_model,
            None => model.json::<TransformerConfig>(Part::Transformer, "config.json")?.joint_attention_dim,
        };
        let clip_width = clip[0].hidden_size + clip[1].hidden_size;
        if clip_width > width {
            return Err(TextError::Width { clip: clip_width, joint: width });
        }
        Ok(Self {
            tokenizers: [CaptionTokenizer::clip(model, Part::Tokenizer)?, CaptionTokenizer::clip(model, Part::Tokenizer2)?],
            tokenizer_3: t5.as_ref().map(|_| CaptionTokenizer::t5(model, max_sequence_length)).transpose()?,
            model: model.clone(),
            engine: engine.clone(),
            length: max_sequence_length,
            clip,
            t5,
            width,
        })
    }

    /// Shape of each caption's embedding.
    pub fn shape(&self) -> PromptShape {
        PromptShape { tokens: self.tokenizers[0].length() + self.length, width: self.width, pooled: self.clip[0].projection_dim + self.clip[1].projection_dim }
    }

    /// What decides embeddings besides the caption: the contents of tokenizers and encoders, and the sequence length.
    /// `memory` is as in [`component_digest`].
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn digest(&self, memory: Option<&Path>) -> Result<Sha256Digest, TextError> {
        let mut parts = vec![Part::Tokenizer, Part::Tokenizer2, Part::TextEncoder, Part::TextEncoder2];
        if self.t5.is_some() {
            parts.extend([Part::Tokenizer3, Part::TextEncoder3]);
        }
        let mut all = b"prompt embedding 2".to_vec();
        for size in [self.length, self.width] {
            all.extend((size as u64).to_le_bytes());
        }
        for part in parts {
            all.extend(component_digest(&self.model.path(part), memory)?);
        }
        Ok(sha256_parts([&all[..]]))
    }

    /// The token ids of a caption.
    ///
    /// # Errors
    /// If a tokenizer refuses the caption.
    pub fn tokenize(&self, caption: &str) -> Result<TokenIds, TextError> {
        Ok(TokenIds {
            clip_l: self.tokenizers[0].encode(caption)?,
            clip_g: self.tokenizers[1].encode(caption)?,
            t5: self.tokenizer_3.as_ref().map_or(Ok(Vec::new()), |t| t.encode(caption))?,
        })
    }

    /// The embedding of every caption, in the captions' order. Equal captions are encoded once.
    ///
    /// All results are in memory at once: [`Self::encode_each`] hands them over one by one.
    ///
    /// # Errors
    /// If a part of the model is not as it should be, memory is short, or `progress` asked to stop.
    pub fn encode(&self, captions: &[String], progress: OnProgress) -> Result<Vec<PromptEmbedding>, TextError> {
        let mut found = HashMap::new();
        self.encode_each::<TextError>(captions, progress, &mut |caption, embedding| {
            found.insert(caption.to_owned(), embedding);
            Ok(())
        })?;
        captions.iter().map(|caption| found.get(caption.as_str()).cloned().ok_or(TextError::Stopped)).collect()
    }

    /// Calls `sink` once for each distinct caption, in the order of first appearance. Memory is bounded whatever the
    /// number of captions.
    ///
    /// # Errors
    /// If a part of the model is not as it should be, memory is short, `progress` asked to stop, or the sink failed.
    pub fn encode_each<E: From<TextError>>(
        &self,
        captions: &[String],
        progress: OnProgress,
        sink: &mut dyn FnMut(&str, PromptEmbedding) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut seen = std::collections::HashSet::new();
        let distinct: Vec<&str> = captions.iter().map(String::as_str).filter(|c| seen.insert(*c)).collect();
        let shape = self.shape();
        let per_group = self.whole_passes((GROUP_VALUES / (shape.tokens * shape.width)).max(1));
        for (group_index, group) in distinct.chunks(per_group).enumerate() {
            let mut tell = |encoder, layers_done, layers| {
                let told = EncodeProgress { encoder, layers_done, layers, captions_done: group_index * per_group, captions: distinct.len() };
                if progress(told).is_break() { Err(TextError::Stopped) } else { Ok(()) }
            };
            for (caption, embedding) in group.iter().zip(self.encode_group(group, &mut tell)?) {
                sink(caption, embedding)?;
            }
        }
        // No other stage asks for buffers of these sizes.
        self.engine.trim();
        Ok(())
    }

    /// At most this many captions: as many as keep the passes over T5's weights full. With a last pass of few captions nearly nothing is done.
    fn whole_passes(&self, captions: usize) -> usize {
        let Some(t5) = &self.t5 else { return captions };
        let pass = Batching::new(self.engine.is_batch_invariant(), self.length, t5.d_model).pass();
        if captions > pass { captions / pass * pass } else { captions }
    }

    fn encode_group(&self, captions: &[&str], tell: &mut dyn FnMut(Encoder, usize, usize) -> Result<(), TextError>) -> Result<Vec<PromptEmbedding>, TextError> {
        let ids = captions.par_iter().map(|c| self.tokenize(c)).collect::<Result<Vec<_>, _>>()?;
        let PromptShape { tokens, width, pooled } = self.shape();
        // Each encoder writes its part where it stays.
        let mut embeds: Vec<Vec<f32>> = ids.par_iter().map(|_| vec![0.0; tokens * width]).collect();
        let mut pooled: Vec<Vec<f32>> = ids.iter().map(|_| Vec::with_capacity(pooled)).collect();
        self.run_clip(0, &ids.iter().map(|i| i.clip_l.clone()).collect::<Vec<_>>(), (&mut embeds, 0), &mut pooled, tell)?;
        self.run_clip(1, &ids.iter().map(|i| i.clip_g.clone()).collect::<Vec<_>>(), (&mut embeds, self.clip[0].hidden_size), &mut pooled, tell)?;
        self.run_t5(&ids.iter().map(|i| i.t5.clone()).collect::<Vec<_>>(), &mut embeds, tell)?;
        let join = |(embeds, pooled): (Vec<f32>, Vec<f32>)| {
            let length = pooled.len();
            Ok(PromptEmbedding { embeds: HostTensor::new(embeds, [tokens, width])?, pooled: HostTensor::new(pooled, [length])? })
        };
        embeds.into_iter().zip(pooled).map(join).collect()
    }

    /// Each caption's states [77, hidden] into its first rows from this column on; its pooled output [projection] after what is there.
    fn run_clip(
        &self,
        which: usize,
        ids: &[Vec<u32>],
        (embeds, column): (&mut [Vec<f32>], usize),
        pooled: &mut [Vec<f32>],
        tell: &mut dyn FnMut(Encoder, usize, usize) -> Result<(), TextError>,
    ) -> Result<(), TextError> {
        let (encoder, part) = [(Encoder::ClipL, Part::TextEncoder), (Encoder::ClipG, Part::TextEncoder2)][which];
        let config = &self.clip[which];
        let weights = Weights::open(&self.model.path(part))?;
        let mut captions = embeds.iter_mut().zip(pooled);
        let progress = &mut |done| tell(encoder, done, config.num_hidden_layers);
        let outputs = catch(|| with_device!(&self.engine, device => clip::encode(device, &weights, config, ids, progress)))??;
        for output in outputs {
            let targets: Vec<_> = captions.by_ref().take(output.hidden.len()).collect();
            targets.into_par_iter().zip(output.hidden).zip(output.pooled).for_each(|(((embeds, pooled), states), pool)| {
                for (row, states) in embeds.chunks_exact_mut(self.width).zip(states.chunks_exact(config.hidden_size)) {
                    row[column..column + config.hidden_size].copy_from_slice(states);
                }
                pooled.extend(pool);
            });
        }
        Ok(())
    }

    /// Each caption's states [S, J] into its rows after CLIP's; without T5 they stay zeros.
    fn run_t5(&self, ids: &[Vec<u32>], embeds: &mut [Vec<f32>], tell: &mut dyn FnMut(Encoder, usize, usize) -> Result<(), TextError>) -> Result<(), TextError> {
        let Some(config) = &self.t5 else { return Ok(()) };
        let first = self.tokenizers[0].length() * self.width;
        let mut places: Vec<&mut [f32]> = embeds.iter_mut().map(|embeds| &mut embeds[first..]).collect();
        let weights = Weights::open(&self.model.path(Part::TextEncoder3))?;
        let progress = &mut |done| tell(Encoder::T5, done, config.num_layers);
        catch(|| with_device!(&self.engine, device => t5::encode(device, &weights, config, ids, &mut places, progress)))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(case: &str) -> ModelDir {
        ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases").join(case).join("model")).unwrap()
    }

    fn values(e: &PromptEmbedding) -> (Vec<f32>, Vec<f32>) {
        (e.embeds.values().to_vec(), e.pooled.values().to_vec())
    }

    fn go(_: EncodeProgress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The cache is filled by whichever run comes first: a caption's numbers must be the same, bit for bit, alone and in any
    /// company.
    #[test]
    fn captions_do_not_depend_on_their_company() {
        for (case, length) in [("encode-prompt-old-eos", 77), ("encode-prompt-old-eos", 5), ("encode-prompt-old-eos", 1), ("encode-prompt-without-t5", 7)] {
            let encoder = PromptEncoder::open(&golden(case), length, &Engine::cpu()).unwrap();
            let captions: Vec<String> = (0..37).map(|i| format!("picture {i} of a cat, {}", "word ".repeat(i % 5))).collect();
            let together = encoder.encode(&captions, &mut go).unwrap();
            let shape = encoder.shape();
            for i in [0, 1, 15, 16, 36] {
                let alone = encoder.encode(&captions[i..=i], &mut go).unwrap();
                assert_eq!(values(&alone[0]), values(&together[i]), "{case} {length} {i}");
                assert_eq!((alone[0].embeds.shape(), alone[0].pooled.shape()), (&[shape.tokens, shape.width][..], &[shape.pooled][..]));
            }
            assert_ne!(values(&together[0]), values(&together[1]));
        }
    }

    #[test]
    fn equal_captions_are_encoded_once_and_the_order_is_kept() {
        let encoder = PromptEncoder::open(&golden("encode-prompt-without-t5"), 3, &Engine::cpu()).unwrap();
        let captions = ["b", "a", "b", ""].map(str::to_owned);
        let mut seen = Vec::new();
        encoder
            .encode_each::<TextError>(&captions, &mut go, &mut |caption, _| {
                seen.push(caption.to_owned());
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, ["b", "a", ""]);
        let all = encoder.encode(&captions, &mut go).unwrap();
        assert_eq!(values(&all[0]), values(&all[2]));
        // Without T5 its tokens are zeros.
        assert!(all[0].embeds.part(77..80).unwrap().values().iter().all(|v| *v == 0.0));
        assert!(encoder.encode(&[], &mut go).unwrap().is_empty());
    }

    #[test]
    fn progress_reaches_the_end_and_stopping_stops() {
        let encoder = PromptEncoder::open(&golden("encode-prompt-old-eos"), 9, &Engine::cpu()).unwrap();
        let mut seen = Vec::new();
        encoder
            .encode(&["x".into()], &mut |p| {
                seen.push((p.encoder, p.layers_done, p.layers));
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(seen.last(), Some(&(Encoder::T5, 2, 2)));
        assert!(seen.contains(&(Encoder::ClipG, 3, 3)));
        let stopped = encoder.encode(&["x".into()], &mut |p| if p.encoder == Encoder::T5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
        assert!(matches!(stopped, Err(TextError::Stopped)));
    }

    #[test]
    fn identity_follows_length_and_files() {
        let model = golden("encode-prompt-old-eos");
        let digest = |model: &ModelDir, length| PromptEncoder::open(model, length, &Engine::cpu()).unwrap().digest(None).unwrap();
        assert_eq!(digest(&model, 9), digest(&model, 9));
        assert_ne!(digest(&model, 9), digest(&model, 10));
        assert_ne!(digest(&model, 9), digest(&golden("encode-prompt-without-t5"), 9));
    }

    #[test]
    fn bad_models_get_one_clear_error() {
        let model = golden("encode-prompt-old-eos");
        let copy = tempfile::tempdir().unwrap();
        for part in [Part::Tokenizer, Part::Tokenizer2, Part::Tokenizer3, Part::TextEncoder, Part::TextEncoder2, Part::TextEncoder3] {
            let to = copy.path().join(part.folder());
            std::fs::create_dir(&to).unwrap();
            for file in std::fs::read_dir(model.path(part)).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
            }
        }
        let open = || PromptEncoder::open(&ModelDir::open(copy.path()).unwrap(), 9, &Engine::cpu());
        let text = |error: &dyn std::error::Error| std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ");
        open().unwrap();
        assert!(matches!(PromptEncoder::open(&model, 0, &Engine::cpu()), Err(TextError::SequenceLength(0))));

        let config = copy.path().join("text_encoder_3/config.json");
        let good = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, good.replace("gated-gelu", "relu")).unwrap();
        assert!(text(&open().unwrap_err()).contains("gated-gelu"));
        std::fs::write(&config, good.replace("\"d_model\": 24", "\"d_model\": 16")).unwrap();
        assert!(text(&open().unwrap_err()).contains("do not belong to one model"));
        std::fs::write(&config, good.replace("\"d_ff\": 40", "\"d_ff\": 41")).unwrap();
        assert!(text(&open().unwrap().encode(&["x".into()], &mut go).unwrap_err()).contains("do not belong to this config.json"));
        std::fs::write(&config, good).unwrap();

        std::fs::remove_file(copy.path().join("tokenizer_2/merges.txt")).unwrap();
        assert!(text(&open().unwrap_err()).contains("tokenizer_2/merges.txt"));
    }
}
