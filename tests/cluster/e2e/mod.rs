//! End to end, with real kubelets: the chart installed by Helm, the product's image, SeaweedFS as the bucket. The cluster has one GPU of the
//! 16 GB class, so the tests take turns; each has a namespace of its own.

mod chart;
mod disruption;
mod gitops;
mod quickstart;
