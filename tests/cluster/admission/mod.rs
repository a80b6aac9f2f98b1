//! The CustomResourceDefinition on a real API server: every CEL rule both ways, immutability, `kubectl explain`, printer columns.

mod explain;
mod fixture;
mod rules;
mod transitions;
