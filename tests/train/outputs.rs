//! What a run publishes, and that caption i is trained with picture i.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Bench, LORA, finetune, text};

/// Metadata of a safetensors file, and its tensors' names and shapes.
type Header = (std::collections::HashMap<String, String>, Vec<(String, Vec<usize>)>);

fn tensors(bytes: &[u8]) -> Header {
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let mut tensors: Vec<_> = file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
    tensors.sort();
    (header.metadata().clone().unwrap_or_default(), tensors)
}

#[test]
fn lora_files_metrics_and_result_agree() {
    let bench = Bench::new();
    let output = bench.run(&json!({"training": {"maxSteps": 4, "lora": {"alpha": 8}}}));
    assert!(output.status.success(), "{}", text(&output));
    let (metadata, found) = tensors(&bench.read(LORA));
    assert_eq!(metadata["format"], "pt");
    let adapter: Value = serde_json::from_str(&metadata["lora_adapter_metadata"]).unwrap();
    assert_eq!((&adapter["transformer.r"], &adapter["transformer.lora_alpha"]), (&json!(4), &json!(8)));
    assert!(found.contains(&("transformer.transformer_blocks.0.attn.to_q.lora_A.weight".to_owned(), vec![4, 32])), "{found:?}");
    assert!(found.contains(&("transformer.transformer_blocks.1.attn.to_out.0.lora_B.weight".to_owned(), vec![32, 4])), "{found:?}");
    assert_eq!(found.len(), 16);
    let (_, kohya) = tensors(&bench.read("micro.safetensors"));
    assert!(kohya.iter().any(|(name, _)| name == "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"), "{kohya:?}");

    let result = bench.result();
    for artifact in result["artifacts"].as_array().unwrap() {
        let bytes = bench.read(artifact["file"].as_str().unwrap());
        assert_eq!(artifact["sha256"], finetune_common::digest::to_text(&finetune_common::digest::sha256(&bytes)));
        assert_eq!(artifact["sizeBytes"], bytes.len());
    }
    let metrics: Vec<Value> = String::from_utf8(bench.read("metrics.jsonl")).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(metrics.len(), 4 + 2);
    assert_eq!(metrics[0]["evaluationLoss"], result["evaluation"]["start"]);
    assert_eq!(metrics[5]["evaluationLoss"], result["evaluation"]["end"]);
    assert_eq!((&metrics[1]["loss"], &metrics[4]["loss"]), (&result["loss"]["first"], &result["loss"]["last"]));
    assert!(bench.files("logs").iter().any(|(path, bytes)| path.to_string_lossy().contains("tfevents") && bytes.len() > 200));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["loss, fixed noise", "load_lora_weights", LORA, "micro.safetensors"] {
        assert!(stdout.contains(word), "{word}: {stdout}");
    }
}

/// Alpha equal to the rank is what readers assume: no adapter metadata, as the reference script writes it.
#[test]
fn the_default_alpha_needs_no_adapter_metadata() {
    let bench = Bench::new();
    bench.complete(&json!({"training": {"maxSteps": 1}}));
    let (metadata, _) = tensors(&bench.read(LORA));
    assert_eq!(metadata.keys().collect::<Vec<_>>(), ["format"]);
}

/// The number format is that of the files alone: the training is the same, and so is the run that finds its own result again.
#[test]
fn lora_files_have_the_number_format_that_is_asked_for() {
    let run = |dtype: Option<&str>| {
        let bench = Bench::new();
        bench.complete(&json!({"training": {"maxSteps": 3}, "output": {"dtype": dtype}}));
        bench
    };
    let types = |bytes: &[u8]| -> std::collections::BTreeSet<String> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        file.tensors().iter().filter(|(name, _)| !name.ends_with(".alpha")).map(|(_, view)| format!("{:?}", view.dtype())).collect()
    };
    let (default, short) = (run(None), run(Some("F16")));
    for (bench, dtype) in [(&default, "F32"), (&short, "F16"), (&run(Some("BF16")), "BF16")] {
        for file in [LORA, "micro.safetensors"] {
            assert_eq!(types(&bench.read(file)), [dtype.to_owned()].into(), "{file}");
        }
        assert_eq!(bench.result()["artifacts"][0]["dtype"], dtype);
    }
    assert_eq!(default.result()["specHash"], short.result()["specHash"]);
    assert_eq!(default.result()["loss"], short.result()["loss"]);
    assert!(default.read(LORA).len() > short.read(LORA).len() * 3 / 2);
    // Every value is that of the f32 file, rounded.
    let values = |bytes: &[u8]| -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let read = |data: &[u8], dtype| match dtype {
            safetensors::Dtype::F16 => data.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect::<Vec<_>>(),
            _ => data.chunks(4).map(|b| half::f16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_f32()).collect(),
        };
        tensors.iter().flat_map(|(_, view)| read(view.data(), view.dtype())).collect()
    };
    assert_eq!(values(&default.read(LORA)), values(&short.read(LORA)));

    // A result in the format that is asked for, or where none is asked for, is the run's own.
    let again = |bench: &Bench, dtype: Option<&str>| bench.run(&json!({"training": {"maxSteps": 3}, "output": {"dtype": dtype}}));
    for dtype in [None, Some("F16")] {
        let output = again(&short, dtype);
        assert!(output.status.success() && text(&output).contains("was trained already"), "{}", text(&output));
    }
    let output = again(&short, Some("F32"));
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("another number format than F32 (output.dtype)"), "{}", text(&output));
    // One of a version that knew no other format is in F32.
    let mut result = default.result();
    for artifact in result["artifacts"].as_array_mut().unwrap() {
        artifact.as_object_mut().unwrap().remove("dtype");
    }
    std::fs::write(default.output("result.json"), result.to_string()).unwrap();
    for (dtype, code) in [(None, 0), (Some("F32"), 0), (Some("F16"), 78)] {
        let output = again(&default, dtype);
        assert_eq!(output.status.code(), Some(code), "{dtype:?}: {}", text(&output));
    }
}

/// The card is the hub's and people's: it says what was trained, shows the pictures that are there, and names files that are there.
#[test]
fn the_model_card_shows_the_run() {
    let bench = Bench::new();
    bench.complete(&json!({
        "training": {"maxSteps": 2, "lora": {"alpha": 8}},
        "validation": {"prompts": ["a red circle"], "steps": 2, "everySteps": 1},
    }));
    let card = String::from_utf8(bench.read("README.md")).unwrap();
    let (_, rest) = card.split_once("---\n").unwrap();
    let front: Value = finetune_common::yaml::from_str(rest.split_once("\n---\n").unwrap().0).unwrap();
    assert_eq!((&front["library_name"], &front["pipeline_tag"]), (&json!("diffusers"), &json!("text-to-image")));
    assert_eq!(front["widget"], json!([{"text": "a red circle", "output": {"url": "validation/step-000002/0.png"}}]));
    assert!(bench.read("validation/step-000002/0.png").starts_with(b"\x89PNG"));
    assert!(card.contains("![a red circle](validation/step-000002/0.png)"), "{card}");
    for word in [LORA, "micro.safetensors", "| rank, alpha, dropout | 4, 8, 0.1 |", bench.result()["modelDigest"].as_str().unwrap()] {
        assert!(card.contains(word), "{word}: {card}");
    }
    assert!(!card.contains("s3://"), "places are nobody else's business: {card}");
    let (header, _) = tensors(&bench.read("micro.safetensors"));
    assert_eq!((&*header["modelspec.title"], &*header["ss_output_name"], &*header["ss_steps"]), ("micro", "micro", "2"));
    assert_eq!(header["finetune.base_model_digest"], bench.result()["modelDigest"].as_str().unwrap());
    assert_eq!(bench.read("README.md"), bench.read("runs/e1/README.md"));
}

/// Order of lines, names of files, and copies of pictures under other names do not pair a caption with another picture: each
/// variant of the dataset that is the same set of (picture, caption) pairs in the same order of names trains the same LoRA,
/// and exchanging two captions does not.
#[test]
fn captions_follow_their_pictures() {
    let train = |change: &dyn Fn(&Bench)| {
        let bench = Bench::new();
        change(&bench);
        bench.complete(&json!({"training": {"maxSteps": 12, "lora": {"rank": 8}}}));
        bench.read(LORA)
    };
    let rewrite = |bench: &Bench, edit: &dyn Fn(Vec<String>) -> Vec<String>| {
        let path = bench.bucket("data/metadata.jsonl");
        let lines = std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
        std::fs::write(&path, edit(lines).join("\n")).unwrap();
    };
    let original = train(&|_| {});
    let reversed = train(&|bench| rewrite(bench, &|lines| lines.into_iter().rev().collect()));
    assert!(original == reversed, "the order of lines must not matter");
    let exchanged = train(&|bench| {
        rewrite(bench, &|lines| {
            let swap = |l: String| l.replace("a red circle", "a ???").replace("a green square", "a red circle").replace("a ???", "a green square");
            lines.into_iter().map(swap).collect()
        });
    });
    assert!(original != exchanged, "captions must matter");
    // Exchanging pictures and captions alike: the same pairs under each other's names.
    let renamed = train(&|bench| {
        let (a, b, c) = (bench.bucket("data/00-red-circle.png"), bench.bucket("data/01-green-square.png"), bench.path("swap.png"));
        std::fs::rename(&a, &c).unwrap();
        std::fs::rename(&b, &a).unwrap();
        std::fs::rename(&c, &b).unwrap();
        rewrite(bench, &|lines| {
            let swap =
                |l: String| l.replace("00-red-circle.png", "???").replace("01-green-square.png", "00-red-circle.png").replace("???", "01-green-square.png");
            lines.into_iter().map(swap).collect()
        });
    });
    assert!(renamed != exchanged);
}

#[test]
fn validation_pictures_are_published() {
    let bench = Bench::new();
    let changes = json!({"training": {"maxSteps": 5}, "validation": {"prompts": ["a red circle", "a blue square"], "everySteps": 2, "steps": 3}});
    bench.complete(&changes);
    let mut names: Vec<String> =
        bench.files("validation").iter().map(|(p, _)| p.strip_prefix(bench.output("")).unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    let expected: Vec<String> = [2, 4, 5].iter().flat_map(|s| [0, 1].map(|p| format!("validation/step-{s:06}/{p}.png"))).collect();
    assert_eq!(names, expected);
    let picture = image::load_from_memory(&bench.read("validation/step-000005/0.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (32, 32));
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn progress_and_metrics_are_served_while_a_run_lasts() {
    let bench = Bench::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let log = std::fs::File::create(bench.path("log")).unwrap();
    let mut command = finetune();
    command.arg("run").arg(bench.manifest(&json!({"training": {"maxSteps": 100_000}}))).args(["--progress-address", &address]);
    command.arg("--bucket").arg(format!("s3://test={}", bench.bucket("").display())).arg("--cache-dir").arg(bench.path("cache"));
    let mut child = command.stderr(log).spawn().unwrap();
    crate::support::until(|| std::fs::read_to_string(bench.path("log")).unwrap().contains("\"message\":\"training\""));
    let answer = get(&address, "/progress");
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let progress = finetune_api::Progress::parse(body.as_bytes()).unwrap();
    assert_eq!((progress.stage, progress.total_steps), (finetune_api::Stage::Training, 100_000));
    assert!(progress.step >= 1 && progress.loss.is_some() && progress.estimated_completion_time.is_some(), "{progress:?}");
    let metrics = get(&address, "/metrics");
    assert!(metrics.contains("text/plain") && metrics.contains("finetune_trainer_steps_planned 100000"), "{metrics}");
    child.kill().unwrap();
    child.wait().unwrap();
}
