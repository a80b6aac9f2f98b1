//! `model_index.json`: which parts a model says it has. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

/// The parts that a model's table of contents lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ModelIndex {
    parts: BTreeMap<String, Listed>,
    class: Option<String>,
}

/// What the table says about a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Listed {
    /// It is there: the class, as in `T5EncoderModel`.
    As(String),
    /// It is left out on purpose: `[null, null]`.
    LeftOut,
}

impl ModelIndex {
    /// Reads the file.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let fields: BTreeMap<String, Value> = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let listed = |value: &Value| match value {
            Value::Null => Some(Listed::LeftOut),
            Value::Array(pair) if pair.iter().all(Value::is_null) => Some(Listed::LeftOut),
            Value::Array(pair) => pair.last().and_then(Value::as_str).map(|class| Listed::As(class.to_owned())),
            // `_class_name`, versions and settings.
            _ => None,
        };
        let class = fields.get("_class_name").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { class, parts: fields.iter().filter_map(|(name, value)| Some((name.clone(), listed(value)?))).collect() })
    }

    /// The pipeline's class, as in `StableDiffusion3Pipeline`.
    pub(super) fn class(&self) -> Option<&str> {
        self.class.as_deref()
    }

    /// What it says about the folder of a part, if anything.
    pub(super) fn part(&self, folder: &str) -> Option<&Listed> {
        self.parts.get(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_listed_left_out_or_not_mentioned() {
        let text = r#"{"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder_3": [null, null], "tokenizer_3": null, "requires_safety_checker": false}"#;
        let index = ModelIndex::parse(text.as_bytes()).unwrap();
        assert_eq!(index.part("vae"), Some(&Listed::As("AutoencoderKL".into())));
        assert_eq!(index.part("text_encoder_3"), Some(&Listed::LeftOut));
        assert_eq!(index.part("tokenizer_3"), Some(&Listed::LeftOut));
        assert_eq!((index.part("transformer"), index.part("_class_name")), (None, None));
        assert_eq!((index.class(), ModelIndex::default().class()), (Some("StableDiffusion3Pipeline"), None));
        assert!(ModelIndex::parse(b"[]").is_err() && ModelIndex::parse(b"version https://git-lfs").is_err());
    }
}
