//! The tokenizer that every published CLIP has, for files that carry none.

use std::fmt::Write as _;

use serde_json::json;

/// The merges of CLIP's byte-pair encoding, a line each, in the order of their rank: the first 48,894 of OpenAI's `bpe_simple_vocab_16e6.txt`, as far as the
/// vocabulary uses them. MIT licence, beside the file.
const MERGES: &str = include_str!("clip-merges.txt");

/// The files of a CLIP tokenizer's folder: name and content. CLIP-G is padded with `!`, CLIP-L with its end token.
pub(super) fn clip(pad: &str) -> [(&'static str, String); 3] {
    let (begin, end) = ("<|startoftext|>", "<|endoftext|>");
    let config = json!({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": true, "add_prefix_space": false, "errors": "replace",
        "bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad,
    });
    [("vocab.json", vocabulary()), ("merges.txt", format!("#version: 0.2\n{MERGES}")), ("tokenizer_config.json", config.to_string())]
}

/// `vocab.json`: each byte's character, the same at the end of a word, what each merge makes, begin and end.
fn vocabulary() -> String {
    let bytes = characters();
    let words = bytes.iter().map(|c| format!("{c}</w>"));
    let merged = MERGES.lines().map(|line| line.replacen(' ', "", 1));
    let specials = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    let all = bytes.iter().map(char::to_string).chain(words).chain(merged).chain(specials);
    let mut text = String::from("{");
    for (id, token) in all.enumerate() {
        let comma = if id == 0 { "" } else { "," };
        let _infallible = write!(text, "{comma}{}:{id}", json!(token));
    }
    text.push('}');
    text
}

/// The characters that stand for bytes in the order of their ids: printable ones for themselves first, the others as those from U+0100 on.
fn characters() -> Vec<char> {
    let printable = |byte: &u32| (33..=126).contains(byte) || (161..=172).contains(byte) || (174..=255).contains(byte);
    let others = (0..256_u32).filter(|byte| !printable(byte)).count() as u32;
    (0..256).filter(printable).chain(256..256 + others).filter_map(char::from_u32).collect()
}
