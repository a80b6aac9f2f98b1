//! Forms of metadata files that people have.

use super::json_lines::JsonLines;
use super::*;

const KEYS: Keys<'static> = Keys { image: FILE_NAME, caption: "caption" };

fn parse(text: &[u8]) -> Rows {
    parse_with(text, KEYS)
}

fn parse_with(text: &[u8], keys: Keys<'_>) -> Rows {
    // In pieces of every small size the result is the same.
    let read = |size: usize| {
        let (mut rows, source) = (Rows::default(), Arc::from("metadata.jsonl"));
        let mut parser = JsonLines::new(&mut rows, &source, false, keys);
        text.chunks(size).for_each(|piece| parser.push(piece));
        parser.finish();
        rows
    };
    let whole = read(text.len().max(1));
    for size in [1, 2, 3, 7] {
        let other = read(size);
        assert_eq!((&other.rows, &other.problems), (&whole.rows, &whole.problems));
    }
    whole
}

fn table(text: &[u8], keys: Keys<'_>) -> Rows {
    let mut rows = Rows::default();
    csv::read(text, &mut rows, &Arc::from("sub/metadata.csv"), false, keys);
    rows
}

/// Line, name and captions of each row.
fn simple(rows: &Rows) -> Vec<(u64, &str, Vec<&str>)> {
    fn captions(row: &Row) -> Vec<&str> {
        row.captions.iter().flatten().map(String::as_str).collect()
    }
    rows.rows.iter().map(|row| (row.line, row.file_name.as_str(), captions(row))).collect()
}

/// Everything that is wrong, a line each; captions that are missing count.
fn listed(rows: &Rows) -> Vec<String> {
    let mut problems = rows.problems.clone();
    for row in &rows.rows {
        if let Err(kind) = &row.captions {
            problems.push(Problem { source: None, line: Some(row.line), file_name: Some(row.file_name.clone()), kind: kind.clone() });
        }
    }
    problems.listed().iter().map(ToString::to_string).collect()
}

#[test]
fn reads_rows_with_sub_folders_other_keys_crlf_bom_blank_lines_and_no_last_newline() {
    let text =
        "\u{feff}{\"file_name\": \"a.png\", \"caption\": \"ein Hund läuft\", \"x\": [1]}\r\n\n  \n{\"caption\": \" c \", \"file_name\": \"./sub/b c.jpg\"}";
    let metadata = parse(text.as_bytes());
    assert!(metadata.problems.is_empty(), "{}", metadata.problems);
    assert_eq!(simple(&metadata), [(1, "a.png", vec!["ein Hund läuft"]), (4, "sub/b c.jpg", vec![" c "])]);
}

#[test]
fn every_problem_is_found_at_once_with_its_line() {
    let lines: Vec<(&[u8], &str)> = vec![
        (br#"{"file_name": "ok.png", "caption": "c"}"#, ""),
        (br#"{"file_name": "x.png", "caption": "c""#, "line 2: not a JSON object: EOF while parsing an object at column 37"),
        (b"[1]", "line 3: not a JSON object: the line holds a list"),
        (b"\xff\xfe", "line 4: not UTF-8 (Latin-1 or Windows-1252?): save the file as UTF-8"),
        (br#"{"caption": "c"}"#, "line 5: key \"file_name\" is missing"),
        (br#"{"file_name": "y.png"}"#, "line 6: \"y.png\": key \"caption\" is missing"),
        (br#"{"file_name": "z.png", "caption": ""}"#, "line 7: \"z.png\": \"caption\" is empty"),
        (br#"{"file_name": "w.png", "caption": "  "}"#, "line 8: \"w.png\": \"caption\" is empty"),
        (br#"{"file_name": "v.png", "caption": null}"#, "line 9: \"v.png\": \"caption\" must be a string, not null"),
        (br#"{"file_name": 7, "caption": 8}"#, "line 10: \"file_name\" must be a string, not a number\nline 10: \"caption\" must be a string, not a number"),
        (
            br#"{"file_name": "ok.png", "caption": "d"}"#,
            "line 11: \"ok.png\": already named on line 1 (several captions of one picture are a list on one line)",
        ),
        (
            br#"{"file_name": "./ok.png", "caption": "d"}"#,
            "line 12: \"ok.png\": already named on line 1 (several captions of one picture are a list on one line)",
        ),
        (br#"{"file_name": "../up.png", "caption": "d"}"#, "line 13: \"../up.png\": the path must stay in the dataset's folder: it has a segment \"..\""),
        (
            br#"{"file_name": "a/../../up.png", "caption": "d"}"#,
            "line 14: \"a/../../up.png\": the path must stay in the dataset's folder: it has a segment \"..\"",
        ),
        (br#"{"file_name": "/etc/passwd", "caption": "d"}"#, "line 15: \"/etc/passwd\": the path must stay in the dataset's folder: it is absolute"),
        (br#"{"file_name": "C:\\a.png", "caption": "d"}"#, "line 16: \"C:\\\\a.png\": the path must stay in the dataset's folder: it is absolute"),
        (
            br#"{"file_name": "a\\b.png", "caption": "d"}"#,
            "line 17: \"a\\\\b.png\": the path must stay in the dataset's folder: it has a backslash; separate folders with \"/\"",
        ),
        (br#"{"file_name": "a\u0000.png", "caption": "d"}"#, "line 18: \"a\\0.png\": the path must stay in the dataset's folder: it has a control character"),
        (
            br#"{"file_name": "a//b.png", "caption": "d"}"#,
            "line 19: \"a//b.png\": the path must stay in the dataset's folder: it has an empty segment or a segment \".\"",
        ),
        (br#"{"file_name": "", "caption": "d"}"#, "line 20: \"file_name\" is empty"),
    ];
    let text: Vec<u8> = lines.iter().flat_map(|(line, _)| [*line, b"\n"].concat()).collect();
    let metadata = parse(&text);
    assert_eq!(metadata.rows.iter().filter(|row| row.captions.is_ok()).count(), 1);
    let got = listed(&metadata);
    let want: Vec<&str> = lines.iter().flat_map(|(_, problem)| problem.lines()).collect();
    assert_eq!(got, want);
}

#[test]
fn over_long_lines_are_skipped_without_being_held() {
    let (mut rows, source) = (Rows::default(), Arc::from("metadata.jsonl"));
    let mut parser = JsonLines::new(&mut rows, &source, false, KEYS);
    parser.push(b"{\"file_name\": \"a.png\", \"caption\": \"");
    for _ in 0..40 {
        parser.push(&vec![b'x'; 1 << 16]);
        assert!(parser.held() <= MAX_LINE);
    }
    parser.push(b"\"}\n{\"file_name\": \"b.png\", \"caption\": \"b\"}\n");
    parser.push(&vec![b'y'; MAX_LINE + 1]);
    parser.finish();
    assert_eq!(simple(&rows), [(2, "b.png", vec!["b"])]);
    let lines: Vec<_> = rows.problems.listed().iter().map(|p| (p.line, p.kind.clone())).collect();
    assert_eq!(lines, [(Some(1), ProblemKind::LineTooLong { limit: MAX_LINE }), (Some(3), ProblemKind::LineTooLong { limit: MAX_LINE })]);
}

#[test]
fn other_keys_are_named_once_with_the_setting() {
    let rows =
        |image: &str, caption: &str| (1..=50).map(|n| format!("{{\"{image}\": \"{n}.png\", \"{caption}\": \"c\", \"x\": 1}}\n")).collect::<Vec<_>>().concat();
    let of = |text: &str| {
        let rows = parse(text.as_bytes());
        let mut all = rows.problems.clone();
        for row in &rows.rows {
            all.push(Problem { source: None, line: Some(row.line), file_name: Some(row.file_name.clone()), kind: row.captions.clone().unwrap_err() });
        }
        all.to_string()
    };
    assert_eq!(
        of(&rows("file_name", "text")),
        "50 problems\n  lines 1 (\"1.png\"), 2 (\"2.png\"), 3 (\"3.png\") and 47 more: key \"caption\" is missing on every line; \
         the keys are \"file_name\", \"text\", \"x\": set dataset.captionColumn: text"
    );
    let both = of(&rows("image", "text"));
    for part in ["2 problems", "\"file_name\" is missing on every line", "set dataset.imageColumn: image", "set dataset.captionColumn: text"] {
        assert!(both.contains(part), "{part}: {both}");
    }
    assert!(of(&rows("a", "b")).contains("set dataset.imageColumn to the right one"));
    assert_eq!(simple(&parse_with(rows("image", "text").as_bytes(), Keys { image: "image", caption: "text" })).len(), 50);
    // Where some lines have the key, the others are named by their lines.
    let text = rows("file_name", "text") + "{\"file_name\": \"z.png\", \"caption\": \"c\"}\n";
    assert!(parse(text.as_bytes()).rows[0].captions.clone().unwrap_err().to_string().contains("\"caption\" is missing"));
}

#[test]
fn whole_files_of_another_form_are_named_once() {
    let text = "{\"file_name\": \"a.png\", \"caption\": \"c\"}\r\n".repeat(9);
    let utf16 = |mark: &str, order: fn(u16) -> [u8; 2]| format!("{mark}{text}").encode_utf16().flat_map(order).collect::<Vec<u8>>();
    for (bytes, part) in [
        (utf16("\u{feff}", u16::to_le_bytes), "UTF-16"),
        (utf16("\u{feff}", u16::to_be_bytes), "UTF-16"),
        (utf16("", u16::to_le_bytes), "UTF-16"),
        (b"PAR1\x15\x04\x15\n\0\n".to_vec(), "Parquet"),
        (b"\n[{\"file_name\": \"a.png\"},\n{\"file_name\": \"b.png\"}]\n".to_vec(), "one JSON array"),
        (b"[\n{\n\"file_name\": \"a.png\"\n}\n]".to_vec(), "one JSON array"),
        (b"{\n  \"file_name\": \"a.png\"\n}\n{\n  \"file_name\": \"a.png\"\n}\n".to_vec(), "over several lines"),
    ] {
        let rows = parse(&bytes);
        assert_eq!((rows.rows.len(), rows.problems.len()), (0, 1), "{part}: {}", rows.problems);
        assert!(rows.problems.to_string().contains(part), "{}", rows.problems);
    }
    let latin1: Vec<u8> = "{\"file_name\": \"a.png\", \"caption\": \"caf\u{e9}\"}\n".repeat(9).chars().map(|c| c as u8).collect();
    assert_eq!(parse(&latin1).problems.to_string().lines().count(), 2);
}

#[test]
fn several_captions_are_a_list_of_texts() {
    let rows = parse(
        b"{\"file_name\": \"a.png\", \"caption\": [\"one\", \"two\"]}\n{\"file_name\": \"b.png\", \"caption\": []}\n\
          {\"file_name\": \"c.png\", \"caption\": [\"x\", 1]}\n{\"file_name\": \"d.png\", \"caption\": [\"x\", \" \"]}\n",
    );
    assert_eq!(simple(&rows)[0], (1, "a.png", vec!["one", "two"]));
    assert_eq!(
        listed(&rows),
        [
            "line 2: \"b.png\": \"caption\" is empty",
            "line 3: \"c.png\": \"caption\" must be a string, not a list of something else than strings",
            "line 4: \"d.png\": \"caption\" must be a string, not a list with an empty caption"
        ]
    );
    let many = format!("{{\"file_name\": \"a.png\", \"caption\": [{}\"z\"]}}\n", "\"y\", ".repeat(MAX_CAPTIONS));
    assert!(listed(&parse(many.as_bytes()))[0].contains("101 captions; at most 100"));
}

#[test]
fn tables_are_read_with_quotes_line_breaks_and_a_byte_order_mark() {
    let text = "\u{feff}caption,file_name,n\r\n\"a dog, \"\"Rex\"\"\",a.png,1\r\n\"two\nlines\",./b c.png,2\n\n,d.png,3\nno,e.png\n";
    let rows = table(text.as_bytes(), KEYS);
    // Names are relative to the table's own folder.
    assert_eq!(simple(&rows)[..2], [(2, "sub/a.png", vec!["a dog, \"Rex\""]), (3, "sub/b c.png", vec!["two\nlines"])]);
    assert_eq!(listed(&rows), ["line 6: \"sub/d.png\": \"caption\" is empty", "line 7: the row has 2 columns, the header 3"]);
    assert!(table(b"image,text\na.png,x\n", KEYS).problems.to_string().contains("dataset.imageColumn: image"));
    assert_eq!(simple(&table(b"image,text\na.png,x\n", Keys { image: "image", caption: "text" })), [(2, "sub/a.png", vec!["x"])]);
}

#[test]
fn tables_of_another_form_are_named_once() {
    for (bytes, part) in [
        (b"file_name;caption\na.png;x\n".to_vec(), "separated by ';'"),
        (b"file_name\tcaption\na.png\tx\n".to_vec(), "separated by '\\t'"),
        (b"".to_vec(), "no header"),
        ("file_name,caption\na.png,x\n".encode_utf16().flat_map(u16::to_le_bytes).collect(), "UTF-16"),
        (b"file_name,caption\na.png,caf\xe9\n".to_vec(), "line 2: not UTF-8"),
    ] {
        let rows = table(&bytes, KEYS);
        assert_eq!((rows.rows.len(), rows.problems.len()), (0, 1), "{part}: {}", rows.problems);
        assert!(rows.problems.to_string().contains(part), "{}", rows.problems);
    }
}
