//! Captions that are longer than what the text encoders read: how many, how long, and which setting would keep them.

use std::fmt;

use finetune_data::dataset::Dataset;
use finetune_model::text::CaptionLength;

/// The most tokens that `training.maxSequenceLength` can be.
const MOST: u32 = 512;
/// Names of files that are mentioned.
const NAMED: usize = 3;

/// Captions whose ends are not trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truncation {
    /// How many captions are cut by every encoder.
    pub captions: u64,
    /// Of so many.
    pub of: u64,
    /// Tokens of the longest one.
    pub longest: u32,
    /// Tokens that are read.
    pub limit: u32,
    /// Whether T5 is the encoder that reads most; else CLIP, whose limit is fixed.
    with_t5: bool,
    /// The longest ones: file name and tokens.
    examples: Vec<(String, u32)>,
}

impl Truncation {
    /// Of the captions of `dataset`, whose `lengths` are in the same order, those of a caption's tags in other orders among them; none if every caption is
    /// read to its end. `limit` is `training.maxSequenceLength`, `clip_limit` what CLIP reads; without T5 that is all.
    pub fn of(dataset: &Dataset, lengths: &[CaptionLength], limit: u32, clip_limit: u32, with_t5: bool) -> Option<Self> {
        let limit = if with_t5 { limit } else { clip_limit };
        // The orders of a caption's tags are one caption; they differ by a token or two.
        let orders = dataset.tag_orders.max(1);
        let tokens = |lengths: &[CaptionLength]| lengths.iter().map(|length| if with_t5 { length.t5 } else { length.clip }).max();
        let mut cut: Vec<(String, u32)> = dataset
            .captions()
            .step_by(orders)
            .zip(lengths.chunks(orders))
            .filter_map(|((name, _), lengths)| Some((name.to_owned(), tokens(lengths).filter(|tokens| *tokens > limit)?)))
            .collect();
        cut.sort_by(|(a, long), (b, longer)| longer.cmp(long).then_with(|| a.cmp(b)));
        let longest = cut.first()?.1;
        let captions = cut.len() as u64;
        cut.truncate(NAMED);
        Some(Self { captions, of: (lengths.len() / orders) as u64, longest, limit, with_t5, examples: cut })
    }
}

impl fmt::Display for Truncation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { captions, of, longest, limit, with_t5, examples } = self;
        let (encoder, verb) = (if *with_t5 { "T5" } else { "CLIP" }, if *captions == 1 { "is" } else { "are" });
        write!(
            f,
            "{captions} of {of} captions {verb} longer than the {limit} tokens that {encoder} reads (the longest has {longest}): their ends are not trained. "
        )?;
        match (*with_t5, *longest) {
            (true, 0..=MOST) => write!(f, "training.maxSequenceLength: {longest} would keep all of them; CLIP reads the first 75 tokens always")?,
            (true, _) => write!(f, "training.maxSequenceLength: {MOST} is the most that can be kept; CLIP reads the first 75 tokens always")?,
            (false, _) => f.write_str("The model has no T5, and CLIP reads no more: shorten them")?,
        }
        let named: Vec<String> = examples.iter().map(|(name, tokens)| format!("{name} ({tokens})")).collect();
        let more = captions.saturating_sub(named.len() as u64);
        write!(f, ". {}", named.join(", "))?;
        if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use finetune_data::captions::Sources;
    use finetune_data::dataset::Sample;
    use finetune_data::problems::Problems;

    use super::*;

    /// A dataset of these samples and nothing else.
    pub(crate) fn dataset_of(samples: Vec<Sample>) -> Dataset {
        Dataset {
            samples,
            tag_orders: 1,
            digest: String::new(),
            metadata_digest: None,
            skipped: Problems::default(),
            sources: Sources::default(),
            notices: Vec::new(),
            image_column: "image".into(),
        }
    }

    fn dataset(pictures: usize) -> Dataset {
        let sample = |i| Sample { file_name: format!("{i}.png"), captions: vec![String::new()], image_digest: [0; 32], size: (1, 1) };
        dataset_of((0..pictures).map(sample).collect())
    }

    fn lengths(tokens: &[u32]) -> Vec<CaptionLength> {
        tokens.iter().map(|t5| CaptionLength { clip: t5 - 3, t5: *t5 }).collect()
    }

    #[test]
    fn long_captions_are_counted_and_the_setting_that_fits_is_named() {
        let dataset = dataset(5);
        let of = |tokens: &[u32], with_t5| Truncation::of(&dataset, &lengths(tokens), 77, 77, with_t5);
        assert_eq!(of(&[77, 10, 5, 77, 20], true), None);
        let found = of(&[78, 10, 214, 90, 100], true).unwrap();
        assert_eq!((found.captions, found.of, found.longest), (4, 5, 214));
        let text = found.to_string();
        for part in
            ["4 of 5 captions", "77 tokens", "longest has 214", "training.maxSequenceLength: 214 ", "75", "2.png (214), 4.png (100), 3.png (90) and 1 more"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = of(&[600, 10, 10, 10, 10], true).unwrap().to_string();
        assert!(text.contains("1 of 5 captions is longer") && text.contains("512 is the most"), "{text}");
        let text = of(&[100, 10, 10, 10, 10], false).unwrap().to_string();
        assert!(text.contains("CLIP reads (the longest has 97)") && text.contains("no T5"), "{text}");
        assert_eq!(of(&[80, 10, 10, 10, 10], false), None);
    }

    #[test]
    fn the_orders_of_a_captions_tags_are_counted_as_one_caption() {
        let mut dataset = dataset(2);
        dataset.tag_orders = 3;
        dataset.samples.iter_mut().for_each(|sample| sample.captions = vec![String::new(); 6]);
        // Two captions for each of two pictures, in three orders each.
        let found = Truncation::of(&dataset, &lengths(&[10, 10, 10, 77, 78, 77, 10, 10, 10, 90, 91, 90]), 77, 77, true).unwrap();
        assert_eq!((found.captions, found.of, found.longest), (2, 4, 91));
        assert!(found.to_string().ends_with(". 1.png (91), 0.png (78)"), "{found}");
    }
}
