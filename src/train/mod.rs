//! The training job: prepare, step, checkpoint, publish.
