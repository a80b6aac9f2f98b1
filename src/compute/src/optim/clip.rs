//! Clipping by the global norm, as `torch.nn.utils.clip_grad_norm_`.

use rayon::prelude::*;

/// Values per partial sum. Fixed, so that the sum is the same for any number of threads.
const CHUNK: usize = 4096;

/// The global L2 norm of `tensors`, summed in f64 over a fixed partition.
pub fn global_norm(tensors: &[Vec<f32>]) -> f64 {
    let per_tensor: Vec<f64> = tensors.par_iter().map(|t| sum_of(t.len(), |i| f64::from(t[i]) * f64::from(t[i]))).collect();
    per_tensor.iter().sum::<f64>().sqrt()
}

/// Scales all gradients by `min(1, max_norm / (norm + 1e-6))` and returns the norm before.
///
/// A norm that is not finite leaves the gradients as they are: the caller must stop then, nothing can be trained from them.
pub fn clip_global_norm(grads: &mut [Vec<f32>], max_norm: f64) -> f64 {
    let norm = global_norm(grads);
    let coefficient = max_norm / (norm + 1e-6);
    if norm.is_finite() && coefficient < 1.0 {
        let coefficient = coefficient as f32;
        grads.par_iter_mut().for_each(|grad| grad.iter_mut().for_each(|g| *g *= coefficient));
    }
    norm
}

/// Sum of `term(0..len)` in f64, chunk by chunk in order.
pub(super) fn sum_of(len: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..len.div_ceil(CHUNK)).map(|c| (c * CHUNK..((c + 1) * CHUNK).min(len)).map(&term).sum::<f64>()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_only_above_the_limit() {
        let mut grads = vec![vec![3.0, 0.0], vec![4.0]];
        assert!((clip_global_norm(&mut grads, 10.0) - 5.0).abs() < 1e-12);
        assert_eq!(grads, [vec![3.0, 0.0], vec![4.0]]);
        assert!((clip_global_norm(&mut grads, 1.0) - 5.0).abs() < 1e-12);
        assert!((global_norm(&grads) - 1.0).abs() < 1e-6, "{grads:?}");
    }

    #[test]
    fn a_norm_that_is_not_finite_is_reported_and_changes_nothing() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut grads = vec![vec![1.0, bad, 2.0]];
            assert!(!clip_global_norm(&mut grads, 1.0).is_finite());
            assert_eq!((grads[0][0], grads[0][2]), (1.0, 2.0));
        }
    }

    #[test]
    fn the_norm_does_not_depend_on_the_number_of_threads() {
        let grads: Vec<Vec<f32>> = (0..7).map(|k| (0..20_000 + k).map(|i| ((i * 37 + k) as f32).sin()).collect()).collect();
        let norms: Vec<u64> =
            [1, 2, 5].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| global_norm(&grads).to_bits())).to_vec();
        assert!(norms.windows(2).all(|w| w[0] == w[1]), "{norms:?}");
    }
}
