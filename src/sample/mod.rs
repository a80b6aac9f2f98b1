//! Sampling pictures from a model with or without a LoRA.
