//! A transformer of random weights, as the file that [`crate::weights::Weights`] opens: for measurements, since neither time nor memory depends on trained ones.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use rayon::prelude::*;

use crate::mmdit::MmditConfig;
use crate::survey::tensors;

/// Values that one stream of random numbers fills.
const CHUNK: usize = 1 << 15;

/// Writes every tensor of the transformer to `folder` in f16: uniform numbers, those of linear layers with the variance 1 / inputs, which keeps activations
/// in range. The same configuration gives the same file.
///
/// # Errors
/// If the file cannot be written.
pub fn write_transformer(config: &MmditConfig, folder: &Path) -> io::Result<()> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    let tensors = tensors::transformer(config);
    for tensor in &tensors {
        let end = offset + 2 * tensor.shape.iter().product::<usize>();
        header.insert(tensor.names[0].clone(), serde_json::json!({"dtype": "F16", "shape": tensor.shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join("diffusion_pytorch_model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let range = range(&tensor.names[0], &tensor.shape);
        let mut bytes = vec![0_u8; 2 * tensor.shape.iter().product::<usize>()];
        bytes.par_chunks_mut(2 * CHUNK).enumerate().for_each(|(chunk, bytes)| {
            // Knuth's linear congruential generator: good enough for weights that stand for nothing.
            let mut state = (index as u64) << 32 | chunk as u64 | 1;
            for pair in bytes.chunks_exact_mut(2) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 40) as f32 / 8_388_608.0 - 1.0;
                pair.copy_from_slice(&half::f16::from_f32(uniform * range).to_le_bytes());
            }
        });
        file.write_all(&bytes)?;
    }
    file.flush()
}

/// The largest magnitude of a tensor's values.
fn range(name: &str, shape: &[usize]) -> f32 {
    match shape {
        [_, inputs] => (3.0 / *inputs as f32).sqrt(),
        [_, _, _] => 0.5,
        [_, _, _, _] => 0.2,
        _ if name.ends_with(".bias") => 0.02,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use finetune_compute::kernels::Cpu;

    use super::*;
    use crate::mmdit::Mmdit;
    use crate::weights::Weights;

    /// Every weight that a model with all parts reads is there, and finite.
    #[test]
    fn a_model_loads_from_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = MmditConfig {
            num_layers: 2,
            attention_head_dim: 8,
            num_attention_heads: 2,
            joint_attention_dim: 12,
            caption_projection_dim: 16,
            pooled_projection_dim: 10,
            pos_embed_max_size: 4,
            ..MmditConfig::medium(Some("rms_norm"), vec![0])
        };
        write_transformer(&config, folder.path()).unwrap();
        let weights = Arc::new(Weights::open(folder.path()).unwrap());
        assert!(weights.names().all(|name| weights.view(name).unwrap().to_f32().unwrap().iter().all(|value| value.is_finite())));
        Mmdit::load(weights, config, &Cpu::default()).unwrap();
    }
}
