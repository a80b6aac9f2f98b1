//! Which modules a list of targets means.

use super::LoraError;

/// A linear module of the transformer that can carry LoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSite {
    /// Its name in diffusers, as `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// Its place among all linear modules of the model, in order of definition.
    pub ordinal: usize,
    /// Inputs.
    pub in_features: usize,
    /// Outputs.
    pub out_features: usize,
}

/// Whether `target` means the module `name`: the whole name, or its last parts (peft's rule for a list of targets).
/// So `to_q` means `attn.to_q` and `attn2.to_q`, but not `add_q_proj`.
pub fn matches(target: &str, name: &str) -> bool {
    name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The indices of the modules that the targets mean, in the model's order.
///
/// # Errors
/// If there is no target, or one that matches no module.
pub fn select(targets: &[String], sites: &[LinearSite]) -> Result<Vec<usize>, LoraError> {
    if targets.is_empty() {
        return Err(LoraError::NoTargets);
    }
    let unmatched: Vec<String> = targets.iter().filter(|t| t.is_empty() || !sites.iter().any(|s| matches(t, &s.name))).cloned().collect();
    if !unmatched.is_empty() {
        let (mut examples, mut blocks) = (Vec::new(), 0);
        for site in sites {
            let in_block = site.name.strip_prefix("transformer_blocks.").and_then(|n| n.split_once('.'));
            blocks = in_block.and_then(|(block, _)| block.parse::<usize>().ok()).map_or(blocks, |block| blocks.max(block + 1));
            let short = in_block.map_or(site.name.as_str(), |(_, rest)| rest);
            if !examples.iter().any(|e| e == short) {
                examples.push(short.to_owned());
            }
        }
        return Err(LoraError::UnmatchedTargets { targets: unmatched, examples, blocks });
    }
    Ok((0..sites.len()).filter(|&i| targets.iter().any(|t| matches(t, &sites[i].name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_match_whole_parts_at_the_end() {
        for (target, name, expected) in [
            ("to_q", "transformer_blocks.0.attn.to_q", true),
            ("to_q", "transformer_blocks.0.attn2.to_q", true),
            ("attn.to_q", "transformer_blocks.0.attn2.to_q", false),
            ("attn.to_q", "transformer_blocks.0.attn.to_q", true),
            ("to_q", "transformer_blocks.0.attn.add_q_proj", false),
            ("q_proj", "transformer_blocks.0.attn.add_q_proj", false),
            ("to_out.0", "transformer_blocks.3.attn.to_out.0", true),
            ("proj_out", "proj_out", true),
            ("net.2", "transformer_blocks.0.ff_context.net.2", true),
        ] {
            assert_eq!(matches(target, name), expected, "{target} {name}");
        }
    }

    #[test]
    fn an_unmatched_target_is_named_with_what_exists() {
        let site = |name: &str| LinearSite { name: name.into(), ordinal: 0, in_features: 1, out_features: 1 };
        let sites = [site("transformer_blocks.0.attn.to_q"), site("transformer_blocks.1.attn.to_q"), site("proj_out")];
        let targets = ["to_q".to_owned(), "to_w".to_owned()];
        let Err(LoraError::UnmatchedTargets { targets, examples, blocks }) = select(&targets, &sites) else { panic!("must not match") };
        assert_eq!((targets, blocks), (vec!["to_w".to_owned()], 2));
        assert_eq!(examples, ["attn.to_q", "proj_out"]);
        assert!(matches!(select(&[], &sites), Err(LoraError::NoTargets)));
        // A range of blocks beyond the model's.
        let beyond: Vec<String> = (0..40).map(|block| format!("transformer_blocks.{block}.attn.to_q")).collect();
        let error = select(&beyond, &sites).unwrap_err().to_string();
        assert!(error.contains("\"transformer_blocks.2.attn.to_q\"") && error.contains("(and 34 more); it has 2 blocks"), "{error}");
    }
}
