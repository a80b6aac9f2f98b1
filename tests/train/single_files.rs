//! Models in single files: the LoRA is that of the same weights in diffusers' layout, byte for byte.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::models::{put_together, take_apart, validate};
use crate::support::{Bench, LORA, finetune, text};

/// A tensor: type, shape, values.
type Tensor = (String, Value, Vec<u8>);
type Tensors = Vec<(String, Tensor)>;

fn read(path: &Path) -> Tensors {
    let (header, values) = take_apart(path);
    let tensor = |(name, info): (String, Value)| {
        let [first, end] = [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap() as usize);
        (name, (info["dtype"].as_str().unwrap().to_owned(), info["shape"].clone(), values[first..end].to_vec()))
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let (mut header, mut values) = (Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [values.len(), values.len() + bytes.len()]}));
        values.extend_from_slice(bytes);
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    put_together(path, &header, &values);
}

/// Made by `tests/golden/make_single_file.py` of the micro model; diffusers itself converts it back to that.
fn golden() -> Tensors {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/single-file/sd3_micro_incl_all.safetensors"))
}

/// The tensors after a prefix, without it.
fn part(tensors: &Tensors, prefix: &str) -> Tensors {
    tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone()))).collect()
}

const T5: &str = "text_encoders.t5xxl.transformer.";

/// The micro model in diffusers' layout. Single files hold no projection of CLIP-L: diffusers has the identity in its place.
fn usual() -> Bench {
    let bench = Bench::new();
    let path = bench.bucket("models/micro/text_encoder/model.safetensors");
    let mut tensors = read(&path);
    let (_, (dtype, _, bytes)) = tensors.iter_mut().find(|(name, _)| name == "text_projection.weight").unwrap();
    assert_eq!(dtype, "F16");
    *bytes = (0..256).flat_map(|i| (if i / 16 == i % 16 { 0x3c00_u16 } else { 0 }).to_le_bytes()).collect();
    write(&path, &tensors);
    bench
}

/// The model's small files and no weights, since the micro model has sizes of its own that shapes do not say (heads, groups, vocabulary).
fn small_files() -> Bench {
    let bench = Bench::new();
    let model = bench.bucket("models/micro");
    fs::remove_file(model.join("model_index.json")).unwrap();
    for weights in ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model", "text_encoder_3/model"]
    {
        fs::remove_file(model.join(format!("{weights}.safetensors"))).unwrap();
    }
    bench
}

fn job(model: &Value) -> Value {
    json!({"training": {"maxSteps": 2}, "model": {"source": model}})
}

fn run(bench: &Bench, model: &Value) -> Vec<u8> {
    let (code, violations, checked) = validate(bench, &job(model));
    assert!(code == 0 && checked.contains("has every part"), "{violations:?}");
    bench.complete(&job(model));
    bench.read(LORA)
}

#[test]
fn the_lora_of_a_single_file_is_that_of_the_folder() {
    let usual = usual();
    let expected = run(&usual, &json!({}));
    let all = golden();

    let one = small_files();
    write(&one.bucket("models/micro/sd3.safetensors"), &all);
    assert!(run(&one, &json!({})) == expected, "one file, found by itself");
    let result = one.result();
    assert!(result["modelDigest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{result}");
    // The same again is done already; with other weights it is another model.
    one.complete(&job(&json!({})));
    assert_eq!(one.claims(), 1);

    let uri = small_files();
    write(&uri.bucket("models/micro/sd3.safetensors"), &all);
    write(&uri.bucket("models/micro/another.safetensors"), &all);
    let (code, violations, _) = validate(&uri, &job(&json!({})));
    assert!(code != 0 && violations.join("").contains("several files hold the transformer (another.safetensors, sd3.safetensors)"), "{violations:?}");
    assert!(run(&uri, &json!({"objectStore": {"uri": "s3://test/models/micro/sd3.safetensors"}})) == expected, "one file, named as the location");
    let model = uri.bucket("models/micro/sd3.safetensors");
    let mut command = finetune();
    command.args(["sample", "--prompt", "a red circle", "--size", "64", "--steps", "1", "--out"]).arg(uri.path("one.png")).arg("--model").arg(&model);
    let output = command.env("FINETUNE_CACHE_DIR", uri.path("cache")).output().unwrap();
    assert!(output.status.success() && uri.path("one.png").is_file(), "{}", text(&output));

    let separate = small_files();
    let model = separate.bucket("models/micro");
    let rest: Tensors = all.iter().filter(|(name, _)| !name.starts_with("text_encoders.")).cloned().collect();
    write(&model.join("sd3.safetensors"), &rest);
    for (file, prefix) in [
        ("clip/clip_l.safetensors", "text_encoders.clip_l.transformer."),
        ("clip/clip_g.safetensors", "text_encoders.clip_g.transformer."),
        ("t5/xxl/fp16.safetensors", T5),
    ] {
        write(&model.join(file), &part(&all, prefix));
    }
    fs::rename(model.join("tokenizer_3"), model.join("t5/tokenizer")).unwrap();
    let mut files =
        json!({"transformer": "sd3.safetensors", "clipL": "clip/clip_l.safetensors", "clipG": "clip/clip_g.safetensors", "t5": "t5/xxl/fp16.safetensors"});
    let (code, violations, _) = validate(&separate, &job(&json!({"files": files})));
    assert!(code != 0 && violations.join("").contains("spec.model.source.files.t5Tokenizer"), "{violations:?}");
    files["t5Tokenizer"] = json!("t5/tokenizer/tokenizer.json");
    assert!(run(&separate, &json!({"files": files})) == expected, "a file for each part");
}

/// The values of E4M3, from the least: a table of its own, not that of the program.
fn codes() -> Vec<(u8, f32)> {
    let value = |code: u8| {
        let (exponent, fraction) = (i32::from(code >> 3), f32::from(code & 7));
        if exponent == 0 { fraction * 2_f32.powi(-9) } else { (1.0 + fraction / 8.0) * 2_f32.powi(exponent - 7) }
    };
    (0..0x7f_u8).flat_map(|code| [(code, value(code)), (code | 0x80, -value(code))]).collect()
}

#[test]
fn the_lora_with_t5_in_8_bits_is_that_of_the_same_values_in_16() {
    let (codes, all) = (codes(), golden());
    for scale in [None, Some(0.125_f32)] {
        let (usual, scaled) = (usual(), small_files());
        let (mut in_8, mut in_16) = (Tensors::new(), Tensors::new());
        for (name, (_, shape, bytes)) in part(&all, T5) {
            let scale = scale.filter(|_| name.contains("SelfAttention.") && !name.contains("relative") || name.contains("DenseReluDense"));
            let nearest = |b: &[u8]| {
                let value = half::f16::from_le_bytes([b[0], b[1]]).to_f32() / scale.unwrap_or(1.0);
                codes.iter().min_by(|(_, a), (_, b)| (a - value).abs().total_cmp(&(b - value).abs())).copied().unwrap()
            };
            let chosen: Vec<(u8, f32)> = bytes.chunks_exact(2).map(nearest).collect();
            let exact = chosen.iter().flat_map(|(_, value)| half::f16::from_f32(value * scale.unwrap_or(1.0)).to_le_bytes()).collect();
            in_16.push((name.clone(), ("F16".to_owned(), shape.clone(), exact)));
            if let Some(scale) = scale {
                in_8.push((name.replace(".weight", ".scale_weight"), ("F32".to_owned(), json!([]), scale.to_le_bytes().to_vec())));
            }
            in_8.push((name, ("F8_E4M3".to_owned(), shape, chosen.into_iter().map(|(code, _)| code).collect())));
        }
        write(&usual.bucket("models/micro/text_encoder_3/model.safetensors"), &in_16);
        let rest: Tensors = all.iter().filter(|(name, _)| !name.starts_with(T5)).cloned().collect();
        write(&scaled.bucket("models/micro/sd3_incl_clips.safetensors"), &rest);
        write(&scaled.bucket("models/micro/text_encoders/t5xxl_fp8_e4m3fn.safetensors"), &in_8);
        assert!(run(&scaled, &json!({})) == run(&usual, &json!({})), "{scale:?}");
    }
}

#[test]
fn single_files_that_cannot_be_used_are_named() {
    let all = golden();
    let without_t5: Tensors = all.iter().filter(|(name, _)| !name.starts_with(T5)).cloned().collect();
    let refused = |write_to: &dyn Fn(&Path), files: &Value| {
        let bench = small_files();
        write_to(&bench.bucket("models/micro"));
        let source = if files.is_null() { json!({}) } else { json!({"files": files}) };
        let (code, violations, _) = validate(&bench, &job(&source));
        assert_ne!(code, 0);
        violations.join("\n")
    };
    let name = "sd3.safetensors";
    for (content, part) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"[..], "sd3.safetensors is a pointer of Git LFS"),
        (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "sd3.safetensors is a GGUF file"),
        (b"", "sd3.safetensors is empty"),
    ] {
        let found = refused(&|model| fs::write(model.join(name), content).unwrap(), &Value::Null);
        assert!(found.contains(part), "{found}");
    }
    let found = refused(
        &|model| {
            write(&model.join(name), &all);
            let bytes = fs::read(model.join(name)).unwrap();
            fs::write(model.join(name), &bytes[..bytes.len() - 100]).unwrap();
        },
        &Value::Null,
    );
    assert!(found.contains("sd3.safetensors is cut off"), "{found}");
    let found = refused(&|model| write(&model.join(name), &without_t5), &Value::Null);
    assert!(found.contains("holds the text encoder T5") && found.contains("files.t5") && found.contains("withoutT5: true"), "{found}");
    let found = refused(&|model| write(&model.join(name), &all), &json!({"vae": "vae.safetensors"}));
    assert!(found.contains("it has no file vae.safetensors"), "{found}");
    let flux: Tensors = vec![("double_blocks.0.img_attn.qkv.weight".into(), ("F16".into(), json!([1]), vec![0, 0]))];
    let found = refused(&|model| write(&model.join("flux1-dev.safetensors"), &flux), &Value::Null);
    assert!(found.contains("flux1-dev.safetensors is a FLUX.1 model"), "{found}");

    let bench = small_files();
    write(&bench.bucket("models/micro/sd3.safetensors"), &without_t5);
    let (code, violations, checked) = validate(&bench, &job(&json!({"files": {"transformer": name, "withoutT5": true}})));
    assert!(code == 0 && checked.contains("without T5"), "{violations:?} {checked}");
}
