//! Captions to token ids: CLIP's byte-level BPE from `vocab.json` and `merges.txt` or from `tokenizer.json`, T5's unigram model from
//! `tokenizer.json` or from `spiece.model`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence, replace::ReplacePattern};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, sequence::Sequence as PreSequence, split::Split, split::SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, TruncationDirection, TruncationParams, TruncationStrategy};

use super::{TextError, sentencepiece};
use crate::layout::{LayoutError, ModelDir, Part};

/// The words of CLIP: contractions, runs of letters, single digits, runs of anything else but white space.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// T5's sentinels, where `tokenizer_config.json` gives no number.
const EXTRA_IDS: usize = 100;

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
    /// T5's sentinels.
    extra_ids: Option<usize>,
}

/// `tokenizer.json` as far as CLIP's is read: normalisation and words are the same in every file, and built here.
#[derive(Deserialize)]
struct TokenizerFile {
    model: BPE,
    #[serde(default)]
    added_tokens: Vec<Special>,
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

/// The vocabulary and merges of a CLIP tokenizer, and the special tokens that its file lists: from `vocab.json` and `merges.txt`, else from
/// `tokenizer.json`, which is all that transformers 5 writes.
fn read_clip(model: &ModelDir, part: Part, unknown: String) -> Result<(BPE, Vec<Special>), TextError> {
    const SUFFIX: &str = "</w>";
    let dir = model.path(part);
    let [vocabulary, merges, whole] = ["vocab.json", "merges.txt", "tokenizer.json"].map(|name| dir.join(name));
    if vocabulary.is_file() && merges.is_file() {
        let failed = |source| TextError::Tokenizer { path: dir.clone(), source };
        let files = BPE::from_file(&vocabulary.to_string_lossy(), &merges.to_string_lossy());
        return Ok((files.unk_token(unknown).end_of_word_suffix(SUFFIX.into()).build().map_err(failed)?, Vec::new()));
    }
    if !whole.is_file() {
        let (path, name) = if vocabulary.is_file() { (merges, "merges.txt") } else { (vocabulary, "vocab.json") };
        return Err(LayoutError::Missing { path, part: format!("{0}/{name}, or {0}/tokenizer.json in its place", part.folder()) }.into());
    }
    let TokenizerFile { model: mut bpe, added_tokens } = model.json(part, "tokenizer.json")?;
    if bpe.end_of_word_suffix.as_deref() != Some(SUFFIX) {
        let problem = format!("its words end in {:?}, those of CLIP in {SUFFIX:?}", bpe.end_of_word_suffix.unwrap_or_default());
        return Err(LayoutError::Unsupported { path: whole, problem }.into());
    }
    bpe.unk_token = Some(unknown);
    Ok((bpe, added_tokens))
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
        let text = |special: &Option<Special>, default: &str| special.as_ref().map_or(default, Special::content).to_owned();
        let end = text(&config.special.eos_token, "<|endoftext|>");
        let begin = text(&config.special.bos_token, "<|startoftext|>");
        let unknown = text(&config.special.unk_token, "<|endoftext|>");
        let pad = text(&config.special.pad_token, "<|endoftext|>");

        let (words_and_merges, listed) = read_clip(model, part, unknown)?;
        let mut inner = Tokenizer::new(words_and_merges);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(failed)?;
        inner.with_normalizer(Some(Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])));
        let words = Split::new(SplitPattern::Regex(CLIP_WORDS.into()), SplitDelimiterBehavior::Removed, true).map_err(failed)?;
        inner.with_pre_tokenizer(Some(PreSequence::new(vec![words.into(), ByteLevel::default().add_prefix_space(false).into()])));
        // Special tokens are found in captions before anything else: an exclamation mark that serves as padding keeps its id.
        let named = [&config.special.bos_token, &config.special.eos_token, &config.special.unk_token, &config.special.pad_token];
        let mut added: Vec<AddedToken> = config.added_tokens_decoder.values().chain(&listed).map(Special::token).collect();
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
    /// If `tokenizer.json` and `spiece.model` are missing or cannot be understood, or the padding token is not in the vocabulary.
    pub fn t5(model: &ModelDir, length: usize) -> Result<Self, TextError> {
        let part = Part::Tokenizer3;
        let dir = model.path(part);
        let config = read_config(model, part)?;
        let [path, pieces] = ["tokenizer.json", "spiece.model"].map(|name| dir.join(name));
        let (path, inner) = if path.is_file() {
            let inner = Tokenizer::from_file(&path);
            (path, inner)
        } else if pieces.is_file() {
            let end = config.special.eos_token.as_ref().map_or("</s>", Special::content);
            let bytes = std::fs::read(&pieces).map_err(|source| LayoutError::Read { path: pieces.clone(), source })?;
            let inner = sentencepiece::tokenizer(&bytes, end, config.extra_ids.unwrap_or(EXTRA_IDS));
            (pieces, inner)
        } else {
            return Err(LayoutError::Missing { path, part: format!("{0}/tokenizer.json, or {0}/spiece.model in its place", part.folder()) }.into());
        };
        let failed = |source| TextError::Tokenizer { path: path.clone(), source };
        let mut inner = inner.map_err(failed)?;
        inner
            .with_truncation(Some(TruncationParams {
                max_length: length,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
                direction: TruncationDirection::Right,
            }))
            .map_err(failed)?;
        inner.with_padding(None);
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

#[cfg(test)]
mod tests {
    use super::*;

    const MICRO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/micro-sd3");
    const CAPTIONS: [&str; 9] =
        ["", "a red ball!", "Café №5, don't  stop", "日本 🤖", "<|endoftext|> x", "a\u{301}b", "!!", "x\ty\n", "The quick brown FOX 123"];

    /// A folder with the tokenizer `part` of the fixture, changed.
    fn changed(part: Part, change: impl FnOnce(&std::path::Path)) -> (tempfile::TempDir, ModelDir) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(part.folder());
        std::fs::create_dir(&folder).unwrap();
        for file in std::fs::read_dir(std::path::Path::new(MICRO).join(part.folder())).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        change(&folder);
        let model = ModelDir::open(root.path()).unwrap();
        (root, model)
    }

    fn take(path: std::path::PathBuf) -> String {
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        text
    }

    /// As transformers 5 writes it (merges in pairs), and as 4 did (merges as text).
    #[test]
    fn a_tokenizer_json_alone_is_the_two_files() {
        for part in [Part::Tokenizer, Part::Tokenizer2] {
            let (_kept, model) = changed(part, |_| {});
            let two = CaptionTokenizer::clip(&model, part).unwrap();
            for pairs in [true, false] {
                let (_kept, model) = changed(part, |folder| {
                    let vocabulary: serde_json::Value = serde_json::from_str(&take(folder.join("vocab.json"))).unwrap();
                    let text = take(folder.join("merges.txt"));
                    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("#version") && !l.is_empty()).collect();
                    let merges =
                        if pairs { lines.iter().map(|l| serde_json::json!(l.split(' ').collect::<Vec<_>>())).collect() } else { serde_json::json!(lines) };
                    let model = serde_json::json!({"type": "BPE", "unk_token": "<|endoftext|>", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
                        "vocab": vocabulary, "merges": merges});
                    let special = serde_json::json!([{"id": 0, "content": "<|endoftext|>", "normalized": false, "special": true}]);
                    let file = serde_json::json!({"version": "1.0", "added_tokens": special, "normalizer": null, "model": model});
                    std::fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
                });
                let one = CaptionTokenizer::clip(&model, part).unwrap();
                for caption in CAPTIONS {
                    assert_eq!(one.encode(caption).unwrap(), two.encode(caption).unwrap(), "{caption:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_missing_or_foreign_is_named() {
        let clip = |change: &dyn Fn(&std::path::Path)| {
            let (_kept, model) = changed(Part::Tokenizer, change);
            CaptionTokenizer::clip(&model, Part::Tokenizer).unwrap_err().to_string()
        };
        let without = |names: &'static [&str]| move |folder: &std::path::Path| names.iter().for_each(|name| std::fs::remove_file(folder.join(name)).unwrap());
        assert!(clip(&without(&["vocab.json"])).contains("tokenizer/vocab.json, or tokenizer/tokenizer.json"));
        assert!(clip(&without(&["merges.txt"])).contains("tokenizer/merges.txt, or tokenizer/tokenizer.json"));
        let foreign = |folder: &std::path::Path| {
            std::fs::remove_file(folder.join("vocab.json")).unwrap();
            std::fs::write(folder.join("tokenizer.json"), r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#).unwrap();
        };
        assert!(clip(&foreign).contains("</w>"));
        let (_kept, model) = changed(Part::Tokenizer3, without(&["tokenizer.json"]));
        assert!(CaptionTokenizer::t5(&model, 9).unwrap_err().to_string().contains("tokenizer_3/tokenizer.json, or tokenizer_3/spiece.model"));
    }

    #[test]
    fn sentencepieces_file_alone_is_read() {
        let (_kept, model) = changed(Part::Tokenizer3, |folder| {
            std::fs::remove_file(folder.join("tokenizer.json")).unwrap();
            std::fs::copy(std::path::Path::new(MICRO).join("../../golden/sentencepiece/spiece.model"), folder.join("spiece.model")).unwrap();
        });
        // "a red ball", the end, padding.
        assert_eq!(CaptionTokenizer::t5(&model, 6).unwrap().encode("a red ball").unwrap(), [52, 43, 22, 1, 0, 0]);
        assert_eq!(CaptionTokenizer::t5(&model, 2).unwrap().encode("a red ball").unwrap(), [52, 1]);
    }
}
