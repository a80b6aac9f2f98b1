//! Pages of listings, between server and `object_store`.
//!
//! Other clients may create keys that no path of `object_store` can hold (`a//b`, `..`, control characters), and one of them fails its whole
//! page there. So a page is looked through first, as text: some servers write control characters in a way that is no XML. Entries
//! of such keys are taken out, to be named by the caller. A server that answers with the continuation token it was asked for would be
//! asked for ever: that is an error.

use std::borrow::Cow;

use object_store::path::Path as ObjectPath;
use quick_xml::escape::unescape;
use url::form_urlencoded;

/// How a protocol writes a listing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dialect {
    /// Element of one object.
    entry: &'static str,
    /// Element of its key.
    key: &'static str,
    /// Element of the token of the next page.
    next: &'static str,
    /// Parameter that asks for the page of a token.
    token: &'static str,
}

/// Amazon's version 2, which Google speaks too.
const S3: Dialect = Dialect { entry: "Contents", key: "Key", next: "NextContinuationToken", token: "continuation-token" };
const AZURE: Dialect = Dialect { entry: "Blob", key: "Name", next: "NextMarker", token: "marker" };

/// A page that `object_store` can read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// The document.
    pub(super) body: String,
    /// The keys that were taken out of it.
    pub(super) left_out: Vec<String>,
}

/// The dialect of a listing's query; `None` for other requests.
pub(super) fn dialect(query: &str) -> Option<Dialect> {
    form_urlencoded::parse(query.as_bytes()).find_map(|(name, value)| match (&*name, &*value) {
        ("list-type", "2") => Some(S3),
        ("comp", "list") => Some(AZURE),
        _ => None,
    })
}

/// The query with spaces as `%20`: all servers read that, not all of them `+`. Signatures are of the decoded values.
pub(super) fn with_plain_spaces(query: &str) -> Cow<'_, str> {
    if query.contains('+') { query.replace('+', "%20").into() } else { query.into() }
}

/// Looks through the page `body` that answers `query`.
///
/// # Errors
/// What is wrong with the server, if its pages never end.
pub(super) fn page(dialect: &Dialect, query: &str, body: &[u8]) -> Result<Page, String> {
    let text = String::from_utf8_lossy(body);
    if let Some(next) = element(&text, dialect.next).filter(|token| !token.is_empty()) {
        let next = unescape(next).unwrap_or(Cow::Borrowed(next));
        if form_urlencoded::parse(query.as_bytes()).any(|(name, value)| name == dialect.token && value == next) {
            return Err("the server answers with the continuation token that it was asked for: its listing never ends".to_owned());
        }
    }
    let (open, close) = (format!("<{}>", dialect.entry), format!("</{}>", dialect.entry));
    let (mut kept, mut left_out) = (String::with_capacity(text.len()), Vec::new());
    let mut rest = &*text;
    while let Some((start, length)) = rest.find(&open).and_then(|start| Some((start, rest[start..].find(&close)? + close.len()))) {
        let entry = &rest[start..start + length];
        kept.push_str(&rest[..start]);
        match element(entry, dialect.key) {
            Some(key) => match usable(key) {
                Ok(()) => kept.push_str(entry),
                Err(key) => left_out.push(key),
            },
            None => kept.push_str(entry),
        }
        rest = &rest[start + length..];
    }
    kept.push_str(rest);
    Ok(Page { body: kept, left_out })
}

/// Whether `object_store` takes the key; the key itself where not. The replacement character stands for bytes that are no text: here or, as in gofakes3, on
/// the server, which then knows no such key.
fn usable(key: &str) -> Result<(), String> {
    let Ok(decoded) = unescape(key) else { return Err(key.to_owned()) };
    let unreadable = decoded.contains(char::REPLACEMENT_CHARACTER);
    if unreadable || ObjectPath::parse(&*decoded).is_err() { Err(decoded.into_owned()) } else { Ok(()) }
}

/// The text of the first element `name`, which has no child elements.
pub(super) fn element<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = document;
    loop {
        rest = &rest[rest.find(&format!("<{name}"))? + name.len() + 1..];
        if rest.starts_with(['>', ' ']) {
            let (tag, text) = rest.split_once('>')?;
            return if tag.ends_with('/') { Some("") } else { text.find("</").map(|end| &text[..end]) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(keys: &[&str], next: &str) -> String {
        let entry = |key: &&str| format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>");
        let next = if next.is_empty() { String::new() } else { format!("<NextContinuationToken>{next}</NextContinuationToken>") };
        format!("<ListBucketResult><Prefix>data/</Prefix>{next}{}</ListBucketResult>", keys.iter().map(entry).collect::<String>())
    }

    #[test]
    fn keys_that_no_path_can_hold_are_taken_out_and_named() {
        let good = ["data/a.png", "data/a &amp; b&lt;c&gt;", "data/", "data/ü%20", "data/&quot;x&quot;"];
        let bad = ["data//b", "data/./c", "data/../d", "data/e&#10;f", "data/g\u{1}h", "data/i&#x1;j", "data/k&bogus;"];
        let all: Vec<&str> = good.iter().chain(&bad).copied().collect();
        let page = page(&S3, "list-type=2", s3(&all, "").as_bytes()).unwrap();
        assert_eq!(page.body, s3(&good, ""));
        assert_eq!(page.left_out, ["data//b", "data/./c", "data/../d", "data/e\nf", "data/g\u{1}h", "data/i\u{1}j", "data/k&bogus;"]);
    }

    #[test]
    fn a_key_of_other_bytes_than_utf8_is_taken_out() {
        // Servers that replace such bytes themselves know no object by the name that they list.
        let replaced = page(&S3, "list-type=2", s3(&["data/a", "data/\u{fffd}b"], "").as_bytes()).unwrap();
        assert_eq!((replaced.body, replaced.left_out), (s3(&["data/a"], ""), vec!["data/\u{fffd}b".to_owned()]));
        let body: Vec<u8> = s3(&["data/a", "data/?"], "").bytes().map(|b| if b == b'?' { 0xff } else { b }).collect();
        let page = page(&S3, "list-type=2", &body).unwrap();
        assert_eq!((page.body, page.left_out.len()), (s3(&["data/a"], ""), 1));
    }

    #[test]
    fn a_token_that_comes_back_is_an_error() {
        let body = s3(&["a"], "x&amp;y=");
        assert!(page(&S3, "list-type=2&prefix=", body.as_bytes()).is_ok());
        assert!(page(&S3, "continuation-token=x%26z%3D&list-type=2", body.as_bytes()).is_ok());
        assert!(page(&S3, "continuation-token=x%26y%3D&list-type=2", body.as_bytes()).is_err());
    }

    #[test]
    fn blobs_of_azure_are_listed_alike() {
        assert_eq!(dialect("comp=list&prefix=a&restype=container"), Some(AZURE));
        let blob = |name: &str| format!("<Blob><Name>{name}</Name><Properties><Etag>1</Etag></Properties></Blob>");
        let document = |blobs: &str| format!("<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>");
        let page = page(&AZURE, "comp=list", document(&format!("{}{}", blob("a/b"), blob("a//c"))).as_bytes()).unwrap();
        assert_eq!((page.body, page.left_out), (document(&blob("a/b")), vec!["a//c".to_owned()]));
    }

    #[test]
    fn other_requests_are_no_listings() {
        assert_eq!(dialect("list-type=2&prefix=a"), Some(S3));
        for query in ["", "uploads", "prefix=list-type%3D2", "comp=block&blockid=1"] {
            assert_eq!(dialect(query), None, "{query}");
        }
        assert_eq!(with_plain_spaces("prefix=odd+50%25+%C3%BC%2Bx%2F"), "prefix=odd%2050%25%20%C3%BC%2Bx%2F");
    }
}
