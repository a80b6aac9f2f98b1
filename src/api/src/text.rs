//! Text from elsewhere, made fit for status and events.

/// `text` without control characters (each run of them becomes one space) and at most `max_bytes` long, cut at a character.
pub fn clean(text: &str, max_bytes: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max_bytes));
    let mut gap = false;
    for c in text.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            gap = true;
            continue;
        }
        let space = usize::from(gap && !out.is_empty());
        if out.len() + space + c.len_utf8() > max_bytes {
            break;
        }
        if space == 1 {
            out.push(' ');
        }
        gap = false;
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn control_characters_become_one_space_and_length_is_bounded_at_a_character() {
        assert_eq!(clean("a\r\n\tb\u{1b}[31mc\0", 100), "a b [31mc");
        assert_eq!(clean("\u{202e}evil", 100), "evil");
        assert_eq!(clean("äöü", 5), "äö");
        assert_eq!(clean("ab", 0), "");
    }
}
