//! Where the base model comes from.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::StorageSpec;
use super::defaults::default_values;

/// The base model.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the model is; exactly one kind of source.
    pub source: ModelSource,
    /// Volume that keeps downloaded files and prepared data between the jobs of a namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<ModelCache>,
}

/// Where a model is: a folder in diffusers' layout, or one with single files. Exactly one of `huggingFace`, `objectStore` and `persistentVolumeClaim` is set.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.huggingFace), has(self.objectStore), has(self.persistentVolumeClaim)].filter(x, x).size() == 1")
    .message("set exactly one of huggingFace, objectStore and persistentVolumeClaim"))]
pub struct ModelSource {
    /// A repository on the Hugging Face hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugging_face: Option<HuggingFaceSource>,
    /// A folder or a single file in an object store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object_store: Option<ObjectStoreSource>,
    /// A folder on a volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<PersistentVolumeClaimSource>,
    /// Single files, as `sd3.5_medium.safetensors`: which is which, where the source has a `model_index.json` or several files for a part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<ModelFiles>,
}

/// Which file of a model's source holds which part: paths within the source. A part that is not named is looked for in the files that are.
#[derive(Clone, Debug, Default, Deserialize, Eq, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.withoutT5) && self.withoutT5 && (has(self.t5) || has(self.t5Tokenizer)))")
    .message("t5 and t5Tokenizer have no use with withoutT5"))]
pub struct ModelFiles {
    /// The transformer, alone or with other parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(WEIGHTS_RULE).message(WEIGHTS_MESSAGE))]
    pub transformer: Option<String>,
    /// The autoencoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(WEIGHTS_RULE).message(WEIGHTS_MESSAGE))]
    pub vae: Option<String>,
    /// CLIP-L, as `clip_l.safetensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(WEIGHTS_RULE).message(WEIGHTS_MESSAGE))]
    pub clip_l: Option<String>,
    /// CLIP-G, as `clip_g.safetensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(WEIGHTS_RULE).message(WEIGHTS_MESSAGE))]
    pub clip_g: Option<String>,
    /// T5, as `t5xxl_fp16.safetensors` or `t5xxl_fp8_e4m3fn_scaled.safetensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(WEIGHTS_RULE).message(WEIGHTS_MESSAGE))]
    pub t5: Option<String>,
    /// `tokenizer.json` or `spiece.model` of T5, where the source has no folder `tokenizer_3/`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new(TOKENIZER_RULE).message(TOKENIZER_MESSAGE))]
    pub t5_tokenizer: Option<String>,
    /// Train without T5, whether a file holds it or not: zeros take its place.
    #[serde(default)]
    pub without_t5: bool,
}

const TOKENIZER_RULE: &str = "self.matches('[.](json|model)$') && !self.matches('(^|/)[.]?[.]?(/|$)')";
const TOKENIZER_MESSAGE: &str = "must be a path within the source, of a tokenizer.json or spiece.model";
const WEIGHTS_RULE: &str = "self.endsWith('.safetensors') && !self.matches('(^|/)[.]?[.]?(/|$)')";
const WEIGHTS_MESSAGE: &str = "must be a path within the source, of a .safetensors file";

/// A repository on the Hugging Face hub at a fixed commit.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// Repository, as `organisation/name`.
    #[schemars(length(max = 200))]
    #[x_kube(validation = Rule::new("self.matches('^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$')").message("must be organisation/name"))]
    pub repo: String,
    /// Commit, 40 hexadecimal digits. Branches are refused: they may change between two attempts.
    #[schemars(length(max = 40))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9a-f]{40}$')").message("must be a commit of 40 hexadecimal digits, since a branch or tag may change between two attempts"))]
    pub revision: String,
    /// Secret in the job's namespace with an access token; needed where a licence must be accepted first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyRef>,
}

/// A key of a Secret in the job's namespace.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
    /// Key within the Secret.
    #[serde(default = "token")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// A folder or a single file in an object store.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStoreSource {
    /// The folder, with "/" at the end; or a single file with the transformer, as `s3://models/sd3_medium.safetensors`.
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new(super::storage::URI_RULE).message(super::storage::URI_MESSAGE))]
    #[x_kube(validation = Rule::new("self.endsWith('/') || self.endsWith('.safetensors')").message("must end with \"/\", as a folder, or with \".safetensors\", as a single file"))]
    pub uri: String,
    /// File in that folder with lines of `<sha256>  <path>`; each file that is read is checked against it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"))]
    pub sha256_manifest: Option<String>,
    /// How to reach this store, where it differs from `spec.storage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageSpec>,
}

/// A folder on a PersistentVolumeClaim of the job's namespace.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PersistentVolumeClaimSource {
    /// Name of the claim.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub claim_name: String,
    /// Folder on the volume; the volume's root where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.matches('(^|/)[.][.]?(/|$)')").message("must be a relative path without \"..\""))]
    pub sub_path: Option<String>,
    /// Mount read-only.
    #[serde(default = "yes")]
    pub read_only: bool,
}

/// Volume shared by the jobs of a namespace.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelCache {
    /// The claim; the trainer writes to it.
    pub persistent_volume_claim: CacheClaim,
}

/// A writable claim of the job's namespace.
#[derive(Clone, Debug, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheClaim {
    /// Name of the claim.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub claim_name: String,
    /// Folder on the volume; the volume's root where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("!self.startsWith('/') && !self.matches('(^|/)[.][.]?(/|$)')").message("must be a relative path without \"..\""))]
    pub sub_path: Option<String>,
}

default_values! {
    token: String = "token".to_owned();
    yes: bool = true;
}
