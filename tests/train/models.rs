//! The look at the model: every form that is accepted, and every one that is refused before anything is computed.

use std::fs;
use std::path::Path;

use finetune_api::Reason;
use serde_json::{Value, json};

use crate::support::{Bench, finetune, text};

/// `finetune validate` of the bench's job: exit code, violations as `path: message`, what was found good.
pub(crate) fn validate(bench: &Bench, changes: &Value) -> (i32, Vec<String>, String) {
    let mut command = finetune();
    command.arg("validate").arg(bench.manifest(changes)).arg("--bucket").arg(format!("s3://test={}", bench.bucket("").display()));
    let output = command.args(["--output", "json"]).env("FINETUNE_CACHE_DIR", bench.path("cache")).output().unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)));
    let line = |v: &Value| format!("{}: {}", v["path"].as_str().unwrap(), v["message"].as_str().unwrap());
    (output.status.code().unwrap(), findings["violations"].as_array().unwrap().iter().map(line).collect(), findings["checked"].to_string())
}

fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// The header of a safetensors file, and the values after it.
pub(crate) fn take_apart(path: &Path) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..end]).unwrap(), bytes[end..].to_vec())
}

pub(crate) fn put_together(path: &Path, header: &serde_json::Map<String, Value>, values: &[u8]) {
    let json = serde_json::to_vec(header).unwrap();
    fs::write(path, [&(json.len() as u64).to_le_bytes()[..], &json, values].concat()).unwrap();
}

fn change_header(path: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let (mut header, values) = take_apart(path);
    change(&mut header);
    put_together(path, &header, &values);
}

/// Splits a file of weights into two shards; returns their index.
fn shard(path: &Path, names: [&str; 2]) -> Value {
    let (header, values) = take_apart(path);
    let mut tensors: Vec<(String, Value)> = header.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    let half = tensors.len() / 2;
    let mut map = serde_json::Map::new();
    for (name, part) in names.iter().zip([tensors.split_off(half), tensors]) {
        let (mut header, mut own) = (serde_json::Map::new(), Vec::new());
        for (key, mut info) in part {
            let [first, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap() as usize);
            info["data_offsets"] = json!([own.len(), own.len() + end - first]);
            own.extend_from_slice(&values[first..end]);
            map.insert(key.clone(), json!(name));
            header.insert(key, info);
        }
        put_together(&path.with_file_name(name), &header, &own);
    }
    fs::remove_file(path).unwrap();
    json!({"metadata": {}, "weight_map": map})
}

const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";
const T5: &str = "text_encoder_3/model.safetensors";

type Change = fn(&Path);

/// A change of the model's folder, and what is reported.
const REFUSED: [(&str, Change, &[&str]); 33] = [
    (
        "no T5, though listed",
        |m| fs::remove_dir_all(m.join("text_encoder_3")).unwrap(),
        &["no folder text_encoder_3/, which model_index.json lists (T5EncoderModel)", "[null, null]"],
    ),
    ("no tokenizer_3", |m| fs::remove_dir_all(m.join("tokenizer_3")).unwrap(), &["no folder tokenizer_3/"]),
    ("no scheduler", |m| fs::remove_dir_all(m.join("scheduler")).unwrap(), &["no folder scheduler/"]),
    (
        "no transformer and no VAE",
        |m| ["transformer", "vae"].iter().for_each(|p| fs::remove_dir_all(m.join(p)).unwrap()),
        &["no folder transformer/", "no folder vae/"],
    ),
    ("no merges", |m| fs::remove_file(m.join("tokenizer/merges.txt")).unwrap(), &["tokenizer/merges.txt, or tokenizer/tokenizer.json"]),
    ("no vocabulary", |m| fs::remove_file(m.join("tokenizer_2/vocab.json")).unwrap(), &["tokenizer_2/vocab.json"]),
    ("an empty tokenizer.json", |m| fs::write(m.join("tokenizer_3/tokenizer.json"), "{}").unwrap(), &["tokenizer_3/tokenizer.json"]),
    ("no weights", |m| fs::remove_file(m.join(TRANSFORMER)).unwrap(), &["transformer/ has no weights"]),
    ("pickles alone", |m| fs::rename(m.join(T5), m.join("text_encoder_3/pytorch_model.bin")).unwrap(), &["text_encoder_3/ has no weights", ".bin"]),
    ("GGUF", |m| fs::rename(m.join(TRANSFORMER), m.join("transformer/sd3-Q4_0.gguf")).unwrap(), &["GGUF"]),
    (
        "a shard missing",
        |m| {
            let index = shard(&m.join(T5), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
            fs::write(m.join("text_encoder_3/model.safetensors.index.json"), index.to_string()).unwrap();
            fs::remove_file(m.join("text_encoder_3/model-00002-of-00002.safetensors")).unwrap();
        },
        &["model-00002-of-00002.safetensors", "does not exist"],
    ),
    (
        "pointers of Git LFS",
        |m| {
            for file in [TRANSFORMER, "vae/diffusion_pytorch_model.safetensors"] {
                fs::write(m.join(file), "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 4170\n").unwrap();
            }
        },
        &["transformer/diffusion_pytorch_model.safetensors is a pointer of Git LFS", "vae/diffusion_pytorch_model.safetensors is a pointer", "git lfs pull"],
    ),
    (
        "cut off",
        |m| {
            let bytes = fs::read(m.join(TRANSFORMER)).unwrap();
            fs::write(m.join(TRANSFORMER), &bytes[..bytes.len() / 2]).unwrap();
        },
        &["transformer/diffusion_pytorch_model.safetensors is cut off"],
    ),
    ("a web page", |m| fs::write(m.join(T5), "<!doctype html><html></html>").unwrap(), &["text_encoder_3/model.safetensors is a web page"]),
    (
        "fp8 of the other kind",
        |m| change_header(&m.join(T5), |h| h.get_mut("shared.weight").unwrap()["dtype"] = json!("F8_E5M2")),
        &["shared.weight is F8_E5M2"],
    ),
    (
        "fp8 in half the bytes",
        |m| change_header(&m.join(T5), |h| h.get_mut("shared.weight").unwrap()["dtype"] = json!("F8_E4M3")),
        &["shared.weight of shape [83, 48] and type F8_E4M3 has 7968 bytes: the file is damaged"],
    ),
    (
        "4 bits by its config",
        |m| change_json(&m.join("transformer/config.json"), |v| v["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_4bit": true})),
        &["quantised by bitsandbytes"],
    ),
    (
        "4 bits by its tensors",
        |m| {
            change_header(&m.join(TRANSFORMER), |h| {
                let any = h["proj_out.weight"].clone();
                h.insert("proj_out.weight.quant_state.bitsandbytes__nf4".into(), any);
            });
        },
        &["quantised to 4 bits by bitsandbytes"],
    ),
    (
        "a tensor missing",
        |m| {
            change_header(&m.join(TRANSFORMER), |h| {
                let gone = h.remove("transformer_blocks.0.attn.to_q.weight").unwrap();
                h.insert("stranger".into(), gone);
            });
        },
        &["transformer/ lacks 1 tensor (\"transformer_blocks.0.attn.to_q.weight\")"],
    ),
    (
        "a table of another size",
        |m| change_json(&m.join("transformer/config.json"), |v| v["pos_embed_max_size"] = json!(16)),
        &["pos_embed.pos_embed has shape [1, 64, 32], not [1, 256, 32]"],
    ),
    (
        "a VAE of other channels",
        |m| change_json(&m.join("vae/config.json"), |v| v["latent_channels"] = json!(4)),
        &["different channels (4 and 16)", "vae/ encoder.conv_out.weight has shape"],
    ),
    (
        "CLIP of another width",
        |m| change_json(&m.join("text_encoder/config.json"), |v| v["projection_dim"] = json!(24)),
        &["the pooled outputs of text_encoder/"],
    ),
    (
        "T5 of another kind",
        |m| change_json(&m.join("text_encoder_3/config.json"), |v| v["feed_forward_proj"] = json!("relu")),
        &["text_encoder_3/config.json", "gated-gelu"],
    ),
    (
        "a scheduler that shifts",
        |m| change_json(&m.join("scheduler/scheduler_config.json"), |v| v["use_dynamic_shifting"] = json!(true)),
        &["use_dynamic_shifting is not supported"],
    ),
    ("a broken config", |m| fs::write(m.join("vae/config.json"), "{").unwrap(), &["vae/config.json"]),
    ("a broken table of contents", |m| fs::write(m.join("model_index.json"), "{").unwrap(), &["failed to understand model_index.json"]),
    ("another norm", |m| change_json(&m.join("transformer/config.json"), |v| v["qk_norm"] = json!("layer_norm")), &["qk_norm"]),
    (
        "Stable Diffusion XL",
        |m| {
            fs::remove_dir_all(m.join("transformer")).unwrap();
            change_json(&m.join("model_index.json"), |v| v["_class_name"] = json!("StableDiffusionXLPipeline"));
        },
        &["it is Stable Diffusion XL (StableDiffusionXLPipeline); this program trains Stable Diffusion 3"],
    ),
    ("FLUX", |m| change_json(&m.join("model_index.json"), |v| v["_class_name"] = json!("FluxPipeline")), &["it is FLUX.1 (FluxPipeline)"]),
    (
        "another transformer",
        |m| change_json(&m.join("transformer/config.json"), |v| v["_class_name"] = json!("FluxTransformer2DModel")),
        &["describes a FluxTransformer2DModel"],
    ),
    (
        "a single file",
        |m| {
            let single = m.join("../single.safetensors");
            fs::rename(m.join(TRANSFORMER), &single).unwrap();
            fs::remove_dir_all(m).unwrap();
            fs::create_dir(m).unwrap();
            fs::rename(single, m.join("sd3_medium.safetensors")).unwrap();
        },
        &["none of its files holds the transformer of a Stable Diffusion 3: sd3_medium.safetensors is a transformer in diffusers' layout"],
    ),
    (
        "one level up",
        |m| {
            let above = m.with_file_name("above");
            fs::rename(m, &above).unwrap();
            fs::create_dir(m).unwrap();
            fs::rename(above, m.join("sd3")).unwrap();
        },
        &["there is one in its folder sd3/"],
    ),
    (
        "many faults at once",
        |m| {
            fs::remove_dir_all(m.join("scheduler")).unwrap();
            fs::remove_file(m.join("tokenizer/vocab.json")).unwrap();
            change_json(&m.join("vae/config.json"), |v| v["act_fn"] = json!("relu"));
            fs::write(m.join(TRANSFORMER), "").unwrap();
        },
        &["no folder scheduler/", "tokenizer/vocab.json", "act_fn is \"relu\"", "transformer/diffusion_pytorch_model.safetensors is empty"],
    ),
];

#[test]
fn what_cannot_be_used_is_named_before_a_run() {
    for (what, change, parts) in REFUSED {
        let bench = Bench::new();
        change(&bench.bucket("models/micro"));
        let (code, violations, _) = validate(&bench, &json!({}));
        assert_eq!(code, i32::from(Reason::InvalidConfig.exit_code()), "{what}: {violations:?}");
        let all = violations.join("\n");
        assert!(violations.iter().all(|v| v.starts_with("spec.model.source: ")) && parts.iter().all(|part| all.contains(part)), "{what}: {all}");
    }
}

/// Forms of a model that are as good as the usual one: the LoRA is the same.
const ACCEPTED: [(&str, Change); 6] = [
    ("dual_attention_layers: null", |m| change_json(&m.join("transformer/config.json"), |v| v["dual_attention_layers"] = Value::Null)),
    ("CLIP's tokenizer.json alone", |m| {
        for part in ["tokenizer", "tokenizer_2"] {
            let folder = m.join(part);
            let vocabulary: Value = serde_json::from_slice(&fs::read(folder.join("vocab.json")).unwrap()).unwrap();
            let merges = fs::read_to_string(folder.join("merges.txt")).unwrap();
            let merges: Vec<Vec<&str>> = merges.lines().filter(|l| !l.starts_with("#version") && !l.is_empty()).map(|l| l.split(' ').collect()).collect();
            let model = json!({"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocabulary, "merges": merges});
            fs::write(folder.join("tokenizer.json"), json!({"version": "1.0", "added_tokens": [], "model": model}).to_string()).unwrap();
            ["vocab.json", "merges.txt"].iter().for_each(|name| fs::remove_file(folder.join(name)).unwrap());
        }
    }),
    ("shards", |m| {
        let index = shard(&m.join(T5), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
        fs::write(m.join("text_encoder_3/model.safetensors.index.json"), index.to_string()).unwrap();
    }),
    ("shards with old names", |m| {
        let names = ["diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "diffusion_pytorch_model-00002-of-00002.fp16.safetensors"];
        let index = shard(&m.join(TRANSFORMER), names);
        fs::write(m.join("transformer/diffusion_pytorch_model.fp16.safetensors.index.json"), index.to_string()).unwrap();
    }),
    ("further tensors", |m| {
        change_header(&m.join("text_encoder/model.safetensors"), |h| {
            let last = h.iter().filter(|(n, _)| *n != "__metadata__").map(|(_, v)| v["data_offsets"][1].as_u64().unwrap()).max().unwrap();
            h.insert("text_model.embeddings.position_ids".into(), json!({"dtype": "I64", "shape": [0], "data_offsets": [last, last]}));
        });
    }),
    ("the table under its other name", |m| {
        change_header(&m.join(T5), |h| {
            let table = h.remove("shared.weight").unwrap();
            h.insert("encoder.embed_tokens.weight".into(), table);
        });
    }),
];

#[test]
fn other_forms_of_the_same_model_give_the_same_lora() {
    let short = json!({"training": {"maxSteps": 2}});
    let usual = Bench::new();
    usual.complete(&short);
    for (what, change) in ACCEPTED {
        let bench = Bench::new();
        change(&bench.bucket("models/micro"));
        let (code, violations, checked) = validate(&bench, &short);
        assert!(code == 0 && checked.contains("has every part"), "{what}: {violations:?}");
        bench.complete(&short);
        assert!(bench.read(crate::support::LORA) == usual.read(crate::support::LORA), "{what}");
    }
}

#[test]
fn a_model_without_t5_on_purpose_says_so() {
    let bench = Bench::new();
    let model = bench.bucket("models/micro");
    ["text_encoder_3", "tokenizer_3"].iter().for_each(|part| fs::remove_dir_all(model.join(part)).unwrap());
    change_json(&model.join("model_index.json"), |v| ["text_encoder_3", "tokenizer_3"].iter().for_each(|part| v[*part] = json!([null, null])));
    let (code, violations, checked) = validate(&bench, &json!({}));
    assert!(code == 0 && checked.contains("without T5"), "{violations:?} {checked}");
}

/// Settings that the model does not allow: another spec mends them, so they are no crash, and nothing was computed before.
#[test]
fn settings_that_do_not_fit_the_model_are_the_users() {
    let lora = |fields: Value| json!({"training": {"maxSteps": 1, "lora": fields}});
    for (changes, path, part) in [
        (json!({"training": {"resolution": 1024}}), "spec.training.resolution", "table of position embeddings reaches to"),
        (lora(json!({"targetModules": ["attn.to_qq"]})), "spec.training.lora.targetModules", "attn.to_qq"),
    ] {
        let bench = Bench::new();
        let (code, violations, _) = validate(&bench, &changes);
        assert_eq!(code, i32::from(Reason::InvalidConfig.exit_code()));
        assert!(violations.iter().any(|v| v.starts_with(path) && v.contains(part)), "{violations:?}");
        let output = bench.run(&changes);
        assert_eq!(output.status.code(), Some(i32::from(Reason::InvalidConfig.exit_code())), "{}", text(&output));
        assert!(text(&output).contains(part), "{}", text(&output));
        assert!(!bench.path("cache/prepared").exists() && !bench.output(".checkpoints").exists(), "{part}");
    }
}

#[test]
fn a_run_names_a_bad_model_first() {
    let bench = Bench::new();
    fs::write(bench.bucket("models/micro").join(TRANSFORMER), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    let output = bench.run(&json!({}));
    assert_eq!(output.status.code(), Some(i32::from(Reason::ModelLoadFailed.exit_code())), "{}", text(&output));
    assert!(text(&output).contains("git lfs pull") && !bench.output(".checkpoints").exists(), "{}", text(&output));
}

/// Each of these starts where the finished run ended: same loss at the start, whichever form the LoRA has.
#[test]
fn a_run_starts_from_a_lora() {
    let first = Bench::new();
    first.complete(&json!({"training": {"maxSteps": 6}, "checkpoint": {"keepAfterSuccess": true}}));
    let end = &first.result()["evaluation"]["end"];
    let again = Bench::new();
    let place = |name: &str| {
        let folder = again.bucket(&format!("start/{name}"));
        fs::create_dir_all(&folder).unwrap();
        folder
    };
    crate::support::copy(&first.output(""), &place("output"));
    fs::copy(first.output("micro.safetensors"), place("kohya").join("any.safetensors")).unwrap();
    let bare = place("bare").join("lora.safetensors");
    fs::copy(first.output(crate::support::LORA), &bare).unwrap();
    change_header(&bare, |h| {
        let renamed =
            std::mem::take(h).into_iter().map(|(name, info)| (name.replace("transformer.transformer_blocks", "base_model.model.transformer_blocks"), info));
        *h = renamed.collect();
    });
    for (number, from) in ["output/", "kohya/", "kohya/any.safetensors", "bare/", "output/micro.safetensors"].iter().enumerate() {
        let uri = format!("s3://test/start/{from}");
        let output = again.run(&json!({"resume": {"fromCheckpoint": uri}, "training": {"maxSteps": 1}, "output": {"uri": format!("s3://test/out/{number}/")}}));
        assert!(output.status.success(), "{from}: {}", text(&output));
        let result: Value = serde_json::from_slice(&again.read(&format!("{number}/result.json"))).unwrap();
        assert_eq!(&result["evaluation"]["start"], end, "{from}");
    }
    for (mut changes, code, part) in [
        (json!({"resume": {"fromCheckpoint": "s3://test/data/"}}), Reason::NotFound, "holds no LoRA file"),
        (json!({"resume": {"fromCheckpoint": "s3://test/start/output/"}, "training": {"lora": {"rank": 8}}}), Reason::InvalidConfig, "set rank to"),
        (
            json!({"resume": {"fromCheckpoint": "s3://test/start/output/"}, "training": {"lora": {"targetModules": ["attn.to_q"]}}}),
            Reason::InvalidConfig,
            "targetModules does not name",
        ),
    ] {
        changes["output"] = json!({"uri": "s3://test/refused/"});
        let output = again.run(&changes);
        assert_eq!(output.status.code(), Some(i32::from(code.exit_code())), "{}", text(&output));
        assert!(text(&output).contains(part), "{}", text(&output));
    }
}
