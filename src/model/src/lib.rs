//! Stable Diffusion 3: weights, text encoders, VAE, MMDiT, LoRA.

pub mod digest;
pub mod layout;
pub mod learner;
pub mod lora;
pub mod mmdit;
pub mod random;
pub mod sample;
pub mod single_file;
pub mod survey;
pub mod text;
pub mod vae;
pub mod weights;

pub use layout::ModelDir;
pub use weights::Weights;
