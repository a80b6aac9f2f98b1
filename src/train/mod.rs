//! The training job: prepare, step, checkpoint, publish.

pub mod checkpoint;
pub mod evaluate;
pub mod events;
pub mod history;
pub mod interrupt;
pub mod publish;
pub mod report;
pub mod result;
pub mod server;
pub mod step;
pub mod tensor_file;
