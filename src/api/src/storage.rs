//! How trainer pods reach object stores.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::default_values;

/// What an object-store URI may look like. User names, queries and fragments are refused: they carry passwords and signatures.
pub(super) const URI_RULE: &str = r"self.matches('^(s3|gs|az)://[a-z0-9][a-z0-9._-]{1,221}(/[^@?#\\\\\\x00-\\x1f\\x7f]*)?$') && !self.matches('/[.][.]?(/|$)')";
/// Its message.
pub(super) const URI_MESSAGE: &str = "must be s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH without user, query, fragment or \"..\", the bucket of 2 to 222 lower-case letters, digits, \".\", \"_\" and \"-\"";

/// How trainer pods reach the buckets. What is absent comes from the operator's defaults.
#[derive(Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.addressingStyle) || self.addressingStyle != 'VirtualHost' || !has(self.endpoint) || !self.endpoint.matches('^https?://([0-9.]+|\\\\[.*)(:[0-9]+)?(/|$)')")
    .message("addressingStyle VirtualHost needs an endpoint with a host name: no bucket can stand before an IP address"))]
pub struct StorageSpec {
    /// URL of an S3-compatible server; the provider's own where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = Rule::new("self.matches('^https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[^@?#]*)?$') || self.matches('^https?://\\\\[[0-9a-fA-F:]+\\\\](:[0-9]+)?(/[^@?#]*)?$')")
        .message("must be an http:// or https:// URL without user, query or fragment"))]
    pub endpoint: Option<String>,
    /// Where the bucket's name goes in the addresses of an S3 server: `Path` is `ENDPOINT/BUCKET/KEY`, `VirtualHost` puts it in front of the
    /// endpoint's host, which is written without it. Path where absent; servers of Google and Azure have one style only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addressing_style: Option<AddressingStyle>,
    /// Region of the bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9-]+$"))]
    pub region: Option<String>,
    /// ConfigMap in the job's namespace with the certificates (PEM) that sign the server's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle_config_map_ref: Option<ConfigMapKeyRef>,
    /// Credentials; absent, or without a `secretRef`, the service account's workload identity is used. For a model's own `endpoint` that is not the
    /// one of `spec.storage`, requests are then not signed: credentials of one server are never sent to another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<CredentialsSpec>,
}

/// Where the bucket's name goes in the addresses of an S3 server.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum AddressingStyle {
    /// `ENDPOINT/BUCKET/KEY`.
    Path,
    /// `BUCKET.ENDPOINT/KEY`.
    VirtualHost,
}

/// A key of a ConfigMap in the job's namespace.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKeyRef {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
    /// Key within the ConfigMap.
    #[serde(default = "ca_crt")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// Where credentials are.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CredentialsSpec {
    /// Secret in the job's namespace. Keys: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and optionally `AWS_SESSION_TOKEN`; or `GOOGLE_SERVICE_ACCOUNT_KEY`;
    /// or `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_KEY`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<LocalRef>,
}

/// An object of the job's namespace.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
}

default_values! {
    ca_crt: String = "ca.crt".to_owned();
}
