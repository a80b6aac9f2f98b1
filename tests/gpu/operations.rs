use std::ops::Range;
use std::sync::Arc;

use finetune_compute::kernels::{AttentionShape, Device as _, Joint, LoraTarget, Modulation, Precision, StoredMatrix};

use crate::support::{Pair, both, pairs, random};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn modulate_and_its_gradients() {
    for p in pairs() {
        for (batch, tokens, width) in [(2, 3, 21), (2, 5, 64), (1, 40, 1536), (3, 7, 40)] {
            let stride = 3 * width;
            let (x, m, dy, before) =
                (p.random(batch * tokens * width, 1), p.random(batch * stride, 2), p.random(batch * tokens * width, 3), p.random(batch * tokens * width, 4));
            let (got, want) = both!(p, e => {
                let (xb, mb, dyb) = (e.upload(&x), e.upload_f32(&m), e.upload(&dy));
                let modulation = Modulation { values: &mb, stride, tokens, width };
                let (y, stats) = e.modulate(&xb, modulation, width, 0);
                let (mut dx, mut dm) = (e.upload(&before), e.zeros_f32(m.len()));
                e.modulate_backward(&xb, &stats, modulation, width, 0, &dyb, Some(&mut dx), Some(&mut dm));
                [y, dx, dm]
            });
            for (what, (got, want)) in ["y", "dx", "d modulation"].iter().zip(got.iter().zip(&want)) {
                p.compare(&format!("modulate {batch}x{tokens}x{width} {what}"), got, want);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gate_and_its_gradients() {
    for p in pairs() {
        for (batch, tokens, width) in [(2, 3, 21), (2, 5, 64), (3, 40, 1536)] {
            let (stride, n) = (2 * width, batch * tokens * width);
            let (x, y, m, d) = (p.random(n, 1), p.random(n, 2), p.random(batch * stride, 3), p.random(n, 4));
            let (got, want) = both!(p, e => {
                let (xb, yb, mb, db) = (e.upload(&x), e.upload(&y), e.upload_f32(&m), e.upload(&d));
                let modulation = Modulation { values: &mb, stride, tokens, width };
                let out = e.gate_residual(&xb, &yb, modulation, width);
                let mut dm = e.zeros_f32(m.len());
                let dy = e.gate_backward(&db, modulation, width, Some((&yb, &mut dm)));
                [out, dy, dm]
            });
            for (what, (got, want)) in ["out", "dy", "d gate"].iter().zip(got.iter().zip(&want)) {
                p.compare(&format!("gate {batch}x{tokens}x{width} {what}"), got, want);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn values_one_by_one() {
    for p in pairs() {
        for n in [1, 305, 4096] {
            let (mut x, y, d) = (p.random(n, 1), p.random(n, 2), p.random(n, 3));
            if n > 10 {
                x[..6].copy_from_slice(&[0.0, -0.0, 30.0, -30.0, 1e-3, -8.0]);
            }
            let x = p.rounded(&x);
            let (got, want) = both!(p, e => {
                let (xb, yb) = (e.upload(&x), e.upload(&y));
                let (mut dg, mut ds, mut product, mut sum) = (e.upload(&d), e.upload(&d), e.upload(&x), e.upload(&x));
                e.gelu_backward(&xb, &mut dg);
                e.silu_backward(&xb, &mut ds);
                e.multiply(&mut product, &yb);
                e.add(&mut sum, &yb);
                let mut repeated = e.upload(&[&x[..], &d, &y].concat());
                e.add(&mut repeated, &yb);
                vec![e.gelu(&xb), e.silu(&xb), dg, ds, product, sum, repeated, e.copy(&xb), e.zeros(n), e.zeros_f32(n)]
            });
            let names = ["gelu", "silu", "d gelu", "d silu", "product", "sum", "repeated sum", "copy", "zeros", "f32 zeros"];
            for (what, (got, want)) in names.iter().zip(got.iter().zip(&want)) {
                p.compare(&format!("{what} {n}"), got, want);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rms_norm_and_its_gradient() {
    for p in pairs() {
        for width in [8, 19, 64] {
            let (x, w, d) = (p.random(70 * width, 1), p.random(width, 2), p.random(70 * width, 3));
            let (got, want) = both!(p, e => {
                let (xb, wb) = (e.upload(&x), e.upload(&w));
                let (y, stats) = e.rms_norm(&xb, &wb);
                let mut dx = e.upload(&d);
                e.rms_norm_backward(&xb, &wb, &stats, &mut dx);
                [y, dx]
            });
            for (what, (got, want)) in ["y", "dx"].iter().zip(got.iter().zip(&want)) {
                p.compare(&format!("rms norm {width} {what}"), got, want);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_masks_are_the_same_numbers_on_both_devices() {
    for p in pairs() {
        for values in [7, 64, 3001] {
            let samples = [(0, 1), (3, 77), (1 << 40, 5)];
            let (got, want) = both!(p, e => e.download(&e.dropout_mask(9, &samples, 4, values, 1, 0.25)));
            assert_eq!(got, p.rounded(&want), "{} {values}", p.gpu.precision());
        }
    }
}

/// A's and B's gradients, which begin at 0 and at `start`.
fn parts(gradients: &[f32], a: usize, start: usize) -> [Vec<f32>; 2] {
    [gradients[..a].to_vec(), gradients[start..].to_vec()]
}

fn linear(p: &Pair, rows: usize, inputs: usize, outputs: usize, rank: usize, dropped: bool) {
    let scaled = |len: usize, seed, scale: f32| p.rounded(&p.random(len, seed).iter().map(|v| v * scale).collect::<Vec<_>>());
    let (w, bias) = (scaled(outputs * inputs, 1, (inputs as f32).sqrt().recip()), p.random(outputs, 2));
    let (a, b) = (scaled(rank * inputs, 3, (inputs as f32).sqrt().recip()), scaled(outputs * rank, 4, 0.5));
    let (x, dy, before) = (p.random(rows * inputs, 5), p.random(rows * outputs, 6), p.random(rows * inputs, 7));
    let (got, want) = both!(p, e => {
        let (frozen, lora) = (e.frozen(outputs, inputs, &w), e.lora(rank, inputs, outputs, &a, &b, 0.5));
        let (xb, dyb, bias) = (e.upload(&x), e.upload(&dy), e.upload(&bias));
        let mask = dropped.then(|| e.dropout_mask(1, &[(1, 2)], 4, rows, inputs, 0.5));
        let mut x_lora = e.copy(&xb);
        if let Some(mask) = &mask {
            e.multiply(&mut x_lora, mask);
        }
        let (mut plain, mut y) = (e.alloc(rows * outputs), e.alloc(rows * outputs));
        e.linear(rows, &xb, &frozen, None, None, &mut plain);
        let t = e.linear(rows, &xb, &frozen, Some(&bias), Some((&lora, Some(&x_lora), 1.0)), &mut y).unwrap();
        let (mut dx, mut more) = (e.alloc(rows * inputs), e.upload(&before));
        e.linear_backward(rows, &dyb, &frozen, None, Some((&mut more, true)));
        let dt = e.linear_backward(rows, &dyb, &frozen, Some((&lora, mask.as_ref())), Some((&mut dx, false))).unwrap();
        // B's begin after a gap.
        let (start, scale) = (a.len().next_multiple_of(64), 0.5);
        let mut gradients = e.zeros_f32(start + b.len());
        for _ in 0..2 {
            e.lora_gradient(rows, &x_lora, &dyb, &t, &dt, &mut gradients, &LoraTarget { a: 0..a.len(), b: start..start + b.len(), scale });
        }
        [plain, y, dx, more].map(|b| e.download(&b)).into_iter().chain(parts(&e.download(&gradients), a.len(), start)).collect::<Vec<_>>()
    });
    for (what, (got, want)) in ["x W", "y", "dx", "dx added", "dA", "dB"].iter().zip(got.iter().zip(&want)) {
        p.check(&format!("linear {rows}x{inputs}x{outputs} r{rank} {what}"), got, want);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn linear_with_lora_and_its_gradients() {
    for p in pairs() {
        for (rows, inputs, outputs, rank, dropped) in [
            (2, 5, 7, 1, false),
            (30, 9, 35, 3, true),
            (26, 33, 6, 17, false),
            (64, 64, 192, 4, false),
            (300, 256, 512, 16, true),
            (1178, 1536, 1536, 4, false),
        ] {
            linear(&p, rows, inputs, outputs, rank, dropped);
        }
    }
}

/// A weight as a file has it.
struct Stored {
    precision: Precision,
    bytes: Vec<u8>,
    values: Vec<f32>,
    columns: usize,
}

impl Stored {
    fn new(precision: Precision, columns: usize, values: &[f32]) -> Arc<Self> {
        let word = |v: &f32| if precision == Precision::F16 { half::f16::from_f32(*v).to_bits() } else { half::bf16::from_f32(*v).to_bits() };
        let value = |w: u16| if precision == Precision::F16 { half::f16::from_bits(w).to_f32() } else { half::bf16::from_bits(w).to_f32() };
        let words: Vec<u16> = values.iter().map(word).collect();
        let (bytes, values) = (words.iter().flat_map(|w| w.to_le_bytes()).collect(), words.into_iter().map(value).collect());
        Arc::new(Self { precision, bytes, values, columns })
    }
}

impl StoredMatrix for Stored {
    fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (out, row) in out.chunks_exact_mut(columns.len()).zip(rows) {
            out.copy_from_slice(&self.values[row * self.columns..][columns.clone()]);
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        Some((self.precision, &self.bytes))
    }
}

/// Errors of at most a few of f32's digits, where a product of the model's precision would be off by 1e-3.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn weights_kept_in_half_precision_are_multiplied_as_f32() {
    for p in pairs().into_iter().filter(|p| p.gpu.precision() != Precision::F32) {
        let exact = Pair { gpu: p.gpu.in_precision(Precision::F32).expect("f32"), cpu: p.cpu, tolerance: 2e-5 };
        for stored in [Precision::F16, p.gpu.precision()] {
            for (rows, inputs, outputs) in [(1, 5, 7), (3, 33, 20), (4, 1536, 9216), (2, 256, 1536)] {
                let w: Vec<f32> = random(outputs * inputs, 1).iter().map(|v| v / (inputs as f32).sqrt()).collect();
                let (x, bias, dy, before) = (random(rows * inputs, 2), random(outputs, 3), random(rows * outputs, 4), random(rows * inputs, 5));
                let (got, want) = both!(exact, e => {
                    let frozen = e.frozen_kept(outputs, inputs, Stored::new(stored, inputs, &w), p.gpu.precision());
                    let (xb, dyb, biases) = (e.upload(&x), e.upload(&dy), e.upload(&bias));
                    let (mut plain, mut y, mut dx, mut more) = (e.alloc(rows * outputs), e.alloc(rows * outputs), e.alloc(rows * inputs), e.upload(&before));
                    e.linear(rows, &xb, &frozen, None, None, &mut plain);
                    e.linear(rows, &xb, &frozen, Some(&biases), None, &mut y);
                    e.linear_backward(rows, &dyb, &frozen, None, Some((&mut dx, false)));
                    e.linear_backward(rows, &dyb, &frozen, None, Some((&mut more, true)));
                    [plain, y, dx, more]
                });
                for (what, (got, want)) in ["x W", "y", "dx", "dx added"].iter().zip(got.iter().zip(&want)) {
                    exact.compare(&format!("{stored} kept {rows}x{inputs}x{outputs} {what}"), got, want);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn attention_and_its_gradients() {
    for p in pairs() {
        for (batch, heads, head_dim, image, context, context_queries) in [
            (2, 2, 5, 3, 4, true),
            (1, 1, 8, 5, 2, false),
            (2, 2, 3, 6, 0, false),
            (1, 1, 17, 1, 1, true),
            (2, 3, 12, 51, 50, true),
            (2, 3, 64, 1, 1, true),
            (2, 2, 64, 130, 77, true),
            (1, 3, 64, 257, 33, false),
            (1, 2, 64, 200, 0, false),
            (1, 2, 100, 70, 9, true),
            (1, 2, 64, 1024, 154, true),
        ] {
            let shape = AttentionShape { batch, heads, head_dim, image, context, context_queries };
            let (ni, nc) = (batch * image * shape.width(), batch * context * shape.width());
            let values: Vec<Vec<f32>> = (0..8).map(|i| p.random(if i % 2 == 0 { ni } else { nc }, i)).collect();
            let (got, want) = both!(p, e => {
                let joint =
                    |i: usize, wanted: bool| Joint { image: e.upload(&values[2 * i]), context: (wanted && nc > 0).then(|| e.upload(&values[2 * i + 1])) };
                let (q, k, v, d) = (joint(0, context_queries), joint(1, true), joint(2, true), joint(3, context_queries));
                let (out, lse) = e.attention(&shape, &q, &k, &v);
                let stream = |tokens, query| e.qkv(batch * tokens, shape.width(), query, false);
                let mut gradients = Joint { image: stream(image, true), context: (nc > 0).then(|| stream(context, context_queries)) };
                e.attention_backward(&shape, (&q, &k, &v), &out, &lse, &d, &mut gradients);
                let image = [gradients.image.q, Some(gradients.image.k), Some(gradients.image.v)];
                let context = gradients.context.map_or([None, None, None], |c| [c.q, Some(c.k), Some(c.v)]);
                std::iter::once((Some(out.image), out.context))
                    .chain(image.into_iter().zip(context))
                    .map(|(image, context)| [image, context].map(|b| b.map(|b| e.download(&b)).unwrap_or_default()).concat())
                    .collect::<Vec<_>>()
            });
            for (what, (got, want)) in ["out", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                p.check(&format!("attention {batch}x{heads}x{head_dim} {image}+{context} {what}"), got, want);
            }
        }
    }
}

/// The same call twice gives the same bits: no result depends on which thread came first.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn results_repeat_bit_by_bit() {
    for p in pairs() {
        let (rows, inputs, outputs, rank) = (1178, 1536, 1536, 4);
        let (w, a, b) = (p.random(outputs * inputs, 1), p.random(rank * inputs, 2), p.random(outputs * rank, 3));
        let (x, dy) = (p.random(rows * inputs, 4), p.random(rows * outputs, 5));
        let e = &p.gpu;
        let (frozen, lora, xb, dyb) = (e.frozen(outputs, inputs, &w), e.lora(rank, inputs, outputs, &a, &b, 1.0), e.upload(&x), e.upload(&dy));
        let run = || {
            let mut y = e.alloc(rows * outputs);
            let t = e.linear(rows, &xb, &frozen, None, Some((&lora, None, 1.0)), &mut y).unwrap();
            let mut dx = e.alloc(rows * inputs);
            let dt = e.linear_backward(rows, &dyb, &frozen, Some((&lora, None)), Some((&mut dx, false))).unwrap();
            let mut gradients = e.zeros_f32(a.len() + b.len());
            let target = LoraTarget { a: 0..a.len(), b: a.len()..a.len() + b.len(), scale: 1.0 };
            e.lora_gradient(rows, &xb, &dyb, &t, &dt, &mut gradients, &target);
            [y, dx, gradients].map(|b| e.download(&b).iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        let first = run();
        for _ in 0..5 {
            assert!(first == run(), "{}", p.gpu.precision());
        }
    }
}
