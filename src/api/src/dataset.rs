//! The training pictures and their captions.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::default_values;
use super::{Decimal, bounds};

/// The dataset: a folder with pictures and their captions.
///
/// A picture's caption is that of its line in a metadata file, else the text of the `.txt` beside it, else `caption`.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.imageColumn) || self.imageColumn != self.captionColumn").message("imageColumn and captionColumn must differ"))]
pub struct DatasetSpec {
    /// The folder; ends with "/".
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/')").message("must end with \"/\", as it is a folder"))]
    pub uri: String,
    /// Caption of every picture that has none of its own: of all of them, where the folder has neither a metadata file nor `.txt` files.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096), regex(pattern = r"\S"))]
    pub caption: Option<String>,
    /// Name of the metadata file, in that folder and in those below: a JSON object per line, `{"file_name": "image_01.png", "caption": "..."}`,
    /// or a table where it ends with ".csv", or a Parquet file with the pictures in it. By default `metadata.jsonl` and `metadata.csv` are looked for,
    /// and Parquet files where the folder has neither these nor pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"))]
    pub metadata_file: Option<String>,
    /// Key (or column) of the picture's path in the metadata file, relative to that file; of a Parquet file, the column of the pictures themselves.
    /// By default `file_name`, and `image` in a Parquet file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub image_column: Option<String>,
    /// Key (or column) of the caption in the metadata file: a text, or a list of texts of which each epoch draws one.
    #[serde(default = "caption_column")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self != 'file_name'").message("is the picture's name and cannot be the caption"))]
    pub caption_column: String,
    /// What is done to the captions before they are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captions: Option<CaptionsSpec>,
    /// How often each picture occurs in an epoch; each occurrence has its own crop and flip.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 100_000))]
    pub repeats: u32,
    /// Pins the dataset: digest of its captions and of every picture, as in `status.datasetDigest`. A difference fails the job with `DatasetChanged`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub expected_digest: Option<String>,
    /// What to do with a line or picture that cannot be used.
    #[serde(default)]
    pub on_bad_sample: OnBadSample,
}

/// What is done to the captions before they are trained. Held-out captions get the trigger word, and nothing else.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.triggerPosition == 'Front' || has(self.triggerWord)").message("triggerPosition Behind needs triggerWord"))]
#[x_kube(validation = Rule::new("self.keepTags == 0 || self.tagOrders > 1").message("keepTags needs tagOrders of 2 or more"))]
pub struct CaptionsSpec {
    /// A word (or a few) that every caption gets, with ", " between it and the caption. It stays where it is when tags are shuffled.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^\S(.*\S)?$"))]
    pub trigger_word: Option<String>,
    /// Where the trigger word goes.
    #[serde(default)]
    pub trigger_position: TriggerPosition,
    /// Orders in which each caption's tags, which are what stands between its commas, are trained: the order as written, and shuffled ones. Each epoch
    /// draws one of them. Every order is encoded and kept beside the checkpoints, with 2.5 MB at 77 tokens.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub tag_orders: u32,
    /// Number of first tags that are not shuffled.
    #[serde(default)]
    #[schemars(range(max = 64))]
    pub keep_tags: u32,
    /// Share of the draws that are trained with the empty caption, which guidance compares with. Each draw is decided by itself.
    #[serde(default = "no_dropout")]
    #[x_kube(validation = bounds::CAPTION_DROPOUT.rule())]
    pub dropout: Decimal,
}

/// Where the trigger word goes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TriggerPosition {
    /// Before the caption.
    #[default]
    Front,
    /// After the caption.
    Behind,
}

/// What to do with a line or picture that cannot be used.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum OnBadSample {
    /// Fail the job and list every problem.
    #[default]
    Fail,
    /// Leave the sample out and report how many.
    Skip,
}

default_values! {
    caption_column: String = "caption".to_owned();
    one: u32 = 1;
    no_dropout: Decimal = Decimal::new("0");
}
