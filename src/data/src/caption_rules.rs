//! What is done to captions before they are trained: a trigger word, orders of tags. Pure.

use finetune_api::TriggerPosition;
use finetune_api::plan::CaptionsConfig;
use finetune_common::digest::{leading_u64, sha256};
use finetune_common::rng::{Purpose, Stream};

/// What stands between tags, and between trigger word and caption.
const SEPARATOR: &str = ", ";
/// Draws for other orders: enough to find as many as are asked for, or nearly all that there are.
const DRAWS: u64 = 128;

/// The captions that are trained in place of `captions`: for each of them as many as `tagOrders`, the first as written but for the trigger word.
pub(super) fn apply(config: Option<&CaptionsConfig>, captions: &[String]) -> Vec<String> {
    let Some(config) = config else { return captions.to_vec() };
    captions.iter().flat_map(|caption| orders(caption, config.tag_orders, config.keep_tags)).map(|caption| with_trigger(config, caption)).collect()
}

/// Whether a caption has the trigger word already, and gets it again.
pub(super) fn has_trigger(config: Option<&CaptionsConfig>, captions: &[String]) -> bool {
    let word = config.and_then(|config| config.trigger_word.as_deref());
    word.is_some_and(|word| captions.iter().any(|caption| caption.contains(word)))
}

/// Whether a caption has tags that are shuffled.
pub(super) fn has_orders(config: Option<&CaptionsConfig>, captions: &[String]) -> bool {
    config.is_some_and(|config| config.tag_orders > 1 && captions.iter().any(|caption| tags(caption).len() > config.keep_tags as usize + 1))
}

fn with_trigger(config: &CaptionsConfig, caption: String) -> String {
    match (&config.trigger_word, config.trigger_position) {
        (None, _) => caption,
        (Some(word), TriggerPosition::Front) => format!("{word}{SEPARATOR}{caption}"),
        (Some(word), TriggerPosition::Behind) => format!("{caption}{SEPARATOR}{word}"),
    }
}

/// What stands between commas.
fn tags(caption: &str) -> Vec<&str> {
    caption.split(',').map(str::trim).filter(|tag| !tag.is_empty()).collect()
}

/// The caption as written, then its tags in `count - 1` shuffled orders, each another one. The streams (caption, number of the draw) draw them: neither the
/// seed nor the other pictures matter, so that what is encoded serves other runs, too. Where there are fewer orders they are repeated, so that each caption
/// of a picture is drawn as often as the others.
fn orders(caption: &str, count: u32, keep: u32) -> Vec<String> {
    let written = tags(caption);
    let kept = written.len().min(keep as usize);
    let name = leading_u64(&sha256(caption.as_bytes()));
    let (mut found, mut taken) = (vec![caption.to_owned()], vec![written.clone()]);
    let draws = if written.len() < kept + 2 { 0 } else { DRAWS };
    for draw in 0..draws {
        if found.len() >= count as usize {
            break;
        }
        let mut tags = written.clone();
        Stream::new(0, Purpose::TagOrder, name, draw).shuffle(&mut tags[kept..]);
        if !taken.contains(&tags) {
            found.push(tags.join(SEPARATOR));
            taken.push(tags);
        }
    }
    (0..count as usize).map(|order| found[order % found.len()].clone()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn config() -> CaptionsConfig {
        CaptionsConfig { trigger_word: None, trigger_position: TriggerPosition::Front, tag_orders: 1, keep_tags: 0, dropout: 0.0 }
    }

    #[test]
    fn the_trigger_word_goes_where_it_is_wanted() {
        let with = |trigger_position| CaptionsConfig { trigger_word: Some("ohwx".into()), trigger_position, ..config() };
        let captions = ["a dog".to_owned(), "a cat, red".to_owned()];
        assert_eq!(apply(Some(&with(TriggerPosition::Front)), &captions), ["ohwx, a dog", "ohwx, a cat, red"]);
        assert_eq!(apply(Some(&with(TriggerPosition::Behind)), &captions), ["a dog, ohwx", "a cat, red, ohwx"]);
        assert_eq!(apply(None, &captions), &captions);
    }

    #[test]
    fn orders_have_every_tag_once_keep_the_first_ones_and_are_always_the_same() {
        let found = orders("1girl, solo,  red hair, hat , park", 8, 2);
        assert_eq!((found.len(), found[0].as_str()), (8, "1girl, solo,  red hair, hat , park"));
        for order in &found[1..6] {
            let tags: Vec<&str> = order.split(", ").collect();
            assert_eq!(tags[..2], ["1girl", "solo"]);
            assert_eq!(tags[2..].iter().copied().collect::<BTreeSet<_>>(), ["red hair", "hat", "park"].into());
        }
        assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), 6, "all orders of three tags: {found:?}");
        assert_eq!(found[6..], found[..2]);
        assert_eq!(orders("1girl, solo,  red hair, hat , park", 8, 2), found);
        assert_eq!(orders("1girl, solo,  red hair, hat , park", 4, 2), found[..4]);
    }

    #[test]
    fn captions_without_tags_to_shuffle_stay_as_they_are_and_are_drawn_as_often_as_others() {
        for caption in ["a dog in the park", "a dog, in the park", "", ",,"] {
            assert_eq!(orders(caption, 5, 1), [caption; 5]);
            assert!(!has_orders(Some(&CaptionsConfig { tag_orders: 5, keep_tags: 1, ..config() }), &[caption.to_owned()]), "{caption}");
        }
        assert!(has_orders(Some(&CaptionsConfig { tag_orders: 5, keep_tags: 1, ..config() }), &["a, b, c".to_owned()]));
        let both = apply(Some(&CaptionsConfig { tag_orders: 3, ..config() }), &["no tags".into(), "a, b, c, d".into()]);
        assert_eq!((both.len(), &both[..3], both[3].as_str()), (6, &["no tags"; 3].map(str::to_owned)[..], "a, b, c, d"));
    }

    /// Prepared data is found by the caption: another order would be encoded again, and a resumed run would train something else.
    #[test]
    fn orders_are_those_of_earlier_versions() {
        assert_eq!(orders("a, b, c, d, e, f", 4, 1), ["a, b, c, d, e, f", "a, b, f, e, d, c", "a, d, f, e, b, c", "a, e, d, c, b, f"]);
    }

    /// The trigger word is no tag: it neither moves nor counts as a kept one.
    #[test]
    fn the_trigger_word_is_not_shuffled() {
        for (trigger_position, front) in [(TriggerPosition::Front, true), (TriggerPosition::Behind, false)] {
            let config = CaptionsConfig { trigger_word: Some("ohwx".into()), trigger_position, tag_orders: 8, ..config() };
            let found = apply(Some(&config), &["a, b, c".to_owned()]);
            assert!(found.iter().all(|caption| if front { caption.starts_with("ohwx, ") } else { caption.ends_with(", ohwx") }), "{found:?}");
            assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), 6, "{found:?}");
            assert!(has_trigger(Some(&config), &["x".into(), "an ohwx dog".into()]) && !has_trigger(Some(&config), &["x".into()]));
        }
    }
}
