//! The training pictures and their captions.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::default_values;

/// The dataset: a folder with pictures and a `metadata.jsonl`.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetSpec {
    /// The folder; ends with "/".
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/')").message("must end with \"/\", as it is a folder"))]
    pub uri: String,
    /// File in that folder with one JSON object per line: `{"file_name": "image_01.png", "caption": "..."}`.
    #[serde(default = "metadata_file")]
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"))]
    pub metadata_file: String,
    /// Key of the caption in each line.
    #[serde(default = "caption_column")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self != 'file_name'").message("is the picture's name and cannot be the caption"))]
    pub caption_column: String,
    /// How often each picture occurs in an epoch; each occurrence has its own crop and flip.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 100_000))]
    pub repeats: u32,
    /// Pins the dataset: digest of the metadata file and of every picture, as in `status.datasetDigest`. A difference fails the job with `DatasetChanged`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71), regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub expected_digest: Option<String>,
    /// What to do with a line or picture that cannot be used.
    #[serde(default)]
    pub on_bad_sample: OnBadSample,
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
    metadata_file: String = "metadata.jsonl".to_owned();
    caption_column: String = "caption".to_owned();
    one: u32 = 1;
}
