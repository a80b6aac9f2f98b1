//! The `FineTuneJob` API: spec, status, conditions, reasons. No I/O.
//!
//! The doc comments of the types are the descriptions in the CustomResourceDefinition (`kubectl explain finetunejob.spec`).
//! Fractional numbers are strings ([`Decimal`]): floats have no place in a Kubernetes API, since each client prints them in its own way.

#![expect(unreachable_pub, reason = "KubeSchema derives each schema from a public copy of the struct inside a function")]

mod bounds;
mod checkpoint;
mod closed_enum;
mod condition;
mod crd;
mod dataset;
mod decimal;
mod defaults;
mod lenient;
mod model;
mod names;
mod output;
pub mod plan;
mod policy;
mod progress;
mod reason;
mod rules;
mod scheduling;
mod shift;
mod spec;
mod status;
mod storage;
mod text;
mod training;
pub mod validate;

pub use checkpoint::{CheckpointSpec, ResumePolicy, ResumeSpec};
pub use condition::{
    AdmittedReason, CheckpointedReason, CompleteReason, ConditionType, JobCreatedReason, PodsScheduledReason, ReconcilingReason, RunningReason, StalledReason,
    SuspendedReason, ValidatedReason,
};
pub use crd::{crd, schema, with_integers};
pub use dataset::{CaptionsSpec, DatasetSpec, OnBadSample, TriggerPosition};
pub use decimal::{Decimal, DecimalError};
pub use model::{CacheClaim, HuggingFaceSource, ModelCache, ModelFiles, ModelSource, ModelSpec, ObjectStoreSource, PersistentVolumeClaimSource, SecretKeyRef};
pub use names::*;
pub use output::{ExistingOutput, OutputDtype, OutputFormat, OutputSpec};
pub use policy::{FailurePolicy, TtlScope};
pub use progress::{
    FailureReport, MemoryReport, PROGRESS_MAX_BYTES, Progress, ProgressError, ReportedArtifact, ReportedCheckpoint, Stage, TERMINATION_MESSAGE_MAX_BYTES,
    TrainingResult,
};
pub use reason::{Reason, Retry};
pub use scheduling::{GpuSpec, PodTemplate, ResourceAmounts, ResourcesSpec, SchedulingSpec};
pub use shift::TimestepShift;
pub use spec::{FineTuneJob, FineTuneJobSpec};
pub use status::{
    ArtifactStatus, Attempt, AttemptCause, AttemptCounts, CheckpointStatus, FailureStatus, FineTuneJobStatus, JobRef, Phase, ProgressStatus, QueueStatus,
    UsageStatus,
};
pub use storage::{AddressingStyle, ConfigMapKeyRef, CredentialsSpec, LocalRef, StorageSpec};
pub use text::clean;
pub use training::{
    BucketsSpec, FlowMatchingSpec, GradientCheckpointing, LearningRateScheduleSpec, LoraSpec, OptimizerKind, OptimizerSpec, Precision, PriorPreservationSpec,
    ProdigySpec, ScheduleKind, TrainingSpec, ValidationSpec, WeightingScheme, Weights,
};
