//! The page of a run, in a real browser: nothing is loaded, no error in its console, its numbers are those of `metrics.jsonl`.
//! With `FINETUNE_SCREENSHOTS=FOLDER` it leaves pictures of itself there, for people to look at.

use std::path::Path;

use serde_json::{Value, json};

use finetune_testing::browser::Browser;
use finetune_testing::servers::from_base64;

use crate::support::{Bench, copy, finetune, until};

const WINDOW: (u32, u32) = (1280, 900);
const PHONE: (u32, u32) = (390, 844);

fn screenshot(browser: &mut Browser, name: &str) {
    // A phone has more pixels than a picture may have rows.
    let picture = from_base64(&browser.screenshot(name != "phone"));
    assert!(image::load_from_memory(&picture).unwrap().width() > 100);
    if let Some(folder) = std::env::var_os("FINETUNE_SCREENSHOTS") {
        std::fs::write(Path::new(&folder).join(format!("{name}.png")), picture).unwrap();
    }
}

/// Step and value of a column of `metrics.jsonl`, where it was measured.
fn measured(metrics: &str, column: &str) -> Vec<(u64, f64)> {
    let records = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter_map(|record| Some((record["step"].as_u64()?, record[column].as_f64()?))).collect()
}

/// The same of a series in a chart on the page.
fn drawn(browser: &mut Browser, chart: &str, series: usize) -> Vec<(u64, f64)> {
    let data = browser.evaluate(&format!("finetune.charts.get({chart:?}).chart.data.map((column) => Array.from(column))"));
    let (steps, values) = (data[0].as_array().unwrap(), data[series].as_array().unwrap());
    steps.iter().zip(values).filter_map(|(step, value)| Some((step.as_u64()?, value.as_f64()?))).collect()
}

#[test]
fn the_published_page_shows_the_run() {
    let bench = Bench::new();
    copy(&bench.bucket("data"), &bench.bucket("held-out"));
    std::fs::write(bench.bucket("data/06-odd.png"), std::fs::read(bench.bucket("data/00-red-circle.png")).unwrap()).unwrap();
    let caption = "an odd caption: <b>\"bold\"</b> & {{ braces }} </script>";
    let line = json!({"file_name": "06-odd.png", "caption": caption}).to_string();
    let lines = std::fs::read_to_string(bench.bucket("data/metadata.jsonl")).unwrap();
    std::fs::write(bench.bucket("data/metadata.jsonl"), format!("{}\n{line}\n", lines.trim_end())).unwrap();
    bench.complete(&json!({
        "training": {"maxSteps": 12},
        "validation": {"prompts": ["a red circle", "a blue square"], "datasetUri": "s3://test/held-out/", "everySteps": 4, "steps": 3},
    }));
    let page = bench.read("report.html");
    assert!(page.len() < 10_000_000, "{}", page.len());
    let known = &bench.result()["files"]["report.html"];
    assert_eq!(known["sha256"], finetune_common::digest::to_text(&finetune_common::digest::sha256(&page)));

    let mut browser = Browser::open(&format!("file://{}", bench.output("report.html").display()), WINDOW);
    let metrics = String::from_utf8(bench.read("metrics.jsonl")).unwrap();
    for (chart, series, column, count) in [
        ("Loss", 1, "loss", 12),
        ("Loss", 3, "evaluationLoss", 2),
        ("Learning rate", 1, "learningRate", 12),
        ("Gradient norm, before clipping", 1, "gradientNorm", 12),
        ("Seconds per step", 1, "stepSeconds", 12),
    ] {
        let wanted = measured(&metrics, column);
        assert_eq!(wanted.len(), count, "{column}");
        assert_eq!(drawn(&mut browser, chart, series), wanted, "{column}");
    }

    // Hovering shows the numbers of the step under the mouse.
    let place =
        browser.evaluate("(() => { const r = document.querySelector('.u-over').getBoundingClientRect(); return [r.right - 2, r.top + r.height / 2] })()");
    browser.point_at((place[0].as_f64().unwrap(), place[1].as_f64().unwrap()));
    browser.until("document.querySelector('.u-legend .u-value').textContent === '12'");
    let shown = browser.evaluate("Number(document.querySelectorAll('.u-legend .u-value')[1].textContent)").as_f64().unwrap();
    let last = measured(&metrics, "loss")[11].1;
    assert!((shown - last).abs() < 1e-5 * last, "{shown} {last}");

    // The slider: the end at first, then the beginning.
    assert_eq!(browser.evaluate("document.getElementById('slider-step').value"), "step 12");
    let source = |browser: &mut Browser| browser.evaluate("document.querySelector('#pictures img').src");
    let end = source(&mut browser);
    browser.evaluate("(() => { const s = document.getElementById('slider'); s.value = 0; s.dispatchEvent(new Event('input')) })()");
    assert_eq!(browser.evaluate("document.getElementById('slider-step').value"), "step 4");
    assert_ne!(source(&mut browser), end);
    assert_eq!(browser.evaluate("[...document.querySelectorAll('#pictures figcaption')].map((f) => f.textContent)"), json!(["a red circle", "a blue square"]));

    // Every picture is one, and captions are text.
    browser.until("[...document.images].every((i) => { i.loading = 'eager'; return i.complete && i.naturalWidth > 0 })");
    assert_eq!(browser.evaluate("document.querySelectorAll('.sheet img').length"), 7);
    assert!(
        browser.evaluate("[...document.querySelectorAll('.sheet figcaption span')].map((s) => s.textContent)").as_array().unwrap().contains(&json!(caption))
    );
    assert!(browser.evaluate("document.querySelector('img.comparison').naturalWidth").as_u64().unwrap() > 300);
    let text = browser.evaluate("document.body.textContent");
    let result = bench.result();
    for wanted in [&result["specHash"], &result["datasetDigest"], &result["modelDigest"], &result["artifacts"][0]["sha256"]] {
        assert!(text.as_str().unwrap().contains(wanted.as_str().unwrap()), "{wanted}");
    }
    for wanted in ["load_lora_weights", "trained: 12 steps", "optimizer.learningRate", "Planned, largest stage", "encoding captions"] {
        assert!(text.as_str().unwrap().contains(wanted), "{wanted}");
    }

    // As it is looked at.
    let background = "getComputedStyle(document.body).backgroundColor";
    browser.color_scheme("light");
    let light = browser.evaluate(background);
    screenshot(&mut browser, "light");
    browser.color_scheme("dark");
    assert_ne!(browser.evaluate(background), light);
    screenshot(&mut browser, "dark");
    browser.window(PHONE, 2);
    browser.until("[...finetune.charts.values()].every(({chart}) => chart.width <= 390)");
    assert_eq!(browser.evaluate("[document.documentElement.scrollWidth, innerWidth]"), json!([390, 390]), "wider than a phone");
    screenshot(&mut browser, "phone");
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
}

#[test]
fn the_page_is_served_and_follows_a_run_that_lasts() {
    let bench = Bench::new();
    let log = || std::fs::read_to_string(bench.path("log")).unwrap_or_default();
    let mut command = finetune();
    let changes = json!({"training": {"maxSteps": 100_000}, "checkpoint": {"everySteps": 5}});
    command.arg("run").arg(bench.manifest(&changes)).args(["--progress-address", "127.0.0.1:0"]);
    command.arg("--bucket").arg(format!("s3://test={}", bench.bucket("").display())).arg("--cache-dir").arg(bench.path("cache"));
    let mut child = command.stderr(std::fs::File::create(bench.path("log")).unwrap()).spawn().unwrap();
    until(|| log().contains("saved a checkpoint") || child.try_wait().unwrap().is_some());
    let printed = log();
    let address = printed.lines().find_map(|line| line.strip_prefix("note: look at the run at ")).unwrap_or_else(|| panic!("{printed}")).to_owned();
    let mut browser = Browser::open(&address, WINDOW);
    browser.until("document.getElementById('status').textContent.startsWith('training: step ')");
    let step = "Math.max(...finetune.charts.get('Loss').chart.data[0])";
    let before = browser.evaluate(step).as_u64().unwrap();
    browser.evaluate("window.sameDocument = true");
    browser.until(&format!("{step} > {before}"));
    assert_eq!(browser.evaluate("window.sameDocument === true && document.querySelectorAll('.sheet img').length === 6"), true);
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
    // The page lies beside the measurements of the attempt, too.
    let kept = bench.files(".checkpoints").into_iter().find(|(path, _)| path.ends_with("logs/e1/report.html")).unwrap().1;
    assert!(kept.starts_with(b"<!doctype html>") && kept.trim_ascii_end().ends_with(b"</html>"));
    child.kill().unwrap();
    child.wait().unwrap();
}
