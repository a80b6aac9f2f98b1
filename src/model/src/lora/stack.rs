//! Several LoRAs as one, and a LoRA as the start of another.

use std::collections::BTreeMap;

use super::{LoraError, LoraLayout, LoraModule};
use finetune_compute::optim::Param;

/// The sum of several LoRAs, each with its factor: for every module the ranks of all that have it, one below the other. Its scale is 1.
///
/// # Errors
/// If the parameters are not their layout's.
pub fn stack(loras: &[(LoraLayout, Vec<Param>, f64)]) -> Result<(LoraLayout, Vec<Param>), LoraError> {
    let mut members: BTreeMap<usize, Vec<(&LoraModule, &Param, &Param, f64)>> = BTreeMap::new();
    for (layout, params, factor) in loras {
        layout.check(params)?;
        for (module, pair) in layout.modules.iter().zip(params.chunks_exact(2)) {
            members.entry(module.site.ordinal).or_default().push((module, &pair[0], &pair[1], factor * module.scale()));
        }
    }
    let mut layout = LoraLayout::default();
    let mut all = Vec::with_capacity(2 * members.len());
    for parts in members.values() {
        let Some((first, ..)) = parts.first() else { continue };
        let rank = parts.iter().map(|(module, ..)| module.rank).sum();
        let module = LoraModule { site: first.site.clone(), rank, alpha: rank as f64 };
        let down = parts.iter().flat_map(|(_, a, ..)| a.value.iter().copied()).collect();
        let mut up = Vec::with_capacity(module.site.out_features * rank);
        for row in 0..module.site.out_features {
            for (part, _, b, scale) in parts {
                up.extend(b.value[row * part.rank..][..part.rank].iter().map(|x| (f64::from(*x) * scale) as f32));
            }
        }
        all.push(Param { name: module.name_a(), shape: module.shape_a(), value: down });
        all.push(Param { name: module.name_b(), shape: module.shape_b(), value: up });
        layout.modules.push(module);
    }
    Ok((layout, all))
}

impl LoraLayout {
    /// Parameters that begin where another LoRA ends: its own where it has them, fresh ones ([`LoraLayout::init`]) elsewhere. A scale other than
    /// this layout's goes into B.
    ///
    /// # Errors
    /// [`LoraError::Start`] if the LoRA has a module that this layout lacks, or another rank.
    pub fn init_from(&self, seed: u64, given: &LoraLayout, params: Vec<Param>) -> Result<Vec<Param>, LoraError> {
        given.check(&params)?;
        let fits = |theirs: &LoraModule| self.modules.iter().find(|ours| ours.site == theirs.site);
        let strange: Vec<&str> = given.modules.iter().filter(|theirs| fits(theirs).is_none()).map(|theirs| theirs.site.name.as_str()).collect();
        if let Some(first) = strange.first() {
            let problem = format!("it has {} modules that targetModules does not name (as {first}): name them too", strange.len());
            return Err(LoraError::Start { problem });
        }
        let other_rank = given.modules.iter().find(|theirs| fits(theirs).is_some_and(|ours| ours.rank != theirs.rank));
        if let Some(theirs) = other_rank {
            let problem = format!("its rank is {} at {}: set rank to {0}", theirs.rank, theirs.site.name);
            return Err(LoraError::Start { problem });
        }
        let mut start = self.init(seed);
        let mut pairs = params.into_iter();
        for theirs in &given.modules {
            let (Some(a), Some(mut b)) = (pairs.next(), pairs.next()) else { continue };
            let Some(place) = self.modules.iter().position(|ours| ours.site == theirs.site) else { continue };
            let factor = theirs.scale() / self.modules[place].scale();
            // Equal scales leave every bit as it is.
            if (factor - 1.0).abs() > 1e-12 {
                b.value.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
            }
            start[2 * place] = a;
            start[2 * place + 1] = b;
        }
        self.check(&start)?;
        Ok(start)
    }
}
