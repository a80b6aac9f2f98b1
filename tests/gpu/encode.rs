//! Text encoders and autoencoder on both devices, on the models of the public cases.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use finetune_common::tensor::HostTensor;
use finetune_compute::kernels::{Cuda, Engine, Precision};
use finetune_model::ModelDir;
use finetune_model::text::{EncodeProgress, PromptEmbedding, PromptEncoder};
use finetune_model::vae::{VaeDecoder, VaeEncoder};

use crate::support::{poison, random, relative};

/// Allowed error of a whole network in each precision.
const NETWORKS: [(Precision, f64); 3] = [(Precision::F32, 2e-5), (Precision::F16, 1e-2), (Precision::Bf16, 6e-2)];

fn cases(kind: &str) -> Vec<(PathBuf, ModelDir)> {
    let folder = std::env::var("FINETUNE_CASES").map_or_else(|_| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases"), PathBuf::from);
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&folder).expect("the cases").flatten().map(|e| e.path()).collect();
    cases.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(kind)) && path.join("model").is_dir());
    cases.sort();
    assert!(!cases.is_empty(), "no case {kind} in {}", folder.display());
    cases.into_iter().map(|path| (path.clone(), ModelDir::open(&path.join("model")).expect("a model"))).collect()
}

fn go(_: EncodeProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn values(e: &PromptEmbedding) -> (Vec<f32>, Vec<f32>) {
    (e.embeds.values().to_vec(), e.pooled.values().to_vec())
}

fn captions(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("picture {i} of a cat, {}", "word ".repeat(i % 5))).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn prompts_are_those_of_the_cpu() {
    let mut failed = Vec::new();
    for (precision, tolerance) in NETWORKS {
        let device = Cuda::open(0, precision).unwrap();
        poison(&device);
        let gpu = Engine::from(device);
        for (path, model) in cases("encode-prompt") {
            for length in [1, 9, 77] {
                let captions = captions(7);
                let got = PromptEncoder::open(&model, length, &gpu).unwrap().encode(&captions, &mut go).unwrap();
                let want = PromptEncoder::open(&model, length, &Engine::cpu()).unwrap().encode(&captions, &mut go).unwrap();
                for (got, want) in got.iter().zip(&want) {
                    let ((got, got_pooled), (want, want_pooled)) = (values(got), values(want));
                    let errors = (relative(&got, &want), relative(&got_pooled, &want_pooled));
                    if errors.0 > tolerance || errors.1 > tolerance {
                        failed.push(format!("{precision} {} {length}: {errors:?}", path.display()));
                    }
                }
                println!("{precision} {} {length}: {:.2e}", path.display(), relative(&values(&got[0]).0, &values(&want[0]).0));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The cache is filled by whichever run comes first.
#[test]
#[ignore = "needs a GPU"]
fn captions_do_not_depend_on_their_company() {
    for precision in [Precision::F32, Precision::Bf16] {
        let gpu = Engine::cuda(0, precision).unwrap();
        for (path, model) in cases("encode-prompt") {
            for length in [5, 77] {
                let encoder = PromptEncoder::open(&model, length, &gpu).unwrap();
                let captions = captions(70);
                let together = encoder.encode(&captions, &mut go).unwrap();
                for i in [0, 1, 31, 32, 69] {
                    let alone = encoder.encode(&captions[i..=i], &mut go).unwrap();
                    assert_eq!(values(&alone[0]), values(&together[i]), "{precision} {} {length} {i}", path.display());
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn pictures_are_those_of_the_cpu() {
    let mut failed = Vec::new();
    for (precision, tolerance) in NETWORKS {
        let device = Cuda::open(0, precision).unwrap();
        poison(&device);
        let gpu = Engine::from(device);
        for (path, model) in cases("encode-image") {
            for (height, width) in [(64, 64), (40, 72)] {
                let pixels = HostTensor::new(random(2 * 3 * height * width, 5), [2, 3, height, width]).unwrap();
                let (on_gpu, on_cpu) = (VaeEncoder::load(&model, &gpu).unwrap(), VaeEncoder::load(&model, &Engine::cpu()).unwrap());
                let (got, want) = (on_gpu.encode(&pixels).unwrap(), on_cpu.encode(&pixels).unwrap());
                let again = on_gpu.encode(&pixels).unwrap();
                assert_eq!(got.mean.values(), again.mean.values(), "the same twice");
                let decode = |engine| VaeDecoder::load(&model, engine).unwrap().decode(&want.mean).unwrap();
                let errors = [
                    relative(got.mean.values(), want.mean.values()),
                    relative(got.logvar.values(), want.logvar.values()),
                    relative(decode(&gpu).values(), decode(&Engine::cpu()).values()),
                ];
                println!("{precision} {} {height}x{width}: {errors:?}", path.display());
                if errors.iter().any(|&e| e.is_nan() || e > tolerance) {
                    failed.push(format!("{precision} {} {height}x{width}: {errors:?}", path.display()));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
