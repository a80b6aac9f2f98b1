use super::*;
use crate::FineTuneJobSpec;
use crate::plan::{Facts, PriorPreservationConfig, resolve};

fn training(change: impl FnOnce(&mut TrainingConfig)) -> TrainingConfig {
    let spec: FineTuneJobSpec = serde_json::from_value(serde_json::json!({
        "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
    }))
    .unwrap();
    let mut training = resolve(&spec, "n", "j", &Facts::default()).unwrap().config.training;
    change(&mut training);
    training
}

fn part(stage: &Stage, name: &str) -> f64 {
    stage.parts.iter().filter(|part| part.name == name).map(|part| part.bytes as f64 / GIB).sum()
}

/// The reference's table: (resolution, batch, kept without recompute, inputs with it), in GiB.
#[test]
fn activations_are_those_of_the_reference() {
    for (resolution, batch, kept, inputs) in [(512, 1, 0.89, 0.08), (512, 4, 3.56, 0.32), (768, 4, 7.43, 0.68), (1024, 1, 3.21, 0.29), (1024, 4, 12.84, 1.17)] {
        let training = training(|t| t.resolution = resolution);
        let sizes = Sizes::new(&training, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Float);
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() <= 0.012_f64.max(0.02 * expected), "{resolution}/{batch}: {found} for {expected}");
        close(part(&sizes.training(batch, 0), "kept activations"), kept);
        close(part(&sizes.training(batch, 24), "inputs of blocks computed again"), inputs);
        close(part(&sizes.training(batch, 0), "transformer"), 3.78);
    }
}

/// What an H100 showed as taken by a process that does such steps: (resolution, batch, blocks computed again, GiB).
#[test]
fn plan_and_card_agree_within_five_percent() {
    let shown = [(512, 4, 0, 8.48), (512, 4, 24, 5.60), (512, 1, 0, 5.60), (1024, 1, 0, 8.10), (1024, 4, 0, 18.95), (1024, 4, 6, 14.30), (1024, 4, 24, 6.83)];
    for (resolution, batch, recomputed, card) in shown {
        let training = training(|t| t.resolution = resolution);
        let plan = Sizes::new(&training, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Float).training(batch, recomputed).bytes()
            as f64
            / GIB;
        assert!((plan / card - 1.0).abs() < 0.05, "{resolution} px, batch {batch}, {recomputed} blocks: {plan} GiB planned, {card} shown");
    }
}

/// What an H200 showed as taken by whole runs (`benches/memory_table.py`), whose encoders are smaller: (model, weights, resolution, batch, rank, GiB).
#[test]
fn plan_and_card_agree_for_every_model() {
    for (shape, weights, resolution, batch, rank, card) in [
        (ModelShape::SD3_MEDIUM, FrozenWeights::Float, 512, 4, 4, 8.11),
        (ModelShape::SD3_MEDIUM, FrozenWeights::Float, 1024, 1, 4, 7.84),
        (ModelShape::SD35_MEDIUM, FrozenWeights::Float, 512, 4, 4, 10.28),
        (ModelShape::SD35_MEDIUM, FrozenWeights::Float, 1024, 1, 4, 9.97),
        (ModelShape::SD35_LARGE, FrozenWeights::Int8, 512, 1, 4, 14.11),
    ] {
        let training = training(|t| {
            (t.resolution, t.max_sequence_length, t.lora.rank) = (resolution, 24, rank);
        });
        let shape = ModelShape { joint: 192, pooled: 160, ..shape };
        let plan = Sizes::new(&training, &shape, MemoryBudget::Gpu(BUDGET_BYTES), weights).training(batch, 0).bytes() as f64 / GIB;
        println!("{} {resolution}/{batch}: {plan:.2} planned, {card} shown, {:.3}", shape.name, card / plan);
        assert!((card / plan - 1.0).abs() < 0.04, "{}, {resolution} px, batch {batch}: {plan} GiB planned, {card} shown", shape.name);
    }
}

#[test]
fn preparation_stays_far_below_the_budget() {
    let plan = memory_plan(&training(|_| {}), None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES)).unwrap();
    let names: Vec<_> = plan.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["encode captions (CLIP)", "encode captions (T5)", "encode pictures (VAE)", "train"]);
    let without_library = |index: usize| (plan.stages[index].bytes() - LIBRARY_BYTES) as f64 / GIB;
    assert!((1.2..1.6).contains(&without_library(0)), "{}", without_library(0));
    assert!((0.7..2.0).contains(&without_library(1)), "{}", without_library(1));
    assert!(without_library(2) < 1.0, "{}", without_library(2));
}

#[test]
fn the_articles_job_fits_without_recompute_and_larger_ones_recompute_or_split() {
    let gpu = MemoryBudget::Gpu(BUDGET_BYTES);
    let plan = |change: fn(&mut TrainingConfig), shape: &ModelShape| memory_plan(&training(change), None, shape, gpu).unwrap();
    let article = plan(|_| {}, &ModelShape::SD3_MEDIUM);
    assert_eq!((article.recomputed_blocks, article.micro_batch), (0, 4));
    assert!((8.0..9.5).contains(&(article.peak_bytes() as f64 / GIB)), "{}", article.peak_bytes());

    let large = plan(|t| t.resolution = 1024, &ModelShape::SD3_MEDIUM);
    assert_eq!(large.micro_batch, 4);
    assert!((1..24).contains(&large.recomputed_blocks), "{}", large.recomputed_blocks);
    assert!(large.peak_bytes() <= BUDGET_BYTES);
    // One block fewer would not fit.
    let training_large = training(|t| t.resolution = 1024);
    let sizes = Sizes::new(&training_large, &ModelShape::SD3_MEDIUM, gpu, FrozenWeights::Float);
    assert!(sizes.training(4, u64::from(large.recomputed_blocks) - 1).bytes() > BUDGET_BYTES);

    let split = plan(
        |t| {
            t.resolution = 1024;
            t.batch_size = 64;
        },
        &ModelShape::SD35_MEDIUM,
    );
    // With fewer than two blocks kept, the block computed again is what counts: keeping them costs nothing.
    assert!(split.micro_batch < 64 && (22..=24).contains(&split.recomputed_blocks), "{split:?}");
    let never = plan(
        |t| {
            t.resolution = 1024;
            t.gradient_checkpointing = GradientCheckpointing::Never;
        },
        &ModelShape::SD3_MEDIUM,
    );
    assert_eq!((never.recomputed_blocks, never.micro_batch), (0, 2));
    let always = plan(|t| t.gradient_checkpointing = GradientCheckpointing::Always, &ModelShape::SD3_MEDIUM);
    assert_eq!((always.recomputed_blocks, always.micro_batch), (24, 4));
}

/// Twice the pictures per pass, and a stage that draws: sixteen at once with guidance are 32 passes of 1178 tokens, 25 D of 2 bytes each.
#[test]
fn prior_preservation_counts_in_every_stage() {
    let with = |change: fn(&mut PriorPreservationConfig)| {
        training(|t| {
            let mut prior =
                PriorPreservationConfig { class_prompt: "a dog".into(), images: 100, weight: 1.0, sample_batch_size: 16, precision: Precision::Auto };
            change(&mut prior);
            t.prior_preservation = Some(prior);
        })
    };
    let (shape, gpu) = (&ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES));
    let (plain, prior) = (training(|_| {}), with(|_| {}));
    let plan = memory_plan(&prior, None, shape, gpu).unwrap();
    let stage = |plan: &MemoryPlan, name: &str| plan.stages.iter().find(|s| s.name == name).cloned().unwrap();
    let drawing = stage(&plan, "draw class pictures");
    assert!((part(&drawing, "activations") * GIB - 32.0 * 1178.0 * 25.0 * 1536.0 * 2.0).abs() < 1.0, "{drawing:?}");
    let single = Sizes::new(&plain, shape, gpu, FrozenWeights::Float).training(4, 0);
    assert!(
        (part(&Sizes::new(&prior, shape, gpu, FrozenWeights::Float).training(4, 0), "kept activations") / part(&single, "kept activations") - 2.0).abs() < 1e-9
    );
    // The article's job still fits with the whole batch.
    assert_eq!(plan.micro_batch, 4);
    assert!(plan.peak_bytes() <= BUDGET_BYTES);
    // 100 pictures of 56 passes and twice the work per update.
    let flops = |training: &TrainingConfig, updates| run_flops(training, shape, &plan, updates);
    let (weights, attention) = shape.forward_flops(512, 77);
    assert!((flops(&prior, 0) / (5600.0 * (weights + attention)) - 1.0).abs() < 1e-9);
    assert!(((flops(&prior, 10) - flops(&prior, 0)) / flops(&plain, 10) - 2.0).abs() < 1e-9);
    // Too many at once: the message says what to lower.
    let large = |t: &mut PriorPreservationConfig| (t.sample_batch_size, t.precision) = (64, Precision::FP32);
    let error = memory_plan(&with(large), None, shape, gpu).unwrap_err();
    assert_eq!(error.stage, "draw class pictures");
    assert!(error.to_string().contains("training.priorPreservation.sampleBatchSize"), "{error}");
}

#[test]
fn what_cannot_fit_is_refused_with_numbers() {
    let float = training(|t| t.weights = Weights::Float);
    let error = memory_plan(&float, None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(4 << 30)).unwrap_err();
    assert_eq!(error.stage, "train");
    assert!(error.needed > 4.9 && error.needed < 5.5 && error.budget == 4.0, "{error}");
    assert!(error.to_string().contains("training.weights: Auto"), "{error}");
    let fp32 = memory_plan(
        &training(|t| {
            t.precision = Precision::FP32;
            t.resolution = 2048;
            t.gradient_checkpointing = GradientCheckpointing::Never;
        }),
        None,
        &ModelShape::SD35_MEDIUM,
        MemoryBudget::Gpu(BUDGET_BYTES),
    );
    assert!(fp32.unwrap_err().to_string().contains("gradientCheckpointing: Auto"));
    assert!(memory_plan(&training(|t| t.resolution = 2048), None, &ModelShape::SD3_MEDIUM, MemoryBudget::Cpu).is_ok());
}

/// 16 GB cards: the medium models stay in 16 bits, the large one fits in 8; so does the smallest on a card of 4 GB.
#[test]
fn large_models_fit_in_8_bits() {
    let plan = |shape: &ModelShape, budget: u64, resolution, batch| {
        let training = training(|t| (t.resolution, t.batch_size) = (resolution, batch));
        memory_plan(&training, None, shape, MemoryBudget::Gpu(budget)).unwrap()
    };
    for shape in [ModelShape::SD3_MEDIUM, ModelShape::SD35_MEDIUM] {
        assert_eq!(plan(&shape, BUDGET_BYTES, 1024, 4).weights, FrozenWeights::Float);
    }
    for (resolution, batch) in [(512, 1), (512, 4), (1024, 1), (1024, 4)] {
        let plan = plan(&ModelShape::SD35_LARGE, BUDGET_BYTES, resolution, batch);
        assert!(plan.weights == FrozenWeights::Int8 && plan.peak_bytes() <= BUDGET_BYTES, "{plan:?}");
    }
    assert_eq!(plan(&ModelShape::SD3_MEDIUM, 4 << 30, 512, 4).weights, FrozenWeights::Int8);
    let cpu = memory_plan(&training(|_| {}), None, &ModelShape::SD35_LARGE, MemoryBudget::Cpu).unwrap();
    assert_eq!(cpu.weights, FrozenWeights::Float);
    // 8.06 thousand million parameters, of which 5.33 in the blocks: 5.46 GB and 5.33 GB.
    let training = training(|t| t.weights = Weights::Int8);
    let sizes = Sizes::new(&training, &ModelShape::SD35_LARGE, MemoryBudget::Gpu(BUDGET_BYTES), FrozenWeights::Int8);
    assert!((sizes.transformer(2) as f64 / 10.8e9 - 1.0).abs() < 0.01, "{}", sizes.transformer(2));
}

/// The reference: 15.6 TFLOP per batch of four at 512 px without recompute, 22.8 with.
#[test]
fn work_of_a_run_is_that_of_the_reference() {
    let training = training(|t| t.gradient_accumulation_steps = 1);
    let mut plan = memory_plan(&training, None, &ModelShape::SD3_MEDIUM, MemoryBudget::Gpu(BUDGET_BYTES)).unwrap();
    assert!((run_flops(&training, &ModelShape::SD3_MEDIUM, &plan, 1) / 15.6e12 - 1.0).abs() < 0.02);
    plan.recomputed_blocks = 24;
    assert!((run_flops(&training, &ModelShape::SD3_MEDIUM, &plan, 1) / 22.8e12 - 1.0).abs() < 0.02);
}
