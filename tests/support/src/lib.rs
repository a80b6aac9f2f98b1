//! What integration tests and benchmarks share: object-store servers, a browser, a cluster's API, the programs that they run.
//!
//! Everything here panics where it fails: a test that cannot be set up has failed.
#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

pub mod browser;
pub mod kubernetes;
pub mod programs;
pub mod s3;
pub mod servers;
