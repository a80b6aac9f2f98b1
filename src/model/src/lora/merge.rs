//! LoRA merged into a weight.

use super::{LoraError, LoraModule};
use finetune_compute::optim::Param;

/// `scale · (alpha / r) · B A`, [out, in] row-major, in f64 accumulated and rounded to f32.
///
/// # Errors
/// If A or B has another shape than the module.
pub fn delta_weight(module: &LoraModule, a: &Param, b: &Param, scale: f64) -> Result<Vec<f32>, LoraError> {
    for (param, name, shape) in [(a, module.name_a(), module.shape_a()), (b, module.name_b(), module.shape_b())] {
        if param.shape != shape {
            return Err(LoraError::Parameter { name, expected: shape, got: param.shape.clone() });
        }
    }
    let (inputs, rank) = (module.site.in_features, module.rank);
    let mut delta = Vec::with_capacity(module.site.out_features * inputs);
    let mut row = vec![0.0_f64; inputs];
    for out in b.value.chunks_exact(rank) {
        row.fill(0.0);
        for (&up, down) in out.iter().zip(a.value.chunks_exact(inputs)) {
            row.iter_mut().zip(down).for_each(|(sum, &x)| *sum += f64::from(up) * f64::from(x));
        }
        delta.extend(row.iter().map(|&x| (x * scale * module.scale()) as f32));
    }
    Ok(delta)
}

/// Adds [`delta_weight`] to a weight [out, in] in f32 (the caller casts to the stored type afterwards).
///
/// # Errors
/// If a shape does not fit.
pub fn merge_into(weight: &mut [f32], module: &LoraModule, a: &Param, b: &Param, scale: f64) -> Result<(), LoraError> {
    let delta = delta_weight(module, a, b, scale)?;
    if weight.len() != delta.len() {
        return Err(LoraError::Parameter {
            name: module.site.name.clone(),
            expected: vec![module.site.out_features, module.site.in_features],
            got: vec![weight.len()],
        });
    }
    weight.iter_mut().zip(delta).for_each(|(w, d)| *w += d);
    Ok(())
}
