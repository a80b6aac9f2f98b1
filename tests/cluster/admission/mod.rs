//! The CustomResourceDefinition on a real API server: every CEL rule both ways, immutability, `kubectl explain`, printer columns; the chart's policies.

mod explain;
mod fixture;
mod policies;
mod rules;
mod transitions;
