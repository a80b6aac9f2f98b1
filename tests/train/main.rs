//! The training job as a process: resuming after kills, fencing of two live trainers, existing outputs, failures, pairing.
//!
//! Each test runs the real program on a random model of half a megabyte (`tests/fixtures`), with directories as buckets; the
//! ones in `s3.rs` use a real S3 server.
#![cfg(feature = "train")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "test code; clippy takes the functions marked as tests alone for such")]

mod buckets;
mod captions;
mod credentials;
mod deletions;
mod existing;
mod failures;
mod fencing;
mod gc;
mod log;
mod models;
mod outputs;
mod page;
mod prior;
mod resume;
mod s3;
mod single_files;
mod support;
mod two_jobs;
mod warnings;
mod weights;
