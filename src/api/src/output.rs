//! Where the LoRA goes.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::default_values;

/// Where the LoRA goes, and in which formats.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OutputSpec {
    /// The folder; ends with "/".
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/')").message("must end with \"/\", as it is a folder"))]
    pub uri: String,
    /// File formats to write.
    #[serde(default = "formats")]
    #[schemars(length(min = 1, max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub formats: Vec<OutputFormat>,
    /// Number format of the values in the files: F16 after training in half precision, otherwise F32. It is what is written, not what is trained, which
    /// is F32 always.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<OutputDtype>,
    /// What to do where the folder already holds a result.
    #[serde(default)]
    pub existing: ExistingOutput,
}

/// A file format of the LoRA.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub enum OutputFormat {
    /// `pytorch_lora_weights.safetensors`, as diffusers and peft read it.
    Diffusers,
    /// A file with kohya's names, as ComfyUI reads it.
    Kohya,
}

/// Number format of the values in the LoRA's files; unless it is set, F16 after training in half precision, otherwise F32.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum OutputDtype {
    /// 32 bits, as trained.
    F32,
    /// 16 bits with 11 bits of precision.
    F16,
    /// 16 bits with the range of F32 and 8 bits of precision.
    BF16,
}

impl std::fmt::Display for OutputDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// What to do where the output folder already holds a result.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum ExistingOutput {
    /// Complete at once if it is the result of this very spec and dataset; else fail with `OutputExists`.
    #[default]
    ReuseIfComplete,
    /// Fail with `OutputExists`.
    Fail,
    /// Train and replace it.
    Overwrite,
}

default_values! {
    formats: Vec<OutputFormat> = vec![OutputFormat::Diffusers, OutputFormat::Kohya];
}
