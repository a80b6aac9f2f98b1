//! The training job: prepare, step, checkpoint, publish.

pub mod captions;
pub mod checkpoint;
pub mod comparison;
pub mod device;
pub mod division;
pub mod environment;
pub mod error;
pub mod evaluate;
pub mod events;
pub mod folders;
pub mod history;
pub mod inspect;
pub mod interrupt;
pub mod job;
pub mod output;
mod parameters;
pub mod prepare;
pub mod publish;
pub mod report;
pub mod result;
pub mod server;
pub mod setup;
pub mod step;
pub mod tensor_file;
pub mod trainer;
pub mod validation;
pub mod verify;
