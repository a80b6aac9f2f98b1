use std::path::Path;
use std::sync::Mutex;

use super::*;
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
        uri: String::new(),
        metadata_file: "metadata.jsonl".into(),
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
    let got: Vec<_> = dataset.samples.iter().map(|s| (s.file_name.as_str(), s.caption.as_str(), s.size, s.image_digest)).collect();
    assert_eq!(got, [("a.PNG", "first", (6, 4), sha256(&a)), ("sub/b.png", "middle", (5, 7), sha256(&b)), ("z.png", "last", (3, 3), sha256(&c))]);
    assert_eq!(dataset.metadata_digest, digest::to_text(&sha256(metadata.as_bytes())));
    let picture = Dataset::load(&store, &dataset.samples[1]).await.unwrap();
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
        "line 5: \"text.png\": not a usable picture: not a PNG, JPEG or WebP file",
        "line 6: \"good.png\": already named on line 1",
        "line 7: \"../out.png\": the path must stay in the dataset's folder: it has a segment \"..\"",
        "line 8: \"bomb.png\": not a usable picture: 65536x65536 pixels are more than the limit of 100000000 pixels and 32768 a side",
        "line 9: \"blank.png\": \"caption\" is empty",
        "\"stray.jpg\": no line of the metadata file names this picture",
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
    let error = Dataset::load(&store, &dataset.samples[0]).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetChanged);
    std::fs::remove_file(dir.path().join("a.png")).unwrap();
    assert_eq!(Dataset::load(&store, &dataset.samples[0]).await.unwrap_err().reason(), Reason::DatasetChanged);
}

#[tokio::test]
async fn a_visitor_sees_each_usable_picture_once() {
    #[derive(Default)]
    struct Seen(Mutex<Vec<(String, Sha256Digest, u32)>>);
    impl Visitor for Seen {
        fn picture(&self, file_name: &str, digest: &Sha256Digest, picture: &RgbImage) {
            self.0.lock().unwrap().push((file_name.to_owned(), *digest, picture.width));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (png(4, 4, 1), png(8, 4, 2));
    let metadata = row("a.png", "a") + &row("b.png", "b") + &row("c.png", "c");
    let store = write(dir.path(), &[("metadata.jsonl", metadata.as_bytes()), ("a.png", &a), ("b.png", &b), ("c.png", b"no")]);
    let seen = Arc::new(Seen::default());
    Dataset::scan_with(&store, &config(OnBadSample::Skip), ScanOptions { parallel: 2, ..ScanOptions::default() }, seen.clone()).await.unwrap();
    let mut seen = seen.0.lock().unwrap().clone();
    seen.sort();
    assert_eq!(seen, [("a.png".to_owned(), sha256(&a), 4), ("b.png".to_owned(), sha256(&b), 8)]);
}
