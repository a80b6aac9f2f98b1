//! Faults that take their time: lost kubelets, drained nodes, restarted API servers, absent buckets, wrong credentials. Each test ends with the LoRA
//! of an undisturbed run, or with the condition and the reason that people need.

mod disturbed;
mod lifecycle;
mod nodes;
mod refused;
