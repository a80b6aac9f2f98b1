//! How long captions are, in tokens: for telling what the encoders do not read.

use super::TextError;
use super::tokenizer::CaptionTokenizer;
use crate::layout::{ModelDir, Part};

/// More tokens than any caption has: nothing is cut.
const NO_LIMIT: usize = 1 << 24;

/// Tokens of a caption, begin and end included, before anything is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptionLength {
    /// CLIP's; the larger one of both encoders'.
    pub clip: u32,
    /// T5's; 0 if the model has no T5.
    pub t5: u32,
}

/// Counts the tokens of captions. Reads the tokenizers alone.
#[derive(Debug)]
pub struct CaptionLengths {
    clip: [CaptionTokenizer; 2],
    t5: Option<CaptionTokenizer>,
}

impl CaptionLengths {
    /// Reads the tokenizers of a model, T5's only `with_t5`.
    ///
    /// # Errors
    /// If a tokenizer is missing or cannot be understood.
    pub fn open(model: &ModelDir, with_t5: bool) -> Result<Self, TextError> {
        Ok(Self {
            clip: [CaptionTokenizer::clip(model, Part::Tokenizer)?, CaptionTokenizer::clip(model, Part::Tokenizer2)?],
            t5: with_t5.then(|| CaptionTokenizer::t5(model, NO_LIMIT)).transpose()?,
        })
    }

    /// Tokens that each CLIP encoder reads, begin and end included.
    pub fn clip_limit(&self) -> u32 {
        self.clip[0].length() as u32
    }

    /// The length of a caption.
    ///
    /// # Errors
    /// If a tokenizer refuses the caption.
    pub fn of(&self, caption: &str) -> Result<CaptionLength, TextError> {
        let clip = self.clip[0].tokens(caption)?.max(self.clip[1].tokens(caption)?);
        let t5 = self.t5.as_ref().map_or(Ok(0), |t5| t5.tokens(caption))?;
        Ok(CaptionLength { clip: clip as u32, t5: t5 as u32 })
    }
}
