//! Pure: a spec and what is known of the world become a plan.
//!
//! [`resolve`] is the one seam between the manifest and everything that acts on it: `finetune plan` prints its result, the operator puts its
//! [`TrainConfig`] into the pod, the trainer reads that, `finetune run` does both in one process.

mod canonical;
mod config;
mod folders;
mod identity;
mod memory;
mod read;
mod resolve;
mod shape;
mod steps;
mod targets;
mod warnings;

pub use crate::{
    AddressingStyle, ExistingOutput, GradientCheckpointing, ModelFiles, OnBadSample, OptimizerKind, OutputDtype, OutputFormat, Precision, ResumePolicy,
    ScheduleKind, TriggerPosition, WeightingScheme, Weights,
};
pub use canonical::canonical_json;
pub use config::{
    BucketsConfig, CONFIG_VERSION, CaptionsConfig, CheckpointConfig, DatasetConfig, DeviceRequest, FlowMatchingConfig, LoraConfig, ModelConfig, ModelSource,
    OptimizerConfig, OutputConfig, PriorPreservationConfig, ProdigyConfig, ResumeConfig, ScheduleConfig, ShiftConfig, SidesConfig, StorageConfig, TrainConfig,
    TrainingConfig, ValidationConfig,
};
pub use folders::{Folder, Use, default_checkpoint_uri, overlaps};
pub use memory::{BUDGET_BYTES, FrozenWeights, GpuTooSmall, LIBRARY_BYTES, MemoryBudget, MemoryPlan, Part, Stage, memory_plan, run_flops};
pub use read::ConfigError;
pub use resolve::{DEFAULT_MAX_STEPS, DeviceFacts, Facts, MODEL_CREDENTIALS_PREFIX, Plan, PlanError, Problem, rank_stabilised, resolve};
pub use shape::{EncoderShape, ModelShape};
pub use steps::StepPlan;
pub use warnings::{Warning, warnings};
