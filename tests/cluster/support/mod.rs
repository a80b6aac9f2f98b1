//! What the tests with real kubelets share: small jobs; bucket, image and chart, prepared once.

pub(crate) mod jobs;
pub(crate) mod stage;
