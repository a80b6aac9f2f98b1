//! The forms of captions: each trains as the same captions in `metadata.jsonl` do, byte for byte.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Bench, LORA};

/// The lines of the dataset: file name and caption.
fn rows(bench: &Bench) -> Vec<(String, String)> {
    let line = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        (row["file_name"].as_str().unwrap().to_owned(), row["caption"].as_str().unwrap().to_owned())
    };
    fs::read_to_string(bench.bucket("data/metadata.jsonl")).unwrap().lines().map(line).collect()
}

fn write_rows(bench: &Bench, rows: impl Iterator<Item = Value>) {
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    fs::write(bench.bucket("data/metadata.jsonl"), lines.join("\n")).unwrap();
}

/// The LoRA of a few updates on a dataset that `change` has changed, and what the run reported.
fn lora(spec: &Value, change: impl FnOnce(&Bench)) -> (Vec<u8>, String) {
    let bench = Bench::new();
    change(&bench);
    let mut changes = json!({"training": {"maxSteps": 6}});
    crate::support::merge(&mut changes, spec);
    let output = bench.run(&changes);
    assert!(output.status.success(), "{}", crate::support::text(&output));
    (bench.read(LORA), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn text_files_and_tables_train_as_metadata_jsonl() {
    let (lines, log) = lora(&json!({}), |_| {});
    assert!(log.contains("captions: 6 from metadata.jsonl"), "{log}");
    let (texts, log) = lora(&json!({}), |bench| {
        for (name, caption) in rows(bench) {
            fs::write(bench.bucket(&format!("data/{}", name.replace(".png", ".txt"))), caption + "\n").unwrap();
        }
        fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap();
        fs::write(bench.bucket("data/notes.txt"), "not a caption").unwrap();
    });
    assert!(log.contains("captions: 6 from .txt") && log.contains("notes.txt"), "{log}");
    assert!(lines == texts);
    let (table, _) = lora(&json!({}), |bench| {
        let body: String = rows(bench).iter().fold(String::new(), |body, (name, caption)| body + &format!("\"{caption}\",{name}\n"));
        fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap();
        fs::write(bench.bucket("data/metadata.csv"), format!("caption,file_name\n{body}")).unwrap();
    });
    assert!(lines == table);
}

#[test]
fn one_caption_for_all_trains_as_that_caption_on_every_line() {
    let (lines, _) = lora(&json!({}), |bench| write_rows(bench, rows(bench).iter().map(|(name, _)| json!({"file_name": name, "caption": "a sks shape"}))));
    let (setting, log) = lora(&json!({"dataset": {"caption": "a sks shape"}}), |bench| fs::remove_file(bench.bucket("data/metadata.jsonl")).unwrap());
    assert!(log.contains("captions: 6 from dataset.caption"), "{log}");
    assert!(lines == setting);
}

/// Which caption is drawn follows from the place in the run: a killed run ends with the same LoRA.
#[test]
fn several_captions_are_drawn_anew_each_epoch_and_exactly_after_a_kill() {
    let several = |bench: &Bench| {
        write_rows(bench, rows(bench).iter().map(|(name, caption)| json!({"file_name": name, "caption": [caption, "a thing", format!("{caption}, flat")]})));
    };
    let changes = json!({"checkpoint": {"everySteps": 2}, "training": {"maxSteps": 14}});
    let whole = Bench::new();
    several(&whole);
    whole.complete(&changes);
    let killed = Bench::new();
    several(&killed);
    let mut running = killed.start(&changes, &[]);
    running.await_log("saved a checkpoint");
    running.signal("KILL");
    running.wait();
    killed.wipe_cache();
    killed.complete(&changes);
    assert!(whole.read(LORA) == killed.read(LORA));
    let first = Bench::new();
    first.complete(&changes);
    assert!(whole.read(LORA) != first.read(LORA), "the other captions are trained too");
}

#[test]
fn a_trigger_word_trains_as_if_it_stood_in_every_caption() {
    let (plain, _) = lora(&json!({}), |_| {});
    for position in ["Front", "Behind"] {
        let written = |caption: &str| if position == "Front" { format!("sks, {caption}") } else { format!("{caption}, sks") };
        let (lines, _) = lora(&json!({}), |bench| {
            write_rows(bench, rows(bench).iter().map(|(name, caption)| json!({"file_name": name, "caption": written(caption)})));
        });
        let (setting, log) = lora(&json!({"dataset": {"captions": {"triggerWord": "sks", "triggerPosition": position}}}), |_| {});
        assert!(lines == setting && lines != plain, "{position}");
        assert!(log.contains("captions are changed: \\\"sks\\\""), "{log}");
    }
}

/// A folder cannot have empty captions, so that of all of them stands for what every other caption would be: `feed.rs` compares with empty ones.
#[test]
fn with_all_captions_dropped_it_does_not_matter_what_they_are() {
    let dropped = |share: &str| json!({"dataset": {"captions": {"dropout": share}}});
    let exchanged = |bench: &Bench| {
        let rows = rows(bench);
        let captions = rows.iter().map(|(_, caption)| caption).rev();
        write_rows(bench, rows.iter().zip(captions).map(|((name, _), caption)| json!({"file_name": name, "caption": caption})));
    };
    let (always, _) = lora(&dropped("1"), |_| {});
    let (always_one, _) = lora(&dropped("1"), |bench| {
        write_rows(bench, rows(bench).iter().map(|(name, _)| json!({"file_name": name, "caption": "one caption for all"})));
    });
    let (never, plain) = (lora(&dropped("0"), |_| {}).0, lora(&json!({}), |_| {}).0);
    let (sometimes, _) = lora(&dropped("0.5"), |_| {});
    assert!(always == lora(&dropped("1"), exchanged).0 && always == always_one);
    assert!(never == plain && plain != lora(&json!({}), exchanged).0, "without dropout it does matter");
    assert!(sometimes != always && sometimes != never);
}

/// Orders and dropout follow from the place in the run: a killed run, prepared anew, ends with the same LoRA.
#[test]
fn shuffled_and_dropped_captions_are_the_same_after_a_kill() {
    let tags =
        |bench: &Bench| write_rows(bench, rows(bench).iter().map(|(name, caption)| json!({"file_name": name, "caption": format!("{caption}, a, b, c, d")})));
    let changes = |captions: Value| json!({"checkpoint": {"everySteps": 2}, "training": {"maxSteps": 14}, "dataset": {"captions": captions}});
    let settings = changes(json!({"triggerWord": "sks", "tagOrders": 4, "keepTags": 1, "dropout": "0.4"}));
    let uninterrupted = |changes: &Value| {
        let bench = Bench::new();
        tags(&bench);
        bench.complete(changes);
        bench.read(LORA)
    };
    let whole = uninterrupted(&settings);
    let killed = Bench::new();
    tags(&killed);
    let mut running = killed.start(&settings, &[]);
    running.await_log("saved a checkpoint");
    running.signal("KILL");
    running.wait();
    killed.wipe_cache();
    killed.complete(&settings);
    assert!(killed.claims() > 1, "it was killed before its end");
    assert!(whole == killed.read(LORA));
    for other in [
        json!({"triggerWord": "sks", "dropout": "0.4"}),
        json!({"triggerWord": "sks", "tagOrders": 4, "dropout": "0.4"}),
        json!({"triggerWord": "sks", "tagOrders": 4, "keepTags": 1}),
    ] {
        assert!(whole != uninterrupted(&changes(other.clone())), "{other}: each setting counts");
    }
}

/// What has no effect, or happens twice, is named.
#[test]
fn settings_that_change_nothing_or_too_much_are_named() {
    let (_, log) = lora(&json!({"dataset": {"captions": {"tagOrders": 2, "keepTags": 1, "triggerWord": "sks"}}}), |bench| {
        write_rows(bench, rows(bench).iter().map(|(name, _)| json!({"file_name": name, "caption": "a sks shape, red"})));
    });
    for part in ["dataset.captions.tagOrders has no effect", "6 pictures have the trigger word in a caption already"] {
        assert!(log.contains(part), "{part}: {log}");
    }
}
