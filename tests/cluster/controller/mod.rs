//! The controller against a real API server, controller-manager and scheduler. Pods have no kubelet: the tests write their status as one would.

mod disrupted;
mod failures;
mod leader;
mod lifecycle;
mod ownership;
mod refused;
mod stage;
mod succession;
