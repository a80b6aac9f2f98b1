//! T5's tokenizer from SentencePiece's own file, `spiece.model`, built as transformers builds it.

use prost::Message;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::{sequence::Sequence, whitespace::WhitespaceSplit};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

/// `ModelProto` of `sentencepiece_model.proto`, as far as it is read.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", tag = "2")]
    precompiled_charsmap: Vec<u8>,
}

/// `TrainerSpec.ModelType`.
const UNIGRAM: i32 = 1;
/// `SentencePiece.Type`: pieces that are found in a text before anything else.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The tokenizer in `bytes`. `end` is appended to every caption; the sentinels `<extra_id_N>` follow the file's own pieces, the last one first.
///
/// # Errors
/// If the file is not SentencePiece's, or not a unigram model with the token `end`.
pub(super) fn tokenizer(bytes: &[u8], end: &str, extra_ids: usize) -> Result<Tokenizer, tokenizers::Error> {
    let ModelProto { pieces, trainer, normalizer } = ModelProto::decode(bytes)?;
    if trainer.as_ref().and_then(|t| t.model_type).is_some_and(|kind| kind != UNIGRAM) {
        return Err("it is not a unigram model, as T5's is".into());
    }
    let unknown = usize::try_from(trainer.and_then(|t| t.unk_id).unwrap_or(0))?;
    let special = |piece: &Piece| matches!(piece.kind, Some(CONTROL | USER_DEFINED));
    let mut added: Vec<AddedToken> = pieces.iter().filter(|p| special(p)).map(|p| AddedToken::from(p.text.clone(), true).normalized(false)).collect();
    added.extend(pieces.get(unknown).map(|p| AddedToken::from(p.text.clone(), true).normalized(false)));
    added.extend((0..extra_ids).rev().map(|n| AddedToken::from(format!("<extra_id_{n}>"), true).normalized(false)));

    let vocabulary = pieces.into_iter().map(|p| (p.text, f64::from(p.score))).collect();
    let mut inner = Tokenizer::new(Unigram::from(vocabulary, Some(unknown), false)?);
    let charsmap = normalizer.map(|n| n.precompiled_charsmap).unwrap_or_default();
    if !charsmap.is_empty() {
        inner.with_normalizer(Some(Precompiled::from(&charsmap)?));
    }
    let words = Metaspace::new('▁', PrependScheme::Always, true);
    inner.with_pre_tokenizer(Some(Sequence::new(vec![WhitespaceSplit.into(), words.into()])));
    let id = inner.token_to_id(end).ok_or_else(|| format!("it has no piece {end:?}"))?;
    let template = TemplateProcessing::builder().try_single(format!("$A {end}"))?.special_tokens(vec![(end, id)]).build()?;
    inner.with_post_processor(Some(template));
    inner.add_special_tokens(&added);
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids of transformers 5.24, whose `T5Tokenizer` read the same file: `tests/golden/make_sentencepiece.py`.
    #[test]
    fn ids_are_those_of_transformers() {
        #[derive(serde::Deserialize)]
        struct Row {
            caption: String,
            ids: Vec<u32>,
        }
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(GOLDEN);
        let tokenizer = tokenizer(&std::fs::read(folder.join("spiece.model")).unwrap(), "</s>", 100).unwrap();
        let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        assert!(rows.len() > 25);
        for Row { caption, ids } in rows {
            assert_eq!(tokenizer.encode_fast(caption.as_str(), true).unwrap().get_ids(), ids, "{caption:?}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        let model = |kind| ModelProto {
            pieces: ["<unk>", "</s>", "a"].map(|text| Piece { text: text.into(), score: 0.0, kind: None }).to_vec(),
            trainer: Some(TrainerSpec { model_type: Some(kind), unk_id: None }),
            normalizer: None,
        };
        let bytes = model(UNIGRAM).encode_to_vec();
        assert!(tokenizer(&bytes, "</s>", 0).is_ok());
        for (bytes, end, part) in [
            (bytes.clone(), "</e>", "no piece"),
            (model(2).encode_to_vec(), "</s>", "unigram"),
            (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "</s>", ""),
            (bytes[..bytes.len() - 1].to_vec(), "</s>", ""),
            (Vec::new(), "</s>", ""),
        ] {
            let error = tokenizer(&bytes, end, 0).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    const GOLDEN: &str = "../../tests/golden/sentencepiece";
}
