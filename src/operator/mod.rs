//! The controller: reconciles FineTuneJobs into GPU pods.
