//! `metadata.csv`: a header and a row per picture, separated by commas, as spreadsheets and pandas write it.

use std::sync::Arc;

use csv::{ByteRecord, ReaderBuilder};

use super::{Cell, Collector, Keys, MAX_LINE, Rows, is_utf16};
use crate::problems::{ProblemKind, WholeFile};

/// Largest file: its rows are kept anyway, so it is read whole.
pub const MAX_FILE: u64 = 256 << 20;

/// Reads the file `source` into `rows`. Problems name the file if `named`.
pub fn read(bytes: &[u8], rows: &mut Rows, source: &Arc<str>, named: bool, keys: Keys<'_>) {
    let mut collector = Collector::new(rows, source, named, keys);
    if let Some(what) = table(bytes, &mut collector) {
        collector.whole(what);
    }
    collector.finish();
}

fn table(bytes: &[u8], collector: &mut Collector<'_>) -> Option<WholeFile> {
    if is_utf16(&bytes[..bytes.len().min(64)]) {
        return Some(WholeFile::Utf16);
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(bytes);
    let mut record = ByteRecord::new();
    // Reading from memory does not fail.
    if !reader.read_byte_record(&mut record).unwrap_or(false) || record.iter().all(|field| field.trim_ascii().is_empty()) {
        return Some(WholeFile::NoHeader);
    }
    if let (1, Some(only)) = (record.len(), record.get(0))
        && let Some(separator) = [b';', b'\t', b'|'].into_iter().find(|separator| only.contains(separator))
    {
        return Some(WholeFile::Separator(char::from(separator)));
    }
    let Some(header) = record.iter().map(|name| std::str::from_utf8(name).ok().map(|name| name.trim().to_owned())).collect::<Option<Vec<String>>>() else {
        collector.problem(Some(1), None, ProblemKind::NotUtf8);
        return None;
    };
    let column = |key: &str| header.iter().position(|name| name == key);
    let (path, caption) = (column(collector.keys.image), column(collector.keys.caption));
    while reader.read_byte_record(&mut record).unwrap_or(false) {
        let line = record.position().map_or(0, |position| line(bytes, position));
        if record.len() == 1 && record.iter().all(<[u8]>::is_empty) {
            continue;
        }
        if record.len() != header.len() {
            collector.problem(Some(line), None, ProblemKind::Columns { found: record.len(), expected: header.len() });
            continue;
        }
        if record.iter().any(|field| field.len() > MAX_LINE) {
            collector.problem(Some(line), None, ProblemKind::LineTooLong { limit: MAX_LINE });
            continue;
        }
        let cell = |at: Option<usize>| match at.and_then(|at| record.get(at)) {
            None => Ok(Cell::Missing),
            Some(field) => std::str::from_utf8(field).map(|text| Cell::Text(text.to_owned())),
        };
        match (cell(path), cell(caption)) {
            (Ok(path), Ok(caption)) => collector.line(line, header.iter().map(String::as_str), &path, caption),
            _ => collector.problem(Some(line), None, ProblemKind::NotUtf8),
        }
    }
    None
}

/// The line of a record. The position may stand before line ends that belong to what precedes it.
fn line(bytes: &[u8], position: &csv::Position) -> u64 {
    let ends = bytes.iter().skip(position.byte() as usize).take_while(|byte| matches!(byte, b'\r' | b'\n'));
    position.line() + ends.filter(|byte| **byte == b'\n').count() as u64
}
