//! The article's command and every flag.

use serde_json::{Value, json};

use super::flags::{Becomes, FLAGS, Takes};
use super::job::{Converted, Place, convert};
use crate::validate;
use finetune_api::plan::{Facts, resolve};
use finetune_common::yaml;

const ARTICLE: &str = "--dataset_name datasets/corgi --pretrained_model_name_or_path models/sd3-medium --output_dir out/Corgi_Style --mixed_precision bf16 \
    --resolution 512 --train_batch_size 4 --sample_batch_size 4 --gradient_accumulation_steps 3 --learning_rate 0.0001 --report_to wandb --lr_scheduler constant \
    --lr_warmup_steps 0 --max_train_steps 2000 --weighting_scheme logit_normal --seed 42 --use_8bit_adam --gradient_checkpointing \
    --prior_generation_precision bf16 --caption_column caption";

fn converted(line: &str) -> anyhow::Result<Converted> {
    let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    convert(&args, &Place { name: None, namespace: None, bucket: "s3://team-a".to_owned() })
}

fn spec(line: &str) -> Value {
    converted(line).unwrap().manifest["spec"].clone()
}

const NEEDED: &str = "--dataset_name d --pretrained_model_name_or_path m";

#[test]
fn the_articles_command_is_what_the_defaults_are() {
    let converted = converted(ARTICLE).unwrap();
    assert_eq!(converted.manifest["metadata"]["name"], "corgi-style");
    let jobs = validate::check(&yaml::to_string(&converted.manifest).unwrap()).unwrap();
    let spec = &jobs[0].spec;
    assert_eq!(spec.dataset.uri, "s3://team-a/datasets/corgi/");
    assert_eq!(spec.model.source.object_store.as_ref().unwrap().uri, "s3://team-a/models/sd3-medium/");
    assert_eq!(spec.output.uri, "s3://team-a/loras/Corgi_Style/");
    let defaults =
        resolve(&finetune_api::FineTuneJobSpec { training: finetune_api::TrainingSpec::default(), ..spec.clone() }, "n", "j", &Facts::default()).unwrap();
    let article = resolve(spec, "n", "j", &Facts::default()).unwrap();
    assert_eq!(article.config, defaults.config);
    let remarks = converted.remarks.join("\n");
    for part in ["--report_to has no counterpart", "--sample_batch_size is without effect", "--prior_generation_precision is without effect"] {
        assert!(remarks.contains(part), "{part} is not in {remarks}");
    }
}

#[test]
fn both_forms_of_a_flag_and_a_launcher_in_front_are_read() {
    assert_eq!(spec(&format!("{NEEDED} --rank 8")), spec(&format!("{NEEDED} --rank=8")));
    assert_eq!(spec(&format!("accelerate launch --config_file x.yaml train.py {NEEDED} --rank 8")), spec(&format!("{NEEDED} --rank=8")));
    assert_eq!(spec(&format!("{NEEDED} --logit_mean -0.5"))["training"]["flowMatching"]["logitMean"], "-0.5");
}

#[test]
fn the_scripts_own_defaults_are_written_out() {
    let spec = spec(NEEDED);
    assert_eq!(
        spec["training"],
        json!({
            "epochs": 1, "gradientAccumulationSteps": 1, "optimizer": {"type": "AdamW"}, "learningRateSchedule": {"type": "Constant"},
        })
    );
}

#[test]
fn flags_that_depend_on_others_do() {
    let training = |line: &str| spec(&format!("{NEEDED} {line}"))["training"].clone();
    assert_eq!(training("--lr_scheduler cosine")["learningRateSchedule"], json!({"type": "Cosine", "warmupSteps": 500}));
    assert_eq!(
        training("--lr_scheduler cosine_with_restarts --lr_warmup_steps 10 --lr_num_cycles 3")["learningRateSchedule"],
        json!({"type": "CosineWithRestarts", "warmupSteps": 10, "cycles": "3"})
    );
    assert_eq!(training("--lr_scheduler polynomial --lr_power 2")["learningRateSchedule"]["power"], "2");
    assert_eq!(training("--scale_lr --learning_rate 1e-5 --train_batch_size 2 --gradient_accumulation_steps 5")["optimizer"]["learningRate"], "1e-4");
    assert_eq!(
        training("--optimizer prodigy --learning_rate 1 --prodigy_beta3 0.9 --use_8bit_adam")["optimizer"],
        json!({"type": "Prodigy", "learningRate": "1", "prodigy": {"beta3": "0.9"}})
    );
    assert_eq!(
        training("--lora_blocks 0,12 --lora_layers attn.to_q,attn.to_k")["lora"]["targetModules"],
        json!(["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.12.attn.to_q", "transformer_blocks.12.attn.to_k",])
    );
    let prior =
        "--with_prior_preservation --class_prompt dog --num_class_images 7 --prior_loss_weight 0.5 --prior_generation_precision fp16 --sample_batch_size 2";
    assert_eq!(training(prior)["priorPreservation"], json!({"classPrompt": "dog", "images": 7, "weight": "0.5", "precision": "FP16", "sampleBatchSize": 2}));
    assert_eq!(spec(&format!("{NEEDED} --upcast_before_saving"))["output"]["dtype"], "F32");
    assert!(spec(NEEDED)["output"].get("dtype").is_none());
    let hub = spec(&format!("--dataset_name d --pretrained_model_name_or_path a/b --revision {}", "0".repeat(40)));
    assert_eq!(hub["model"]["source"], json!({"huggingFace": {"repo": "a/b", "revision": "0".repeat(40)}}));
}

#[test]
fn a_prompt_for_all_pictures_is_their_caption() {
    let args = ["--instance_data_dir", "dog", "--pretrained_model_name_or_path", "m", "--instance_prompt", "a photo of sks dog"].map(str::to_owned);
    let found = convert(&args, &Place { name: None, namespace: None, bucket: "s3://team-a".to_owned() }).unwrap();
    assert_eq!(found.manifest["spec"]["dataset"], json!({"uri": "s3://team-a/datasets/dog/", "caption": "a photo of sks dog"}));
    validate::check(&yaml::to_string(&found.manifest).unwrap()).unwrap();
    assert!(found.remarks.iter().any(|remark| remark == "copy the folder \"dog\" to s3://team-a/datasets/dog/"), "{:?}", found.remarks);
}

/// As kohya's `process_caption`; what is not exact is named.
#[test]
fn kohyas_flags_on_captions_become_settings_and_notes() {
    let found = |flags: &[&str]| {
        let args: Vec<String> = NEEDED.split_whitespace().chain(flags.iter().copied()).map(str::to_owned).collect();
        let found = convert(&args, &Place { name: None, namespace: None, bucket: "s3://team-a".to_owned() }).unwrap();
        validate::check(&yaml::to_string(&found.manifest).unwrap()).unwrap();
        let notes = found.remarks.iter().filter(|remark| ["--caption", "--shuffle", "--keep"].iter().any(|flag| remark.starts_with(flag))).cloned().collect();
        (found.manifest["spec"]["dataset"]["captions"].clone(), notes)
    };
    let none = Vec::<String>::new();
    assert_eq!(found(&["--caption_dropout_rate", "0.05"]), (json!({"dropout": "0.05"}), none.clone()));
    assert_eq!(found(&["--caption_prefix", "ohwx,"]), (json!({"triggerWord": "ohwx"}), none));
    for (flags, captions, notes) in [
        (&["--caption_prefix", "a photo of ohwx"][..], json!({"triggerWord": "a photo of ohwx"}), &["--caption_prefix: a comma"][..]),
        (&["--caption_suffix", ", ohwx"], json!({"triggerWord": "ohwx", "triggerPosition": "Behind"}), &["--caption_suffix: a comma"]),
        (
            &["--caption_prefix", "ohwx, corgi,", "--caption_suffix", "best"],
            json!({"triggerWord": "ohwx, corgi"}),
            &["--caption_suffix has no counterpart beside"],
        ),
        (&["--shuffle_caption", "--keep_tokens", "2"], json!({"tagOrders": 16, "keepTags": 2}), &["--shuffle_caption: 16 orders"]),
        (
            &["--shuffle_caption", "--keep_tokens", "2", "--caption_prefix", "ohwx,"],
            json!({"tagOrders": 16, "keepTags": 1, "triggerWord": "ohwx"}),
            &["--shuffle_caption"],
        ),
        (
            &["--shuffle_caption", "--keep_tokens", "2", "--caption_prefix", "ohwx"],
            json!({"tagOrders": 16, "keepTags": 2, "triggerWord": "ohwx"}),
            &["--caption_prefix: a comma", "--shuffle_caption"],
        ),
        (
            &["--shuffle_caption", "--caption_prefix", "ohwx,"],
            json!({"tagOrders": 16, "triggerWord": "ohwx"}),
            &["--shuffle_caption", "--caption_prefix stays in front"],
        ),
        (
            &["--shuffle_caption", "--caption_suffix", "ohwx"],
            json!({"tagOrders": 16, "triggerWord": "ohwx", "triggerPosition": "Behind"}),
            &["--caption_suffix: a comma", "--caption_suffix stays behind", "--shuffle_caption"],
        ),
        (&["--keep_tokens", "2"], Value::Null, &["--keep_tokens is without effect"]),
        (&["--caption_tag_dropout_rate", "0.1"], Value::Null, &["--caption_tag_dropout_rate has no counterpart"]),
    ] {
        let (found, remarks) = found(flags);
        assert_eq!(found, captions, "{flags:?}");
        assert!(remarks.len() == notes.len() && remarks.iter().zip(notes).all(|(remark, note)| remark.starts_with(note)), "{flags:?}: {remarks:?}");
    }
}

#[test]
fn diffusers_own_script_has_eight_projections() {
    let script = "accelerate launch --num_processes 2 --mixed_precision=fp16 examples/dreambooth/train_dreambooth_lora_sd3.py";
    let found = converted(&format!("{script} {NEEDED}")).unwrap();
    let modules = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"].map(|name| format!("attn.{name}"));
    assert_eq!(found.manifest["spec"]["training"]["lora"]["targetModules"], json!(modules));
    assert_eq!(found.manifest["spec"]["training"]["precision"], "FP16", "the launcher's, where the script has none");
    assert!(found.remarks.iter().any(|remark| remark.contains("--num_processes 2 of the launcher")), "{:?}", found.remarks);
    assert_eq!(converted(&format!("{script} {NEEDED} --mixed_precision bf16")).unwrap().manifest["spec"]["training"]["precision"], "Auto");
    let spec = converted(&format!("train_multiple_prompts.py {NEEDED}")).unwrap();
    assert_eq!(spec.manifest["spec"]["training"].get("lora"), None, "the article's script has the API's four");
    assert!(!spec.remarks.join("").contains("eight"));
    let unnamed = converted(NEEDED).unwrap();
    assert!(unnamed.remarks.iter().any(|remark| remark.contains("takes eight")), "{:?}", unnamed.remarks);
}

#[test]
fn numbers_and_repeated_prompts_are_what_the_schema_takes() {
    let line = format!("{NEEDED} --lora_dropout 0.0005 --adam_epsilon 1e-08 --validation_prompt dog --num_validation_images 4");
    let found = converted(&line).unwrap();
    let jobs = validate::check(&yaml::to_string(&found.manifest).unwrap()).unwrap();
    assert_eq!(jobs[0].spec.training.lora.dropout.value(), Ok(0.0005));
    assert_eq!(found.manifest["spec"]["validation"]["prompts"], json!(["dog", "dog", "dog", "dog"]));
}

#[test]
fn kohyas_buckets_become_those_of_the_api() {
    let of = |flags: &str| {
        let found = converted(&format!("{NEEDED} {flags}")).unwrap();
        validate::check(&yaml::to_string(&found.manifest).unwrap()).unwrap_or_else(|error| panic!("{flags}: {error:?}"));
        let training = &found.manifest["spec"]["training"];
        (training.get("buckets").cloned(), training.get("centerCrop").cloned(), found.remarks)
    };
    let remark = |remarks: &[String], part: &str| assert!(remarks.iter().any(|remark| remark.contains(part)), "{part}: {remarks:?}");
    let (buckets, center, _) = of("--enable_bucket");
    assert_eq!((buckets, center), (Some(json!({"step": 64, "upscale": true})), Some(json!(true))));
    let (buckets, _, remarks) = of("--enable_bucket --min_bucket_reso=200 --max_bucket_reso 1000 --bucket_reso_steps 48");
    assert_eq!(buckets, Some(json!({"step": 48, "upscale": true, "minSize": 192, "maxSize": 1008})));
    remark(&remarks, "--min_bucket_reso 200 becomes 192");
    let (buckets, _, remarks) = of("--enable_bucket --bucket_no_upscale --max_bucket_reso 1024 --bucket_reso_steps 8");
    assert_eq!(buckets, Some(json!({"step": 16, "upscale": false})));
    remark(&remarks, "--max_bucket_reso is without effect with --bucket_no_upscale");
    remark(&remarks, "--bucket_reso_steps 8 becomes 16");
    let (buckets, _, remarks) = of("--bucket_no_upscale");
    assert_eq!(buckets, None);
    remark(&remarks, "--bucket_no_upscale is without effect unless --enable_bucket is given");
}

#[test]
fn what_is_wrong_is_named() {
    for (line, message) in [
        ("--dataset_name d", "--pretrained_model_name_or_path is needed"),
        ("--pretrained_model_name_or_path m", "--dataset_name"),
        ("--dataset_name d --pretrained_model_name_or_path m --rnak 4", "--rnak is not a flag"),
        ("--dataset_name d --pretrained_model_name_or_path m --rank", "--rank needs a value"),
        ("--dataset_name d --pretrained_model_name_or_path m --rank four", "is not a whole number"),
        ("--dataset_name d --pretrained_model_name_or_path m --learning_rate nan", "not a finite number"),
        ("--dataset_name d --pretrained_model_name_or_path m --lr_scheduler zigzag", "is none of constant"),
        ("--dataset_name d --pretrained_model_name_or_path m --use_8bit_adam=1", "takes no value"),
        ("--dataset_name d --pretrained_model_name_or_path m --with_prior_preservation", "needs --class_prompt"),
        ("--dataset_name d --pretrained_model_name_or_path m --with_prior_preservation --class_prompt p --enable_bucket", "share no batch with buckets"),
        ("--dataset_name d --pretrained_model_name_or_path m --lora_blocks 0,99", "\"99\" is no block"),
        ("--dataset_name d --pretrained_model_name_or_path m stray", "belongs to no flag"),
    ] {
        let error = converted(line).unwrap_err().to_string();
        assert!(error.contains(message), "{line}: {error}");
    }
}

/// Every row of the table does what it says: a field is set (or a remark says why not), and a flag without a counterpart is named.
#[test]
fn every_flag_of_the_table_is_handled() {
    let schema = finetune_api::schema().unwrap();
    let value = |name: &str| match name {
        "mixed_precision" | "prior_generation_precision" => "fp16",
        "weighting_scheme" => "mode",
        "lr_scheduler" => "polynomial",
        "optimizer" => "prodigy",
        "resume_from_checkpoint" => "latest",
        "lora_layers" => "attn.to_q",
        "precondition_outputs" | "prodigy_use_bias_correction" | "prodigy_safeguard_warmup" => "0",
        "adam_beta1" | "adam_beta2" | "prodigy_beta3" | "lora_dropout" | "learning_rate" => "0.3",
        "revision" => "0123456789abcdef0123456789abcdef01234567",
        "resolution" => "256",
        "bucket_reso_steps" => "32",
        "min_bucket_reso" => "128",
        "max_bucket_reso" => "1024",
        _ => "1",
    };
    for flag in FLAGS {
        let base = match flag.name {
            "dataset_name" | "instance_data_dir" => "--pretrained_model_name_or_path a/b",
            "pretrained_model_name_or_path" => "--dataset_name d",
            "revision" => "--dataset_name d --pretrained_model_name_or_path a/b",
            name if name.starts_with("prodigy") => "--dataset_name d --pretrained_model_name_or_path m --optimizer prodigy",
            "keep_tokens" => "--dataset_name d --pretrained_model_name_or_path m --shuffle_caption",
            "enable_bucket" => "--dataset_name d --pretrained_model_name_or_path m",
            name if name.contains("bucket") => "--dataset_name d --pretrained_model_name_or_path m --enable_bucket",
            "num_validation_images" => "--dataset_name d --pretrained_model_name_or_path m --validation_prompt p",
            "class_prompt" => "--dataset_name d --pretrained_model_name_or_path m --with_prior_preservation",
            "lr_num_cycles" => "--dataset_name d --pretrained_model_name_or_path m --lr_scheduler cosine_with_restarts",
            "lr_power" | "lr_warmup_steps" => "--dataset_name d --pretrained_model_name_or_path m --lr_scheduler polynomial",
            _ => "--dataset_name d --pretrained_model_name_or_path m --with_prior_preservation --class_prompt p",
        };
        let base = if flag.name == "with_prior_preservation" { "--dataset_name d --pretrained_model_name_or_path m --class_prompt p" } else { base };
        let line = match flag.takes {
            Takes::Nothing => format!("{base} --{}", flag.name),
            Takes::Value => format!("{base} --{} {}", flag.name, value(flag.name)),
        };
        let found = converted(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
        validate::check(&yaml::to_string(&found.manifest).unwrap()).unwrap_or_else(|error| panic!("{line}: {error:?}"));
        match flag.becomes {
            Becomes::Field(path, _) => {
                let at = |root: &Value, keys: &str| keys.split('.').try_fold(root.clone(), |at, key| at.get(key).cloned());
                let properties = path.split('.').map(|key| format!("properties.{key}")).collect::<Vec<_>>().join(".");
                assert!(at(&schema["properties"]["spec"], &properties).is_some(), "{path} is not in the schema");
                assert!(at(&found.manifest["spec"], path).is_some(), "{line} does not set {path}: {}", found.manifest);
            }
            Becomes::Nothing(reason) => assert!(found.remarks.iter().any(|remark| remark.contains(flag.name) && remark.contains(reason)), "{line}"),
        }
    }
}
