//! The flags of the article's script, of diffusers' `train_dreambooth_lora_sd3.py`, and those of kohya's scripts on captions, buckets and 8-bit weights; and
//! what becomes of each.

/// What follows a flag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Takes {
    /// A value.
    Value,
    /// Nothing.
    Nothing,
}

/// What becomes of a flag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Becomes {
    /// A field of the FineTuneJob; with a remark where the two differ.
    Field(&'static str, &'static str),
    /// Nothing, for this reason.
    Nothing(&'static str),
}

/// A flag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flag {
    /// Its name, without the dashes.
    pub(super) name: &'static str,
    /// What follows it.
    pub(super) takes: Takes,
    /// What becomes of it.
    pub(super) becomes: Becomes,
}

const fn field(name: &'static str, path: &'static str, remark: &'static str) -> Flag {
    Flag { name, takes: Takes::Value, becomes: Becomes::Field(path, remark) }
}

const fn switch(name: &'static str, path: &'static str, remark: &'static str) -> Flag {
    Flag { name, takes: Takes::Nothing, becomes: Becomes::Field(path, remark) }
}

const fn dropped(name: &'static str, reason: &'static str) -> Flag {
    Flag { name, takes: Takes::Value, becomes: Becomes::Nothing(reason) }
}

const fn dropped_switch(name: &'static str, reason: &'static str) -> Flag {
    Flag { name, takes: Takes::Nothing, becomes: Becomes::Nothing(reason) }
}

const FROZEN: &str = "text encoders stay frozen: only the transformer gets a LoRA";
const BUCKET: &str = "the LoRA goes into the bucket; push it from there";
const PRIOR: &str = "only with --with_prior_preservation";

/// Every flag.
pub(super) const FLAGS: &[Flag] = &[
    field("dataset_name", "dataset.uri", "its last part, in the bucket; --instance_data_dir alike"),
    field("instance_data_dir", "dataset.uri", "its last part, in the bucket; captions as in docs/concepts/dataset.md"),
    field("pretrained_model_name_or_path", "model.source", "huggingFace where --revision is a commit, else a folder in the bucket"),
    field("revision", "model.source.huggingFace.revision", "a commit of 40 hexadecimal digits"),
    field("output_dir", "output.uri", "its last part, in the bucket"),
    field("mixed_precision", "training.precision", "bf16 becomes Auto: BF16 where the GPU has it, else FP16"),
    field("resolution", "training.resolution", ""),
    field("train_batch_size", "training.batchSize", ""),
    field("sample_batch_size", "training.priorPreservation.sampleBatchSize", PRIOR),
    field("gradient_accumulation_steps", "training.gradientAccumulationSteps", ""),
    field("learning_rate", "training.optimizer.learningRate", ""),
    dropped("report_to", "metrics.jsonl and TensorBoard files are always written; nothing is sent to other services"),
    field("lr_scheduler", "training.learningRateSchedule.type", ""),
    field("lr_warmup_steps", "training.learningRateSchedule.warmupSteps", "without effect for constant, as in the script"),
    field("max_train_steps", "training.maxSteps", ""),
    field("weighting_scheme", "training.flowMatching.weightingScheme", ""),
    field("seed", "training.seed", "42 where absent: runs are always repeatable"),
    switch("use_8bit_adam", "training.optimizer.type", "AdamW8bit; without the flag AdamW"),
    switch("gradient_checkpointing", "training.gradientCheckpointing", "Auto: as many blocks as the 16 GB budget demands"),
    field("prior_generation_precision", "training.priorPreservation.precision", PRIOR),
    field("caption_column", "dataset.captionColumn", ""),
    field("num_train_epochs", "training.epochs", "where --max_train_steps is absent; 1 by default, as in the script"),
    field("repeats", "dataset.repeats", ""),
    switch("center_crop", "training.centerCrop", ""),
    switch("random_flip", "training.randomFlip", ""),
    field("max_sequence_length", "training.maxSequenceLength", ""),
    field("rank", "training.lora.rank", ""),
    field("lora_alpha", "training.lora.alpha", "equal to the rank where absent, as in the script"),
    field("lora_dropout", "training.lora.dropout", ""),
    field(
        "lora_layers",
        "training.lora.targetModules",
        "where absent: eight if the script is diffusers' train_dreambooth_lora_sd3.py, else the article's four",
    ),
    field("lora_blocks", "training.lora.targetModules", "prefixes each module with its block"),
    field("logit_mean", "training.flowMatching.logitMean", ""),
    field("logit_std", "training.flowMatching.logitStd", ""),
    field("mode_scale", "training.flowMatching.modeScale", ""),
    field("precondition_outputs", "training.flowMatching.preconditionOutputs", "0 or 1"),
    field("optimizer", "training.optimizer.type", "AdamW or prodigy"),
    field("adam_beta1", "training.optimizer.beta1", ""),
    field("adam_beta2", "training.optimizer.beta2", ""),
    field("adam_weight_decay", "training.optimizer.weightDecay", ""),
    field("adam_epsilon", "training.optimizer.epsilon", ""),
    field("prodigy_beta3", "training.optimizer.prodigy.beta3", "only with --optimizer prodigy"),
    field("prodigy_use_bias_correction", "training.optimizer.prodigy.useBiasCorrection", "only with --optimizer prodigy"),
    field("prodigy_safeguard_warmup", "training.optimizer.prodigy.safeguardWarmup", "only with --optimizer prodigy"),
    dropped("prodigy_decouple", "weight decay is always decoupled, as the script's default"),
    field("max_grad_norm", "training.maxGradNorm", ""),
    field("lr_num_cycles", "training.learningRateSchedule.cycles", "only for cosine_with_restarts, as in the script"),
    field("lr_power", "training.learningRateSchedule.power", "only for polynomial, as in the script"),
    switch("scale_lr", "training.optimizer.learningRate", "multiplied by batch and accumulation"),
    switch("with_prior_preservation", "training.priorPreservation", "needs --class_prompt"),
    field("class_prompt", "training.priorPreservation.classPrompt", PRIOR),
    field("num_class_images", "training.priorPreservation.images", PRIOR),
    field("prior_loss_weight", "training.priorPreservation.weight", PRIOR),
    dropped("class_data_dir", "class pictures are drawn by the run and kept beside its checkpoints"),
    field("validation_prompt", "validation.prompts", ""),
    field("num_validation_images", "validation.prompts", "the prompt is repeated: each time it is drawn from other noise"),
    dropped("validation_epochs", "pictures are drawn every validation.everySteps steps"),
    field("checkpointing_steps", "checkpoint.everySteps", ""),
    field("checkpoints_total_limit", "checkpoint.keepLast", ""),
    field("resume_from_checkpoint", "resume.policy", "latest is Auto, the default; a folder of the script cannot be read"),
    field("instance_prompt", "dataset.caption", "the caption of pictures without one of their own"),
    dropped("image_column", "a folder names its pictures by file_name; another key with dataset.imageColumn"),
    dropped("dataset_config_name", "datasets are folders in a bucket"),
    dropped("cache_dir", "model.cache names a volume that keeps downloads"),
    dropped("variant", "one variant of the weights is chosen by what the folder holds"),
    dropped_switch("train_text_encoder", FROZEN),
    dropped("text_encoder_lr", FROZEN),
    dropped("adam_weight_decay_text_encoder", FROZEN),
    dropped("dataloader_num_workers", "prepared data is read from memory-mapped files: there is nothing to parallelise"),
    dropped_switch("cache_latents", "latents are always cached, with their variance"),
    switch("upcast_before_saving", "output.dtype", "F32; the LoRA is trained in 32 bits in any case"),
    dropped("image_interpolation_mode", "pictures are resized as in the article: bilinear with antialiasing"),
    dropped_switch("allow_tf32", "matrix products are in the training precision"),
    dropped("logging_dir", "metrics are written below output.uri"),
    dropped_switch("push_to_hub", BUCKET),
    dropped("hub_token", "tokens belong into a Secret: model.source.huggingFace.tokenSecretRef"),
    dropped("hub_model_id", BUCKET),
    dropped("local_rank", "one GPU per job"),
    switch("fp8_base", "training.weights", "of kohya's scripts, as the flags below; Int8, which rounds less than E4M3"),
    field("caption_dropout_rate", "dataset.captions.dropout", ""),
    switch("shuffle_caption", "dataset.captions.tagOrders", "16: so many orders of each caption's tags are encoded, where the script shuffles at each draw"),
    field("keep_tokens", "dataset.captions.keepTags", "only with --shuffle_caption; the script counts the tags of --caption_prefix as well"),
    field("caption_prefix", "dataset.captions.triggerWord", "with a comma and a space behind it; it is not shuffled"),
    field("caption_suffix", "dataset.captions.triggerWord", "only without --caption_prefix; with a comma and a space before it; it is not shuffled"),
    switch("enable_bucket", "training.buckets", "of kohya's scripts, as the flags below; training.centerCrop is set, as the scripts crop the middle"),
    field("bucket_reso_steps", "training.buckets.step", "only with --enable_bucket; a multiple of 16"),
    switch("bucket_no_upscale", "training.buckets.upscale", "only with --enable_bucket; without the flag true"),
    field("min_bucket_reso", "training.buckets.minSize", "only with --enable_bucket and without --bucket_no_upscale, as in the scripts"),
    field("max_bucket_reso", "training.buckets.maxSize", "only with --enable_bucket and without --bucket_no_upscale, as in the scripts"),
    dropped("caption_separator", "tags stand between commas"),
    dropped("caption_dropout_every_n_epochs", "--caption_dropout_rate decides for each draw"),
    dropped("caption_tag_dropout_rate", "captions are left out as a whole, with --caption_dropout_rate"),
];

/// The flag of that name.
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}
