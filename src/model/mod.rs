//! Stable Diffusion 3: weights, text encoders, VAE, MMDiT, LoRA.
