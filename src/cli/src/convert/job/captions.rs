//! What kohya's scripts do to captions (`process_caption`): prefix and suffix are joined by a space, then the caption is dropped, or its tags are shuffled
//! behind the first `keep_tokens`, those of the prefix among them.

use super::Job;

/// Orders of the tags that stand in for shuffling at each draw: the most there can be.
const ORDERS: u32 = 16;

impl Job {
    /// `spec.dataset.captions`.
    pub(super) fn captions(&mut self) -> anyhow::Result<()> {
        self.set_decimal("caption_dropout_rate", "dataset.captions.dropout")?;
        let shuffled = self.has("shuffle_caption");
        let prefix = self.text("caption_prefix").map(str::trim).unwrap_or_default().to_owned();
        let suffix = self.text("caption_suffix").map(str::trim).unwrap_or_default().to_owned();
        let word = |text: &str| text.trim_matches(|c: char| c == ',' || c.is_whitespace()).to_owned();
        match (word(&prefix), word(&suffix)) {
            (front, behind) if !front.is_empty() => {
                self.set("dataset.captions.triggerWord", front);
                if !prefix.ends_with(',') {
                    self.remarks.push("--caption_prefix: a comma and a space stand behind it, where the script has a space".to_owned());
                }
                if !behind.is_empty() {
                    self.remarks.push("--caption_suffix has no counterpart beside --caption_prefix: write it into the captions".to_owned());
                }
            }
            (_, behind) if !behind.is_empty() => {
                self.set("dataset.captions.triggerWord", behind);
                self.set("dataset.captions.triggerPosition", "Behind");
                self.remarks.push("--caption_suffix: a comma and a space stand before it, where the script has a space".to_owned());
                if shuffled {
                    self.remarks.push("--caption_suffix stays behind, where the script shuffles it with the tags".to_owned());
                }
            }
            _ => {}
        }
        if shuffled { self.shuffling(&prefix) } else { self.keep_is_without_effect() }
    }

    fn shuffling(&mut self, prefix: &str) -> anyhow::Result<()> {
        self.set("dataset.captions.tagOrders", ORDERS);
        self.remarks.push(format!(
            "--shuffle_caption: {ORDERS} orders of each caption's tags are encoded, of which each epoch draws one, where the script shuffles at each draw"
        ));
        let keep = self.whole("keep_tokens")?.unwrap_or(0);
        // Without a comma at its end the prefix is one tag with the caption's first.
        let (of_prefix, joined) = (prefix.split(',').filter(|tag| !tag.trim().is_empty()).count() as u64, !prefix.is_empty() && !prefix.ends_with(','));
        if keep < of_prefix {
            self.remarks.push("--caption_prefix stays in front, where the script shuffles it with the tags (--keep_tokens does not cover it)".to_owned());
        }
        if self.has("keep_tokens") {
            self.set("dataset.captions.keepTags", if joined { (keep + 1).saturating_sub(of_prefix) } else { keep.saturating_sub(of_prefix) });
        }
        Ok(())
    }

    fn keep_is_without_effect(&mut self) -> anyhow::Result<()> {
        self.whole("keep_tokens")?;
        self.without_effect(&["keep_tokens"], "--shuffle_caption");
        Ok(())
    }
}
