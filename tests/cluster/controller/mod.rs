//! The controller against a real API server, controller-manager and scheduler. Pods have no kubelet: the tests write their status as one would.

mod carried;
mod disrupted;
mod elsewhere;
mod failures;
mod leader;
mod lifecycle;
mod ownership;
mod refused;
mod stage;
mod succession;
