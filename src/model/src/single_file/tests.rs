use std::path::{Path, PathBuf};

use super::*;
use crate::layout::ModelDir;
use crate::survey::{Header, TensorInfo, header};
use crate::text::CaptionTokenizer;
use crate::weights::Weights;

/// Files that diffusers' own functions convert to the tensors of the folders that they were made of: `tests/golden/make_single_file.py`.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/single-file").join(name)
}

fn folder(path: &str) -> ModelDir {
    ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(path)).unwrap()
}

fn file(path: &Path) -> File {
    let bytes = std::fs::read(path).unwrap();
    let Ok(Header::Whole(tensors)) = header(&bytes, bytes.len() as u64) else { panic!("should have a header") };
    File { path: path.file_name().unwrap().to_string_lossy().into_owned(), header: Ok(tensors) }
}

const PARTS: [Part; 5] = [Part::Transformer, Part::Vae, Part::TextEncoder, Part::TextEncoder2, Part::TextEncoder3];

/// The folder that an arrangement describes, of files in `source`.
fn put_up(arrangement: &Arrangement, source: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in &arrangement.texts {
        std::fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
        std::fs::write(dir.path().join(path), text).unwrap();
    }
    for (path, link) in &arrangement.links {
        std::fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(source.join(link), dir.path().join(path)).unwrap();
    }
    dir
}

/// Every tensor, by name, type and bytes.
fn same(ours: &Weights, theirs: &Weights) {
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for name in theirs.names() {
        let (got, want) = (ours.view(name).unwrap(), theirs.view(name).unwrap());
        if name == "text_projection.weight" && want.shape == [16, 16] {
            let identity = |i: usize| if i / 16 == i % 16 { 1.0 } else { 0.0 };
            assert_eq!(ours.f32(name).unwrap(), (0..256).map(identity).collect::<Vec<f32>>());
            continue;
        }
        let sides = |shape: &[usize]| shape.iter().copied().filter(|side| *side != 1).collect::<Vec<_>>();
        assert_eq!((got.dtype, sides(got.shape), got.bytes), (want.dtype, sides(want.shape), want.bytes), "{name}");
    }
}

#[test]
fn a_single_file_has_every_tensor_of_the_folder() {
    let path = golden("sd3_micro_incl_all.safetensors");
    let (files, micro) = ([file(&path)], folder("fixtures/micro-sd3"));
    let chosen = choose(&files, &Named::default()).unwrap();
    assert_eq!(chosen.len(), 5);
    let configs = PARTS.map(|part| (part, micro.json(part, "config.json").unwrap())).into();
    let made = arrange(&chosen, &Named::default(), &["tokenizer_3/tokenizer.json"], &configs).unwrap();
    let dir = put_up(&made, path.parent().unwrap());
    for part in PARTS {
        same(&Weights::open(&dir.path().join(part.folder())).unwrap(), &Weights::open(&micro.path(part)).unwrap());
    }
    let named = Named { without_t5: true, ..Named::default() };
    let made = arrange(&choose(&files, &named).unwrap(), &named, &[], &configs).unwrap();
    assert!(made.links.len() == 4 && made.texts["model_index.json"].contains(r#""text_encoder_3":[null,null]"#));
}

/// Second attention, norms of queries and keys, another number of blocks; and the configuration by the shapes alone.
#[test]
fn a_transformer_alone_has_every_tensor_and_its_configuration() {
    let path = golden("sd3.5_micro.safetensors");
    let model = folder("golden/cases/train-sd35-nonsquare/model");
    let (config, map) = described(Part::Transformer, &file(&path), None).unwrap();
    assert_eq!(parsed::<MmditConfig>(&config).unwrap(), model.config(Part::Transformer).unwrap());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(TensorMap::FILE), serde_json::to_string(&map).unwrap()).unwrap();
    std::os::unix::fs::symlink(&path, dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    same(&Weights::open(dir.path()).unwrap(), &Weights::open(&model.path(Part::Transformer)).unwrap());
}

/// A file that holds what a part of this configuration has, by shapes.
fn published(part: Part, prefix: &str, wanted: Vec<crate::survey::tensors::Wanted>, last: usize, levels: usize) -> Tensors {
    let mut tensors = Tensors::new();
    for tensor in wanted {
        let place = names::place_of(part, &tensor.names[0], last, levels).unwrap();
        let mut shape = tensor.shape;
        shape[0] *= place.parts;
        tensors.insert(format!("{prefix}{}", place.layer), TensorInfo::made(shape));
    }
    tensors
}

#[test]
fn published_sizes_are_recognised_by_their_shapes() {
    let large = MmditConfig { num_layers: 38, num_attention_heads: 38, caption_projection_dim: 2432, ..MmditConfig::medium(Some("rms_norm"), vec![]) };
    let medium_35 = MmditConfig { pos_embed_max_size: 384, ..MmditConfig::medium(Some("rms_norm"), (0..13).collect()) };
    for (config, name) in
        [(MmditConfig::medium(None, vec![]), "Stable Diffusion 3 Medium"), (medium_35, "Stable Diffusion 3.5 Medium"), (large, "Stable Diffusion 3.5 Large")]
    {
        let tensors = published(Part::Transformer, "model.diffusion_model.", wanted::transformer(&config), config.num_layers - 1, 1);
        let found: MmditConfig = parsed(&configs::infer(Part::Transformer, "model.diffusion_model.", &tensors).unwrap()).unwrap();
        assert_eq!((&found, crate::survey::name(&found)), (&config, name));
    }
    let vae = r#"{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "use_quant_conv": false, "use_post_quant_conv": false, "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D",
        "DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
    let vae: VaeConfig = serde_json::from_str(vae).unwrap();
    let tensors = published(Part::Vae, "first_stage_model.", wanted::vae(&vae, true), 0, 4);
    assert_eq!(parsed::<VaeConfig>(&configs::infer(Part::Vae, "first_stage_model.", &tensors).unwrap()).unwrap(), vae);
    // As the folders of the published models say.
    for (part, config) in [
        (Part::TextEncoder, r#"{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}"#),
        (
            Part::TextEncoder2,
            r#"{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}"#,
        ),
    ] {
        let config: ClipConfig = serde_json::from_str(config).unwrap();
        let tensors = published(part, "", wanted::clip(&config), 0, 1);
        assert_eq!(parsed::<ClipConfig>(&configs::infer(part, "", &tensors).unwrap()).unwrap(), config);
        let kinds: Vec<Part> = KINDS.iter().filter(|kind| kind.is_in(&tensors)).map(|kind| kind.part).collect();
        assert_eq!(kinds, [part]);
    }
    let t5 = r#"{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}"#;
    let t5: T5Config = serde_json::from_str(t5).unwrap();
    let tensors = published(Part::TextEncoder3, "", wanted::t5(&t5), 0, 1);
    assert_eq!(parsed::<T5Config>(&configs::infer(Part::TextEncoder3, "", &tensors).unwrap()).unwrap(), t5);
}

/// Ids of open-clip-torch 3.3.0's `SimpleTokenizer` with its own copy of the vocabulary.
#[test]
fn the_tokenizers_are_those_of_every_clip() {
    #[derive(serde::Deserialize)]
    struct Row {
        caption: String,
        ids: Vec<u32>,
    }
    let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(golden("clip-ids.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (part, pad, id) in [(Part::Tokenizer, "<|endoftext|>", 49407), (Part::Tokenizer2, "!", 0)] {
        std::fs::create_dir(dir.path().join(part.folder())).unwrap();
        for (name, text) in tokenizers::clip(pad) {
            std::fs::write(dir.path().join(part.folder()).join(name), text).unwrap();
        }
        let tokenizer = CaptionTokenizer::clip(&ModelDir::open(dir.path()).unwrap(), part).unwrap();
        for Row { caption, ids } in &rows {
            let got = tokenizer.encode(caption).unwrap();
            // With CLIP-G an exclamation mark is the padding token, wherever it stands.
            let want: Vec<u32> = ids.iter().map(|token| if *token == 256 && id == 0 { 0 } else { *token }).chain(std::iter::repeat(id)).take(77).collect();
            assert_eq!(got, want, "{caption:?}");
        }
    }
}

fn of(path: &str, names: &[&str]) -> File {
    File { path: path.to_owned(), header: Ok(names.iter().map(|name| ((*name).to_owned(), TensorInfo::made(vec![4, 768]))).collect()) }
}

#[test]
fn what_a_file_is_instead_has_a_name() {
    for (tensor, part) in [
        ("model.diffusion_model.label_emb.0.0.weight", "is a Stable Diffusion XL model"),
        ("conditioner.embedders.1.model.ln_final.weight", "is a Stable Diffusion XL model"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "is a FLUX.1 model"),
        ("double_blocks.0.img_attn.qkv.weight", "is a FLUX.1 model"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "is a Stable Diffusion 1 model"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "is a LoRA"),
        ("stranger", "is no file that this program knows"),
        ("first_stage_model.encoder.down.0.block.0.conv1.weight", "is a file with autoencoder"),
    ] {
        let problems = choose(&[of("a.safetensors", &[tensor])], &Named::default()).unwrap_err();
        assert!(problems.len() == 1 && problems[0].contains(part) && problems[0].contains("a.safetensors"), "{problems:?}");
    }
}

#[test]
fn what_is_missing_or_not_plain_is_named_with_its_setting() {
    const TRANSFORMER: &str = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight";
    const VAE: &str = "first_stage_model.encoder.down.0.block.0.conv1.weight";
    let clip = |name: &str| format!("text_encoders.{name}.transformer.{}", names::CLIP_POSITIONS);
    let (l, g) = (clip("clip_l"), clip("clip_g"));
    let refused = |files: &[File], named: &Named| choose(files, named).unwrap_err().join("\n");
    let with_clips = of("sd3_incl_clips.safetensors", &[TRANSFORMER, VAE, &l, &g]);
    let bare = of("sd3.safetensors", &[TRANSFORMER, VAE]);

    let lacking = refused(std::slice::from_ref(&bare), &Named::default());
    for part in ["files.clipL", "files.clipG", "files.t5, or set spec.model.source.files.withoutT5: true"] {
        assert!(lacking.contains(part), "{lacking}");
    }
    let without = Named { without_t5: true, ..Named::default() };
    assert_eq!(choose(std::slice::from_ref(&with_clips), &without).unwrap().len(), 4);
    let both = [with_clips, bare];
    let several = refused(&both, &without);
    assert!(
        several.contains("several files hold the transformer (sd3_incl_clips.safetensors, sd3.safetensors): name one in spec.model.source.files.transformer")
    );
    // CLIP alone: by its width, or by its name in the job.
    let separate = [of("sd3.safetensors", &[TRANSFORMER, VAE]), of("clip_l.safetensors", &[names::CLIP_POSITIONS])];
    assert_eq!(choose(&separate, &without).unwrap_err().len(), 1, "CLIP-G alone is missing");
    let named = Named {
        files: [
            (Part::Transformer, "sd3.safetensors".into()),
            (Part::TextEncoder2, "clip_l.safetensors".into()),
            (Part::TextEncoder, "sd3.safetensors".into()),
        ]
        .into(),
        ..without.clone()
    };
    let wrong = refused(&separate, &named);
    assert!(
        wrong.contains("files.clipL names sd3.safetensors, which holds no text encoder CLIP-L: it is a file with transformer, autoencoder (VAE)"),
        "{wrong}"
    );
    let broken = [File { path: "sd3.safetensors".into(), header: Err("is a pointer of Git LFS".into()) }];
    assert_eq!(refused(&broken, &without), "sd3.safetensors is a pointer of Git LFS");
}

#[test]
fn t5_needs_its_tokenizer() {
    let path = golden("sd3_micro_incl_all.safetensors");
    let files = [file(&path)];
    let micro = folder("fixtures/micro-sd3");
    let configs = PARTS.map(|part| (part, micro.json(part, "config.json").unwrap())).into();
    let chosen = choose(&files, &Named::default()).unwrap();
    let problems = arrange(&chosen, &Named::default(), &[], &configs).unwrap_err();
    assert!(problems.len() == 1 && problems[0].contains("files.t5Tokenizer"), "{problems:?}");
    let named = Named { t5_tokenizer: Some("t5/spiece.model".into()), ..Named::default() };
    assert_eq!(arrange(&chosen, &named, &[], &configs).unwrap().links["tokenizer_3/spiece.model"], "t5/spiece.model");
}

/// ComfyUI's scaled 8 bits: each weight has a scale of its own, which parts of it share.
#[test]
fn eight_bits_are_read_with_their_scales() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    let codes: Vec<u8> = (0..24).map(|i| 0x28 + 3 * i).collect();
    let (half, none) = (0.5_f32.to_le_bytes(), []);
    let qkv = "joint_blocks.0.x_block.attn.qkv.weight";
    let tensors = [
        (qkv, TensorView::new(Dtype::F8_E4M3, vec![6, 4], &codes).unwrap()),
        ("joint_blocks.0.x_block.attn.qkv.scale_weight", TensorView::new(Dtype::F32, vec![], &half).unwrap()),
        ("final_layer.adaLN_modulation.1.weight", TensorView::new(Dtype::F8_E4M3, vec![6, 4], &codes).unwrap()),
        ("scaled_fp8", TensorView::new(Dtype::F8_E4M3, vec![0], &none).unwrap()),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("diffusion_pytorch_model.safetensors");
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let wanted = ["transformer_blocks.0.attn.to_k.weight", "norm_out.linear.weight"].map(|name| vec![name.to_owned()]);
    let map = names::map(Part::Transformer, "", file(&path).header.as_ref().unwrap(), &wanted, 1);
    std::fs::write(dir.path().join(TensorMap::FILE), serde_json::to_string(&map).unwrap()).unwrap();
    let plain = Weights::open_file(&path).unwrap().f32(qkv).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(weights.f32("transformer_blocks.0.attn.to_k.weight").unwrap(), plain[8..16].iter().map(|value| value * 0.5).collect::<Vec<_>>());
    assert_eq!(weights.f32("norm_out.linear.weight").unwrap(), [&plain[12..], &plain[..12]].concat());
    let tensors = crate::survey::mapped(dir.path(), file(&path).header.unwrap()).unwrap();
    let to_k = &tensors["transformer_blocks.0.attn.to_k.weight"];
    assert_eq!((to_k.dtype.as_str(), &to_k.shape[..], to_k.bytes()), ("F8_E4M3", &[2, 4][..], 8));
}
