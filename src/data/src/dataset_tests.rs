use std::path::Path;

use super::*;
use finetune_api::plan::{DatasetConfig, OnBadSample};
use finetune_common::digest;
use finetune_store::StoreOptions;

/// A PNG whose pixels follow from `seed`.
fn png(width: u32, height: u32, seed: u8) -> Vec<u8> {
    let picture = ::image::RgbImage::from_fn(width, height, |x, y| ::image::Rgb([seed, x as u8, y as u8]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ::image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn config(on_bad_sample: OnBadSample) -> DatasetConfig {
    DatasetConfig {
        captions: None,
        uri: String::new(),
        caption: None,
        metadata_file: None,
        image_column: None,
        caption_column: "caption".into(),
        repeats: 1,
        expected_digest: None,
        on_bad_sample,
    }
}

fn write(dir: &Path, files: &[(&str, &[u8])]) -> Store {
    for (name, bytes) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    Store::open(dir.to_str().unwrap(), &StoreOptions::default()).unwrap()
}

fn row(name: &str, caption: &str) -> String {
    serde_json::json!({ "file_name": name, "caption": caption }).to_string() + "\n"
}

#[tokio::test]
async fn samples_are_sorted_by_name_with_digest_and_upright_size() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (png(6, 4, 1), png(5, 7, 2), png(3, 3, 3));
    let metadata = row("z.png", "last") + &row("sub/b.png", "middle") + &row("a.PNG", "first");
    let store = write(dir.path(), &[("metadata.jsonl", metadata.as_bytes()), ("z.png", &c), ("sub/b.png", &b), ("a.PNG", &a), ("notes.txt", b"x")]);
    let dataset = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap();
    let got: Vec<_> = dataset.samples.iter().map(|s| (s.file_name.as_str(), s.captions[0].as_str(), s.size, s.image_digest)).collect();
    assert_eq!(got, [("a.PNG", "first", (6, 4), sha256(&a)), ("sub/b.png", "middle", (5, 7), sha256(&b)), ("z.png", "last", (3, 3), sha256(&c))]);
    assert_eq!(dataset.metadata_digest, Some(digest::to_text(&sha256(metadata.as_bytes()))));
    let picture = dataset.pictures(&store).load(&dataset.samples[1]).await.unwrap();
    assert_eq!((picture.width, picture.height, &picture.data[..3]), (5, 7, &[2, 0, 0][..]));
}

#[tokio::test]
async fn the_digest_covers_captions_names_and_pictures_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let scan = async |metadata: &str, files: &[(&str, &[u8])]| {
        let _old = std::fs::remove_dir_all(dir.path());
        let store = write(dir.path(), files);
        std::fs::write(dir.path().join("metadata.jsonl"), metadata).unwrap();
        Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap().digest
    };
    let (a, b) = (png(4, 4, 1), png(4, 4, 2));
    let rows = row("a.png", "a") + &row("b.png", "b");
    let base = scan(&rows, &[("a.png", &a), ("b.png", &b)]).await;
    assert_eq!(base, scan(&rows, &[("a.png", &a), ("b.png", &b), ("readme.md", b"hello")]).await);
    assert_ne!(base, scan(&rows, &[("a.png", &b), ("b.png", &a)]).await);
    assert_ne!(base, scan(&(row("a.png", "A") + &row("b.png", "b")), &[("a.png", &a), ("b.png", &b)]).await);
    assert_ne!(base, scan(&(row("b.png", "b") + &row("a.png", "a")), &[("a.png", &a), ("b.png", &b)]).await);
}

#[tokio::test]
async fn all_problems_are_reported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let good = png(4, 4, 1);
    let mut bomb = png(4, 4, 1);
    bomb[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]); // 65,536 x 65,536 in IHDR
    let crc = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let metadata = row("good.png", "c")
        + "{broken\n"
        + &row("gone.png", "c")
        + &row("cut.png", "c")
        + &row("text.png", "c")
        + &row("good.png", "c")
        + &row("../out.png", "c")
        + &row("bomb.png", "c")
        + &row("blank.png", " ");
    let files: [(&str, &[u8]); 7] = [
        ("metadata.jsonl", metadata.as_bytes()),
        ("good.png", &good),
        ("cut.png", &good[..good.len() / 2]),
        ("text.png", b"hello"),
        ("bomb.png", &bomb),
        ("blank.png", &good),
        ("stray.jpg", b"never read"),
    ];
    let store = write(dir.path(), &files);
    let error = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidDataset);
    let DatasetError::Problems { problems, .. } = &error else { panic!("{error}") };
    let got: Vec<String> = problems.listed().iter().map(ToString::to_string).collect();
    let want = [
        "line 2: not a JSON object: key must be a string at column 2",
        "line 3: \"gone.png\": the file does not exist",
        "line 4: \"cut.png\": not a usable picture: failed to decode PNG",
        "line 5: \"text.png\": not a usable picture: not a PNG, JPEG, WebP, BMP, GIF or TIFF file, but text",
        "line 6: \"good.png\": already named on line 1",
        "line 7: \"../out.png\": the path must stay in the dataset's folder: it has a segment \"..\"",
        "line 8: \"bomb.png\": not a usable picture: 65536x65536 pixels are more than the limit of 100000000 pixels and 32768 a side",
        "line 9: \"blank.png\": \"caption\" is empty",
        "\"stray.jpg\": no caption: no line of the metadata file names the picture",
    ];
    assert_eq!(got.len(), want.len(), "{got:#?}");
    for (got, want) in got.iter().zip(want) {
        assert!(got.starts_with(want), "{got:?} should start with {want:?}");
    }

    let dataset = Dataset::scan(&store, &config(OnBadSample::Skip)).await.unwrap();
    assert_eq!(dataset.samples.iter().map(|s| s.file_name.as_str()).collect::<Vec<_>>(), ["good.png"]);
    assert_eq!(dataset.skipped.len(), 9);
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 }))
}

#[tokio::test]
async fn no_metadata_no_samples_and_no_folder_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = write(dir.path(), &[("a.png", &png(4, 4, 1))]);
    let error = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap_err();
    assert!(matches!(error, DatasetError::NoMetadata { .. }), "{error}");
    assert_eq!(error.reason(), Reason::NotFound);

    let empty = write(&dir.path().join("empty"), &[("metadata.jsonl", b"\n")]);
    let error = Dataset::scan(&empty, &config(OnBadSample::Fail)).await.unwrap_err();
    assert!(matches!(error, DatasetError::NoSamples { .. }), "{error}");
    assert_eq!(error.reason(), Reason::InvalidDataset);

    let missing = Store::open(dir.path().join("missing").to_str().unwrap(), &StoreOptions::default()).unwrap();
    let error = Dataset::scan(&missing, &config(OnBadSample::Fail)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound, "{error}");
}

#[tokio::test]
async fn a_picture_that_changes_after_the_scan_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = write(dir.path(), &[("metadata.jsonl", row("a.png", "a").as_bytes()), ("a.png", &png(4, 4, 1))]);
    let dataset = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap();
    std::fs::write(dir.path().join("a.png"), png(4, 4, 9)).unwrap();
    let error = dataset.pictures(&store).load(&dataset.samples[0]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
    std::fs::remove_file(dir.path().join("a.png")).unwrap();
    assert_eq!(dataset.pictures(&store).load(&dataset.samples[0]).await.unwrap_err().reason(), Reason::DatasetChanged);
}

/// The fixtures that pyarrow has written; `change` edits the configuration.
async fn parquet(folder: &str, change: impl FnOnce(&mut DatasetConfig)) -> (Store, Result<Dataset, DatasetError>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parquet").join(folder);
    let store = Store::open(path.to_str().unwrap(), &StoreOptions::default()).unwrap();
    let mut config = config(OnBadSample::Fail);
    change(&mut config);
    let found = Dataset::scan(&store, &config).await;
    (store, found)
}

/// Name and digest of the pictures that the Parquet fixtures were made from, by caption.
fn originals() -> Vec<(String, Sha256Digest)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/dataset");
    let lines = std::fs::read_to_string(folder.join("metadata.jsonl")).unwrap();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (line["caption"].as_str().unwrap().to_owned(), sha256(&std::fs::read(folder.join(line["file_name"].as_str().unwrap())).unwrap()))
    };
    lines.lines().map(line).collect()
}

/// As the hub has it: the training shards in their order, each picture with its own bytes and caption, other splits left alone.
#[tokio::test]
async fn parquet_files_of_the_hub_are_datasets() {
    let (store, found) = parquet("hub", |config| config.caption_column = "text".into()).await;
    let dataset = found.unwrap();
    let got: Vec<_> = dataset.samples.iter().map(|sample| (sample.captions[0].clone(), sample.image_digest)).collect();
    assert_eq!(got, originals());
    assert_eq!(dataset.samples[3].file_name, "data/train-00000-of-00002.parquet/0000003");
    assert_eq!(dataset.sources.to_string(), "captions: 4 from data/train-00000-of-00002.parquet, 2 from data/train-00001-of-00002.parquet");
    let notices: Vec<String> = dataset.notices.iter().map(ToString::to_string).collect();
    assert!(notices.iter().any(|notice| notice.contains("test-00000-of-00001.parquet")), "{notices:?}");
    // Read again in any order.
    let pictures = dataset.pictures(&store);
    for index in [0, 1, 3, 2, 5, 4, 0, 3] {
        let sample = &dataset.samples[index];
        let picture = pictures.load(sample).await.unwrap();
        assert_eq!((picture.width, picture.height), sample.size);
    }
}

/// Other compression, encodings and page sizes, plain binary pictures, lists of captions: each row has its own.
#[tokio::test]
async fn parquet_files_of_other_writers_are_datasets_too() {
    let (store, found) = parquet("zstd", |config| (config.image_column, config.caption_column) = (Some("img".into()), "captions".into())).await;
    let dataset = found.unwrap();
    assert_eq!(dataset.samples.len(), 18);
    let originals = originals();
    let pictures = dataset.pictures(&store);
    for (index, sample) in dataset.samples.iter().enumerate() {
        let (caption, digest) = &originals[index % 6];
        assert_eq!(sample.captions, [caption.clone(), format!("{caption} again")]);
        assert_eq!(sample.image_digest, *digest);
    }
    for index in [17, 0, 16, 1, 1] {
        pictures.load(&dataset.samples[index]).await.unwrap();
    }
}

/// Other names of columns are found and proposed, once; `dataset.caption` stands in.
#[tokio::test]
async fn columns_of_other_names_are_proposed() {
    let problems = |found: Result<Dataset, DatasetError>| match found.unwrap_err() {
        DatasetError::Problems { problems, .. } => problems.to_string(),
        other => panic!("{other}"),
    };
    let text = problems(parquet("hub", |_| {}).await.1);
    assert!(text.contains("set dataset.captionColumn: text") && text.contains("\"image\", \"text\""), "{text}");
    let text = problems(parquet("zstd", |config| config.caption_column = "captions".into()).await.1);
    assert!(text.contains("set dataset.imageColumn: img"), "{text}");
    let text = problems(parquet("hub", |config| (config.image_column, config.caption_column) = (Some("text".into()), "text".into())).await.1);
    assert!(text.contains("the column \"text\" holds a string: it must hold bytes"), "{text}");
    let dataset = parquet("hub", |config| config.caption = Some("a shape".into())).await.1.unwrap();
    assert!(dataset.samples.iter().all(|sample| sample.captions == ["a shape"]) && dataset.samples.len() == 6);
}

/// A bad row is one line and costs no other row; a file that is cut off is named.
#[tokio::test]
async fn rows_and_files_that_are_broken_are_named() {
    let (_, found) = parquet("nulls", |_| {}).await;
    let DatasetError::Problems { problems, .. } = found.unwrap_err() else { panic!() };
    let text = problems.to_string();
    for part in ["row 2", "no bytes of a picture", "row 3", "not null", "row 4", "0000.parquet/0000003"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(problems.len(), 3, "{text}");
    let dataset = parquet("nulls", |config| config.on_bad_sample = OnBadSample::Skip).await.1.unwrap();
    assert_eq!((dataset.samples.len(), dataset.skipped.len()), (1, 3));

    let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parquet/nulls/0000.parquet")).unwrap();
    let mut damaged = whole.clone();
    // The footer counts more bytes of the column than there are.
    damaged.drain(4..200);
    for bytes in [&whole[..whole.len() - 9], &whole[..4], b"PAR1PAR1", b"", &damaged] {
        let dir = tempfile::tempdir().unwrap();
        let store = write(dir.path(), &[("a.parquet", bytes)]);
        let error = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidDataset, "{error}");
        assert!(error.to_string().contains("a.parquet"), "{error}");
    }
}

/// What is damaged in the middle of a file costs the rows from there on, whose first is named; other compression is named as what it is.
#[tokio::test]
async fn rows_behind_damaged_bytes_are_named() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parquet/hub/data/train-00000-of-00002.parquet");
    let mut damaged = std::fs::read(fixture).unwrap();
    // The header of the page that holds the third and the fourth picture.
    damaged[938..958].fill(0xff);
    let dir = tempfile::tempdir().unwrap();
    let store = write(dir.path(), &[("a.parquet", &damaged)]);
    let config = |policy| DatasetConfig { caption_column: "text".into(), ..config(policy) };
    let DatasetError::Problems { problems, .. } = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap_err() else { panic!() };
    let text = problems.to_string();
    assert!(text.contains("row 3") && text.contains("a.parquet") && text.contains("from this row on"), "{text}");
    let dataset = Dataset::scan(&store, &config(OnBadSample::Skip)).await.unwrap();
    assert_eq!((dataset.samples.len(), dataset.skipped.len()), (2, 1));

    let (_, found) = parquet("gzip", |config| config.caption_column = "text".into()).await;
    let text = found.unwrap_err().to_string();
    assert!(text.contains("pictures.parquet") && text.contains("compressed with GZIP") && text.contains("write it with Snappy or Zstandard"), "{text}");
}

/// What a damaged file announces is compared with what is there before memory is reserved for it.
#[tokio::test]
async fn damaged_files_announce_nothing_that_is_reserved() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parquet/hub/data/train-00000-of-00002.parquet");
    let whole = std::fs::read(fixture).unwrap();
    let edit = |find: &[u8], put: &[u8]| {
        let at = whole.windows(find.len()).position(|window| window == find).unwrap();
        let mut bytes = whole.clone();
        bytes[at + find.len() - put.len()..at + find.len()].copy_from_slice(put);
        bytes
    };
    let mut page = whole.clone();
    // Bytes of the second page of pictures: as many as two bytes can say.
    page[941..943].copy_from_slice(&[0xfe, 0x7f]);
    // Children of the schema's root; bytes of the footer.
    let (schema, mut footer) = (edit(b"schema\x15\x04", &[0x7e]), whole.clone());
    let end = footer.len();
    footer[end - 6] = 0x7f;
    for (bytes, part) in [(page, "its header announces 8191 bytes"), (schema, "its footer is damaged"), (footer, "it is damaged, or the footer larger")] {
        let dir = tempfile::tempdir().unwrap();
        let store = write(dir.path(), &[("a.parquet", &bytes)]);
        let config = DatasetConfig { caption_column: "text".into(), ..config(OnBadSample::Fail) };
        let text = Dataset::scan(&store, &config).await.unwrap_err().to_string();
        assert!(text.contains("a.parquet") && text.contains(part), "{text}");
    }
}

/// The digest is of captions and pictures, whatever the writer's settings; a row that has changed since the scan is refused.
#[tokio::test]
async fn a_parquet_file_that_changes_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parquet/hub/data");
    let store = write(dir.path(), &[("x.parquet", &std::fs::read(fixtures.join("train-00001-of-00002.parquet")).unwrap())]);
    let mut config = config(OnBadSample::Fail);
    config.caption_column = "text".into();
    let dataset = Dataset::scan(&store, &config).await.unwrap();
    std::fs::copy(fixtures.join("train-00000-of-00002.parquet"), dir.path().join("x.parquet")).unwrap();
    assert_eq!(dataset.pictures(&store).load(&dataset.samples[0]).await.unwrap_err().reason(), Reason::DatasetChanged);
    assert_ne!(Dataset::scan(&store, &config).await.unwrap().digest, dataset.digest);
    std::fs::remove_file(dir.path().join("x.parquet")).unwrap();
    assert_eq!(dataset.pictures(&store).load(&dataset.samples[0]).await.unwrap_err().reason(), Reason::DatasetChanged);
}

/// Names, captions and where they come from; with `caption` as `dataset.caption`.
async fn captions(store: &Store, caption: Option<&str>) -> Result<(Vec<(String, Vec<String>)>, String, Vec<String>), DatasetError> {
    let dataset = Dataset::scan(store, &DatasetConfig { caption: caption.map(str::to_owned), ..config(OnBadSample::Fail) }).await?;
    let samples = dataset.samples.into_iter().map(|sample| (sample.file_name, sample.captions)).collect();
    Ok((samples, dataset.sources.to_string(), dataset.notices.iter().map(ToString::to_string).collect()))
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, Vec<String>)> {
    of.iter().map(|(name, caption)| ((*name).to_owned(), vec![(*caption).to_owned()])).collect()
}

#[tokio::test]
async fn a_picture_takes_its_line_then_its_text_file_then_the_jobs_caption() {
    let dir = tempfile::tempdir().unwrap();
    let picture = png(4, 4, 1);
    let metadata =
        row("line.png", "from the line") + "{\"file_name\": \"empty.png\", \"caption\": \"\"}\n{\"file_name\": \"sub/null.png\", \"caption\": null}\n";
    let store = write(
        dir.path(),
        &[
            ("metadata.jsonl", metadata.as_bytes()),
            ("line.png", &picture),
            ("line.txt", b"not read"),
            ("empty.png", &picture),
            ("empty.txt", "\u{feff} from the text \r\n".as_bytes()),
            ("sub/null.png", &picture),
            ("stray.png", &picture),
            ("notes.txt", b"hello"),
        ],
    );
    let (samples, sources, notices) = captions(&store, Some("of the job")).await.unwrap();
    assert_eq!(samples, pairs(&[("empty.png", "from the text"), ("line.png", "from the line"), ("stray.png", "of the job"), ("sub/null.png", "of the job")]));
    assert_eq!(sources, "captions: 1 from metadata.jsonl, 1 from .txt, 2 from dataset.caption");
    assert_eq!(
        notices,
        [
            "1 text file is without a picture of the same name: \"notes.txt\"",
            "1 caption file is not read, as the pictures have captions in a metadata file or a .txt: \"line.txt\""
        ]
    );
    let DatasetError::Problems { problems, .. } = captions(&store, None).await.unwrap_err() else { panic!("not refused") };
    let listed: Vec<String> = problems.listed().iter().map(ToString::to_string).collect();
    assert_eq!(listed[0], "line 3: \"sub/null.png\": \"caption\" must be a string, not null");
    assert!(listed[1].starts_with("\"stray.png\": no caption: no line of the metadata file"), "{listed:?}");
    assert_eq!(listed.len(), 2);
}

#[tokio::test]
async fn folders_without_metadata_are_datasets() {
    let dir = tempfile::tempdir().unwrap();
    let picture = png(4, 4, 1);
    // DreamBooth's: one prompt for all.
    let store = write(&dir.path().join("a"), &[("1.png", &picture), ("sub/2.jpg", &picture)]);
    let (samples, sources, _) = captions(&store, Some("a photo of sks dog")).await.unwrap();
    assert_eq!(samples, pairs(&[("1.png", "a photo of sks dog"), ("sub/2.jpg", "a photo of sks dog")]));
    assert_eq!(sources, "captions: 2 from dataset.caption");
    // Text files, also of several lines; and one that is missing.
    let store =
        write(&dir.path().join("b"), &[("1.png", &picture), ("1.txt", b"one"), ("2.PNG", &picture), ("2.caption", b"two\nlines\n"), ("3.png", &picture)]);
    let DatasetError::Problems { problems, .. } = captions(&store, None).await.unwrap_err() else { panic!("not refused") };
    assert_eq!(problems.to_string(), "1 problem\n  \"3.png\": no caption: no .txt stands beside the picture, and dataset.caption is not set");
    let (samples, sources, notices) = captions(&store, Some("else")).await.unwrap();
    assert_eq!(samples, pairs(&[("1.png", "one"), ("2.PNG", "two\nlines"), ("3.png", "else")]));
    assert_eq!(sources, "captions: 2 from .txt, 1 from dataset.caption");
    assert!(notices[0].contains("1 caption file has several lines; each file is one caption: \"2.PNG\""), "{notices:?}");
    // Text files that are no text.
    for (text, part) in [(&b"caf\xe9"[..], "not UTF-8"), (b"\xff\xfea\0b\0", "UTF-16"), (b" \n", "it is empty")] {
        let store = write(&dir.path().join("b"), &[("1.txt", text), ("3.txt", b"three")]);
        let error = captions(&store, None).await.unwrap_err().to_string();
        assert!(error.contains("\"1.png\": the caption file \"1.txt\" is not usable") && error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn the_layouts_of_imagefolder_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let picture = png(4, 4, 1);
    let files: [(&str, &[u8]); 7] = [
        ("train/a/metadata.csv", b"file_name,caption\n1.png,one\n"),
        ("train/a/1.png", &picture),
        ("train/b/metadata.jsonl", br#"{"file_name": "2.png", "caption": ["two", "zwei"]}"#),
        ("train/b/2.png", &picture),
        ("test/metadata.csv", b"file_name,caption\n3.png,three\n"),
        ("test/3.png", &picture),
        ("README.md", b"x"),
    ];
    let store = write(dir.path(), &files);
    let (samples, sources, notices) = captions(&store, None).await.unwrap();
    assert_eq!(samples, [("train/a/1.png".to_owned(), vec!["one".to_owned()]), ("train/b/2.png".to_owned(), vec!["two".to_owned(), "zwei".to_owned()])]);
    assert_eq!(sources, "captions: 1 from train/a/metadata.csv, 1 from train/b/metadata.jsonl (1 picture has several: one is drawn each epoch)");
    assert_eq!(notices, ["train/ is trained, other splits are left alone: test/ (1 picture)"]);
    // Problems say in which file.
    let store = write(dir.path(), &[("train/a/metadata.csv", b"file_name,caption\n1.png,one\n9.png,x\n")]);
    let error = captions(&store, None).await.unwrap_err().to_string();
    assert!(error.contains("\"train/a/metadata.csv\" line 3: \"train/a/9.png\": the file does not exist"), "{error}");
    let store = write(dir.path(), &[("train/a/metadata.jsonl", b"")]);
    let error = captions(&store, None).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidDataset);
    assert!(error.to_string().contains("set dataset.metadataFile"), "{error}");
}

#[tokio::test]
async fn caption_files_are_part_of_the_digest() {
    let dir = tempfile::tempdir().unwrap();
    let picture = png(4, 4, 1);
    let digest = async |files: &[(&str, &[u8])]| {
        let store = write(dir.path(), files);
        let dataset = Dataset::scan(&store, &config(OnBadSample::Fail)).await.unwrap();
        assert_eq!(dataset.metadata_digest, None);
        dataset.digest
    };
    let base = digest(&[("a.png", &picture), ("a.txt", b"one"), ("b.png", &picture), ("b.txt", b"two")]).await;
    assert_ne!(digest(&[("b.txt", b"three")]).await, base);
    assert_ne!(digest(&[("a.txt", b"two"), ("b.txt", b"one")]).await, base);
    assert_eq!(digest(&[("a.txt", b"one"), ("b.txt", b"two\n"), ("note.md", b"x")]).await, base);
}

#[tokio::test]
async fn a_caption_that_stands_in_for_another_key_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let picture = png(4, 4, 1);
    let store = write(dir.path(), &[("a.png", &picture), ("metadata.jsonl", br#"{"file_name": "a.png", "text": "its own"}"#)]);
    let (samples, _, notices) = captions(&store, Some("of the job")).await.unwrap();
    assert_eq!(samples, pairs(&[("a.png", "of the job")]));
    assert!(notices[0].contains("set dataset.captionColumn: text"), "{notices:?}");
}

#[tokio::test]
async fn pictures_with_transparent_parts_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let encode = |alpha: u8| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        ::image::RgbaImage::from_pixel(3, 3, ::image::Rgba([1, 2, 3, alpha])).write_to(&mut bytes, ::image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let store = write(dir.path(), &[("a.png", &encode(0)), ("b.png", &encode(255)), ("c.png", &encode(254)), ("d.png", &png(3, 3, 1))]);
    let (_, _, notices) = captions(&store, Some("x")).await.unwrap();
    assert!(notices.len() == 1 && notices[0].starts_with("2 pictures have transparent parts") && notices[0].ends_with("\"a.png\", \"c.png\""), "{notices:?}");
}
