//! Times the encoders on this machine.
//!
//! `cargo bench --bench encode -- prompts MODEL LENGTH COUNT` encodes COUNT captions; `-- vae MODEL SIZE` encodes and decodes
//! one picture. Prints seconds, and the largest resident memory of the process.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

fn main() {
    use std::ops::ControlFlow;
    use std::path::Path;
    use std::time::Instant;

    use finetune_common::rng::{Purpose, Stream};
    use finetune_common::tensor::HostTensor;
    use finetune_compute::kernels::Engine;
    use finetune_model::ModelDir;
    use finetune_model::text::{Encoder, PromptEncoder};
    use finetune_model::vae::{VaeDecoder, VaeEncoder};

    // cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["prompts", model, length, count] => {
            let model = ModelDir::open(Path::new(model)).unwrap();
            let encoder = PromptEncoder::open(&model, length.parse().unwrap(), &Engine::cpu()).unwrap();
            let captions: Vec<String> = (0..count.parse().unwrap()).map(|i| format!("a cup of coffee on a wooden table, picture {i}")).collect();
            let start = Instant::now();
            let embeddings = encoder
                .encode(&captions, &mut |p| {
                    if p.encoder == Encoder::T5 {
                        println!("T5 layer {} of {}: {:.1} s, {:.2} GiB resident", p.layers_done, p.layers, start.elapsed().as_secs_f64(), memory("VmRSS:"));
                    }
                    ControlFlow::Continue(())
                })
                .unwrap();
            let finite = embeddings.iter().all(|e| e.embeds.is_finite());
            assert!(finite, "values should be finite");
            println!("{} captions of shape {:?}: {:.1} s, peak {:.2} GiB", embeddings.len(), encoder.shape(), start.elapsed().as_secs_f64(), memory("VmHWM:"));
        }
        ["vae", model, size] => {
            let model = ModelDir::open(Path::new(model)).unwrap();
            let (encoder, decoder) = (VaeEncoder::load(&model, &Engine::cpu()).unwrap(), VaeDecoder::load(&model, &Engine::cpu()).unwrap());
            let size: usize = size.parse().unwrap();
            let mut pixels = HostTensor::zeros([1, 3, size, size]);
            Stream::new(1, Purpose::Noise, 0, 0).fill_normal(pixels.values_mut());
            for round in 0..3 {
                let start = Instant::now();
                let mean = encoder.encode(&pixels).unwrap().mean;
                let encoded = start.elapsed().as_secs_f64();
                decoder.decode(&mean).unwrap();
                println!(
                    "round {round}: {size} px encoded in {encoded:.3} s, decoded in {:.3} s, peak {:.2} GiB",
                    start.elapsed().as_secs_f64() - encoded,
                    memory("VmHWM:")
                );
            }
        }
        _ => println!("usage: prompts MODEL LENGTH COUNT | vae MODEL SIZE"),
    }
}

/// A line of /proc/self/status in GiB.
fn memory(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find(|l| l.starts_with(key)).and_then(|l| l.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / f64::from(1 << 20)
}
