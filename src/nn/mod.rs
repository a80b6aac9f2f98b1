//! Differentiable layers: each forward is directly followed by its backward.
