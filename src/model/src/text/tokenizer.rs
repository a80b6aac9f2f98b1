//! Captions to token ids: CLIP's byte-level BPE from `vocab.json` and `merges.txt`, T5's unigram model from `tokenizer.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence, replace::ReplacePattern};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, sequence::Sequence as PreSequence, split::Split, split::SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, TruncationDirection, TruncationParams, TruncationStrategy};

use super::TextError;
use crate::layout::{LayoutError, ModelDir, Part};

/// The words of CLIP: contractions, runs of letters, single digits, runs of anything else but white space.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Token ids of captions, all of one length: cut off and padded as the reference does.
#[derive(Debug)]
pub struct CaptionTokenizer {
    inner: Tokenizer,
    part: Part,
    kind: Kind,
    length: usize,
    pad: u32,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Begin and end are added here.
    Clip { begin: u32, end: u32 },
    /// The end is added by `tokenizer.json`'s own post-processor.
    T5,
}

/// A special token in `special_tokens_map.json` or `tokenizer_config.json`: a string, or an object with flags.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Full {
        content: String,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        normalized: bool,
    },
}

impl Special {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Full { content, .. } => content,
        }
    }

    fn token(&self) -> AddedToken {
        match self {
            Self::Text(content) => AddedToken::from(content.clone(), true),
            Self::Full { content, lstrip, rstrip, single_word, normalized } => {
                AddedToken::from(content.clone(), true).lstrip(*lstrip).rstrip(*rstrip).single_word(*single_word).normalized(*normalized)
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[expect(clippy::struct_field_names, reason = "names in the file")]
struct SpecialTokens {
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    unk_token: Option<Special>,
    pad_token: Option<Special>,
}

#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    #[serde(flatten)]
    special: SpecialTokens,
    /// A float where the tokenizer knows no limit.
    model_max_length: Option<f64>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, Special>,
}

/// Reads `tokenizer_config.json` with the gaps filled from `special_tokens_map.json`; both are optional.
fn read_config(model: &ModelDir, part: Part) -> Result<TokenizerConfig, LayoutError> {
    fn optional<T: Default + serde::de::DeserializeOwned>(model: &ModelDir, part: Part, name: &str) -> Result<T, LayoutError> {
        if model.path(part).join(name).exists() { model.json(part, name) } else { Ok(T::default()) }
    }
    let mut config: TokenizerConfig = optional(model, part, "tokenizer_config.json")?;
    let map: SpecialTokens = optional(model, part, "special_tokens_map.json")?;
    let own = &mut config.special;
    own.bos_token = own.bos_token.take().or(map.bos_token);
    own.eos_token = own.eos_token.take().or(map.eos_token);
    own.unk_token = own.unk_token.take().or(map.unk_token);
    own.pad_token = own.pad_token.take().or(map.pad_token);
    Ok(config)
}

impl CaptionTokenizer {
    /// CLIP's tokenizer in the sub-folder `part`. Ids come as begin, caption, end, then padding up to the tokenizer's
    /// `model_max_length` (77).
    ///
    /// # Errors
    /// If a file is missing or cannot be understood, or a special token is not in the vocabulary.
    pub fn clip(model: &ModelDir, part: Part) -> Result<Self, TextError> {
        let dir = model.path(part);
        let config = read_config(model, part)?;
        let failed = |source| TextError::Tokenizer { path: dir.clone(), source };
        let file = |name: &str| -> Result<String, TextError> {
            let path = dir.join(name);
            if !path.is_file() {
                return Err(LayoutError::Missing { path, part: format!("{}/{name}", part.folder()) }.into());
            }
            Ok(path.to_string_lossy().into_owned())
        };
        let text = |special: &Option<Special>, default: &str| special.as_ref().map_or(default, Special::content).to_owned();
        let end = text(&config.special.eos_token, "<|endoftext|>");
        let begin = text(&config.special.bos_token, "<|startoftext|>");
        let unknown = text(&config.special.unk_token, "<|endoftext|>");
        let pad = text(&config.special.pad_token, "<|endoftext|>");

        let model = BPE::from_file(&file("vocab.json")?, &file("merges.txt")?).unk_token(unknown).end_of_word_suffix("</w>".into()).build().map_err(failed)?;
        let mut inner = Tokenizer::new(model);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(failed)?;
        inner.with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])));
        let words = Split::new(SplitPattern::Regex(CLIP_WORDS.into()), SplitDelimiterBehavior::Removed, true).map_err(failed)?;
        inner.with_pre_tokenizer(Some(PreSequence::new(vec![words.into(), ByteLevel::default().add_prefix_space(false).into()])));
        // Special tokens are found in captions before anything else: an exclamation mark that serves as padding keeps its id.
        let named = [&config.special.bos_token, &config.special.eos_token, &config.special.unk_token, &config.special.pad_token];
        let mut added: Vec<AddedToken> = config.added_tokens_decoder.values().map(Special::token).collect();
        for special in named.into_iter().flatten() {
            if !added.iter().any(|a| a.content == special.content()) {
                added.push(special.token());
            }
        }
        // A token that is not in the vocabulary would get an id that the model does not have.
        if let Some(stranger) = added.iter().find(|a| inner.token_to_id(&a.content).is_none()) {
            return Err(TextError::SpecialToken { path: dir, token: stranger.content.clone() });
        }
        inner.add_special_tokens(&added);

        let id = |token: &str| inner.token_to_id(token).ok_or_else(|| TextError::SpecialToken { path: dir.clone(), token: token.to_owned() });
        let (kind, pad) = (Kind::Clip { begin: id(&begin)?, end: id(&end)? }, id(&pad)?);
        let length = config.model_max_length.filter(|l| (3.0..=4096.0).contains(l)).map_or(77, |l| l as usize);
        Ok(Self { inner, part, kind, length, pad })
    }

    /// T5's tokenizer. Ids come as caption, end, then padding up to `length`.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or cannot be understood, or the padding token is not in the vocabulary.
    pub fn t5(model: &ModelDir, length: usize) -> Result<Self, TextError> {
        let part = Part::Tokenizer3;
        let (dir, path) = (model.path(part), model.path(part).join("tokenizer.json"));
        if !path.is_file() {
            return Err(LayoutError::Missing { path, part: format!("{}/tokenizer.json", part.folder()) }.into());
        }
        let failed = |source| TextError::Tokenizer { path: path.clone(), source };
        let mut inner = Tokenizer::from_file(&path).map_err(failed)?;
        inner
            .with_truncation(Some(TruncationParams {
                max_length: length,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
                direction: TruncationDirection::Right,
            }))
            .map_err(failed)?;
        inner.with_padding(None);
        let config = read_config(model, part)?;
        let pad = config.special.pad_token.as_ref().map_or("<pad>", Special::content);
        let pad = inner.token_to_id(pad).ok_or_else(|| TextError::SpecialToken { path: dir, token: pad.to_owned() })?;
        Ok(Self { inner, part, kind: Kind::T5, length, pad })
    }

    /// The number of ids of each caption.
    pub fn length(&self) -> usize {
        self.length
    }

    /// How many tokens a caption has, begin and end included: at most [`Self::length`] of T5's, all of CLIP's.
    ///
    /// # Errors
    /// If the tokenizer refuses the caption.
    pub fn tokens(&self, caption: &str) -> Result<usize, TextError> {
        let failed = |source| TextError::Tokenizer { path: PathBuf::from(self.part.folder()), source };
        Ok(match self.kind {
            Kind::Clip { .. } => self.inner.encode_fast(caption, false).map_err(failed)?.len() + 2,
            Kind::T5 => self.inner.encode_fast(caption, true).map_err(failed)?.len(),
        })
    }

    /// The ids of a caption, [`Self::length`] of them.
    ///
    /// # Errors
    /// If the tokenizer refuses the caption.
    pub fn encode(&self, caption: &str) -> Result<Vec<u32>, TextError> {
        let failed = |source| TextError::Tokenizer { path: PathBuf::from(self.part.folder()), source };
        let mut ids = match self.kind {
            Kind::Clip { begin, end } => {
                let encoding = self.inner.encode_fast(caption, false).map_err(failed)?;
                let words = &encoding.get_ids()[..encoding.len().min(self.length - 2)];
                [&[begin], words, &[end]].concat()
            }
            Kind::T5 => self.inner.encode_fast(caption, true).map_err(failed)?.get_ids().to_vec(),
        };
        ids.resize(self.length, self.pad);
        Ok(ids)
    }
}
