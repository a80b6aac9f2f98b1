//! Target modules with ranges of blocks, written out.

use std::collections::HashSet;

/// Most target modules with every range written out.
const MOST: usize = 4096;

/// The targets with each range, as in `transformer_blocks.0-11.attn.to_q`, in place of which its numbers stand one by one; each target once. What reads a
/// LoRA's files knows names, and no ranges.
///
/// # Errors
/// Names the range that runs backwards, or says that there are too many targets.
pub(super) fn expand(targets: &[String]) -> Result<Vec<String>, String> {
    let (mut seen, mut expanded) = (HashSet::new(), Vec::new());
    for target in targets {
        for name in names(target)? {
            if expanded.len() == MOST {
                return Err(format!("the ranges stand for more than {MOST} modules"));
            }
            if seen.insert(name.clone()) {
                expanded.push(name);
            }
        }
    }
    Ok(expanded)
}

/// The names that a target stands for.
fn names(target: &str) -> Result<Vec<String>, String> {
    let mut names = vec![String::new()];
    for part in target.split('.') {
        let numbers = part.split_once('-').and_then(|(first, last)| Some((first.parse::<u32>().ok()?, last.parse::<u32>().ok()?)));
        let parts = match numbers {
            None => vec![part.to_owned()],
            Some((first, last)) if first > last => return Err(format!("{target:?} counts backwards, from {first} to {last}")),
            Some((first, last)) => (first..=last).map(|number| number.to_string()).collect(),
        };
        if names.len() * parts.len() > MOST {
            return Err(format!("{target:?} stands for more than {MOST} modules"));
        }
        names = names.iter().flat_map(|name| parts.iter().map(move |part| if name.is_empty() { part.clone() } else { format!("{name}.{part}") })).collect();
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::expand;

    fn of(targets: &[&str]) -> Result<Vec<String>, String> {
        expand(&targets.iter().map(|&target| target.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn ranges_are_written_out_in_order_and_once() {
        assert_eq!(of(&["attn.to_q", "to_out.0"]).unwrap(), ["attn.to_q", "to_out.0"]);
        let blocks = of(&["transformer_blocks.2.attn.to_q", "transformer_blocks.1-3.attn.to_q"]).unwrap();
        assert_eq!(blocks, ["transformer_blocks.2.attn.to_q", "transformer_blocks.1.attn.to_q", "transformer_blocks.3.attn.to_q"]);
        assert_eq!(of(&["transformer_blocks.0-0.attn.to_out.0"]).unwrap(), ["transformer_blocks.0.attn.to_out.0"]);
    }

    #[test]
    fn what_no_list_could_hold_is_refused() {
        assert!(of(&["transformer_blocks.11-0.attn.to_q"]).unwrap_err().contains("counts backwards, from 11 to 0"));
        assert!(of(&["a.0-999.b.0-999"]).unwrap_err().contains("more than 4096"));
        let many: Vec<String> = (0..5).map(|i| format!("a{i}.0-999.b")).collect();
        assert!(expand(&many).unwrap_err().contains("more than 4096"));
    }
}
