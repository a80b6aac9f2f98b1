//! Every operation against its formula in f64, and its backward against central differences of that formula.

use super::*;
use finetune_common::rng::{Purpose, Stream};

fn engine() -> Cpu {
    Cpu::default()
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Stream::new(seed, Purpose::Noise, 1, 0).fill_normal(&mut values);
    values
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn assert_close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let error = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    assert!(error <= 2e-6 * norm + 1e-7, "{what}: {error} of {norm}");
}

/// d(Σ weights · f(x))/dx by central differences in f64.
fn slopes(x: &[f32], weights: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let objective = |x: &[f64]| f(x).iter().zip(weights).map(|(y, w)| y * f64::from(*w)).sum::<f64>();
    let mut point = wide(x);
    (0..x.len())
        .map(|i| {
            let (at, step) = (point[i], 1e-5);
            point[i] = at + step;
            let up = objective(&point);
            point[i] = at - step;
            let down = objective(&point);
            point[i] = at;
            (up - down) / (2.0 * step)
        })
        .collect()
}

const BATCH: usize = 2;
const TOKENS: usize = 3;
const WIDTH: usize = 21;

fn modulation(buffer: &HostBuffer) -> Modulation<'_, HostBuffer> {
    Modulation { values: buffer, stride: 3 * WIDTH, tokens: TOKENS, width: WIDTH }
}

/// Offsets within the modulation's row.
const SHIFT: usize = WIDTH;
const SCALE: usize = 0;
const GATE: usize = 2 * WIDTH;

fn reference_modulate(x: &[f64], m: &[f64]) -> Vec<f64> {
    let mut y = Vec::new();
    for (row, x) in x.chunks(WIDTH).enumerate() {
        let m = &m[row / TOKENS * 3 * WIDTH..];
        let mean = x.iter().sum::<f64>() / WIDTH as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / WIDTH as f64;
        y.extend((0..WIDTH).map(|i| (x[i] - mean) / (variance + 1e-6).sqrt() * (1.0 + m[SCALE + i]) + m[SHIFT + i]));
    }
    y
}

#[test]
fn modulate_and_its_gradients() {
    let e = engine();
    let (x, m, w) = (random(BATCH * TOKENS * WIDTH, 1), random(BATCH * 3 * WIDTH, 2), random(BATCH * TOKENS * WIDTH, 3));
    let (xb, mb, wb) = (e.upload(&x), e.upload(&m), e.upload(&w));
    let (y, stats) = e.modulate(&xb, modulation(&mb), SHIFT, SCALE);
    assert_close(&e.download(&y), &reference_modulate(&wide(&x), &wide(&m)), "forward");
    let (mut dx, mut dm) = (e.upload(&w), e.zeros(m.len()));
    e.modulate_backward(&xb, &stats, modulation(&mb), SHIFT, SCALE, &wb, Some(&mut dx), Some(&mut dm));
    let want: Vec<f64> = slopes(&x, &w, |x| reference_modulate(x, &wide(&m))).iter().zip(&w).map(|(s, w)| s + f64::from(*w)).collect();
    assert_close(&e.download(&dx), &want, "dx, added to what was there");
    assert_close(&e.download(&dm), &slopes(&m, &w, |m| reference_modulate(&wide(&x), m)), "d shift and scale");
}

#[test]
fn gate_and_its_gradients() {
    let e = engine();
    let n = BATCH * TOKENS * WIDTH;
    let (x, y, m, w) = (random(n, 1), random(n, 2), random(BATCH * 3 * WIDTH, 3), random(n, 4));
    let reference =
        |y: &[f64], m: &[f64]| -> Vec<f64> { (0..n).map(|i| f64::from(x[i]) + y[i] * m[i / (TOKENS * WIDTH) * 3 * WIDTH + GATE + i % WIDTH]).collect() };
    let (yb, mb) = (e.upload(&y), e.upload(&m));
    assert_close(&e.download(&e.gate_residual(&e.upload(&x), &yb, modulation(&mb), GATE)), &reference(&wide(&y), &wide(&m)), "forward");
    let mut dm = e.zeros(m.len());
    let dy = e.gate_backward(&e.upload(&w), modulation(&mb), GATE, Some((&yb, &mut dm)));
    assert_close(&e.download(&dy), &slopes(&y, &w, |y| reference(y, &wide(&m))), "dy");
    assert_close(&e.download(&dm), &slopes(&m, &w, |m| reference(&wide(&y), m)), "d gate");
}

#[test]
fn activations_and_their_gradients() {
    let e = engine();
    let mut x = random(300, 1);
    x.extend([0.0, -0.0, 30.0, -30.0, 1e-6]);
    let w = random(x.len(), 2);
    let gelu = |x: &[f64]| x.iter().map(|x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())).collect::<Vec<_>>();
    let silu = |x: &[f64]| x.iter().map(|x| x / (1.0 + (-x).exp())).collect::<Vec<_>>();
    let xb = e.upload(&x);
    assert_close(&e.download(&e.gelu(&xb)), &gelu(&wide(&x)), "gelu");
    assert_close(&e.download(&e.silu(&xb)), &silu(&wide(&x)), "silu");
    let (mut dg, mut ds) = (e.upload(&w), e.upload(&w));
    e.gelu_backward(&xb, &mut dg);
    e.silu_backward(&xb, &mut ds);
    assert_close(&e.download(&dg), &slopes(&x, &w, gelu), "d gelu");
    assert_close(&e.download(&ds), &slopes(&x, &w, silu), "d silu");
}

#[test]
fn rms_norm_and_its_gradient() {
    let e = engine();
    for d in [8, 19, 64] {
        let (x, weight, w) = (random(7 * d, 1), random(d, 2), random(7 * d, 3));
        let reference = |x: &[f64]| -> Vec<f64> {
            let norm = |row: &[f64]| (row.iter().map(|v| v * v).sum::<f64>() / d as f64 + 1e-6).sqrt();
            x.chunks(d).flat_map(|row| row.iter().zip(&weight).map(|(v, w)| v / norm(row) * f64::from(*w)).collect::<Vec<_>>()).collect()
        };
        let (xb, wb) = (e.upload(&x), e.upload(&weight));
        let (y, stats) = e.rms_norm(&xb, &wb);
        assert_close(&e.download(&y), &reference(&wide(&x)), "forward");
        let mut dx = e.upload(&w);
        e.rms_norm_backward(&xb, &wb, &stats, &mut dx);
        assert_close(&e.download(&dx), &slopes(&x, &w, reference), "dx");
    }
}

/// q, k and v of both streams one after another, as one point in space.
fn reference_attention(shape: &AttentionShape, point: &[f64]) -> Vec<f64> {
    let (width, dim) = (shape.width(), shape.head_dim);
    let (ni, nc) = (shape.batch * shape.image * width, shape.batch * shape.context * width);
    let part = |i: usize| (&point[i * (ni + nc)..][..ni], &point[i * (ni + nc) + ni..][..nc]);
    let row = |(image, context): (&[f64], &[f64]), b: usize, t: usize, h: usize| -> Vec<f64> {
        let (source, index) = if t < shape.image { (image, b * shape.image + t) } else { (context, b * shape.context + t - shape.image) };
        source[index * width + h * dim..][..dim].to_vec()
    };
    let mut out = vec![0.0; ni + if shape.context_queries { nc } else { 0 }];
    for b in 0..shape.batch {
        for h in 0..shape.heads {
            for t in 0..if shape.context_queries { shape.keys() } else { shape.image } {
                let q = row(part(0), b, t, h);
                let scores: Vec<f64> =
                    (0..shape.keys()).map(|u| q.iter().zip(row(part(1), b, u, h)).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()).collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                let start = if t < shape.image { (b * shape.image + t) * width } else { ni + (b * shape.context + t - shape.image) * width } + h * dim;
                for (u, s) in scores.iter().enumerate() {
                    let p = (s - largest).exp() / total;
                    row(part(2), b, u, h).iter().enumerate().for_each(|(i, v)| out[start + i] += p * v);
                }
            }
        }
    }
    out
}

#[test]
fn attention_and_its_gradients() {
    let e = engine();
    for (heads, head_dim, image, context, context_queries) in
        [(2, 5, 3, 4, true), (1, 8, 5, 2, false), (2, 3, 6, 0, false), (1, 17, 1, 1, true), (1, 4, 51, 50, true)]
    {
        let shape = AttentionShape { batch: if image > 50 { 1 } else { 2 }, heads, head_dim, image, context, context_queries };
        let (ni, nc) = (shape.batch * image * shape.width(), shape.batch * context * shape.width());
        let point = random(3 * (ni + nc), 1);
        let joint = |i: usize, wanted: bool| Joint {
            image: e.upload(&point[i * (ni + nc)..][..ni]),
            context: (wanted && nc > 0).then(|| e.upload(&point[i * (ni + nc) + ni..][..nc])),
        };
        let (q, k, v) = (joint(0, context_queries), joint(1, true), joint(2, true));
        let (out, lse) = e.attention(&shape, &q, &k, &v);
        let flat = |j: &Joint<HostBuffer>| [e.download(&j.image), j.context.as_ref().map(|c| e.download(c)).unwrap_or_default()].concat();
        assert_close(&flat(&out), &reference_attention(&shape, &wide(&point)), "forward");
        let w = random(flat(&out).len(), 2);
        let d_out = Joint { image: e.upload(&w[..ni]), context: (w.len() > ni).then(|| e.upload(&w[ni..])) };
        let stream = |tokens, query| e.qkv(shape.batch * tokens, shape.width(), query, true);
        let mut d = Joint { image: stream(image, true), context: (nc > 0).then(|| stream(context, context_queries)) };
        e.attention_backward(&shape, (&q, &k, &v), &out, &lse, &d_out, &mut d);
        let part = |part: fn(&Qkv<HostBuffer>) -> Option<&HostBuffer>, len: usize| {
            let streams = [Some(&d.image), d.context.as_ref()].map(|s| s.and_then(part).map(|b| e.download(b)).unwrap_or_default());
            let mut values = streams.concat();
            values.resize(len, 0.0);
            values
        };
        let got = [part(|s| s.q.as_ref(), ni + nc), part(|s| Some(&s.k), ni + nc), part(|s| Some(&s.v), ni + nc)].concat();
        assert_close(&got, &slopes(&point, &w, |point| reference_attention(&shape, point)), "dq, dk, dv");
    }
}

#[test]
fn norms_and_activations_of_text_encoders() {
    let e = engine();
    let (rows, d) = (37, 21);
    let (x, weight, bias) = (random(rows * d, 1), random(d, 2), random(d, 3));
    let (xb, wb, bb) = (e.upload(&x), e.upload(&weight), e.upload(&bias));
    let wide_rows = |f: &dyn Fn(&[f64]) -> Vec<f64>| wide(&x).chunks(d).flat_map(f).collect::<Vec<f64>>();
    let layer = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / d as f64;
        let root = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64 + 1e-5).sqrt();
        (0..d).map(|i| (x[i] - mean) / root * f64::from(weight[i]) + f64::from(bias[i])).collect()
    };
    assert_close(&e.download(&e.layer_norm(&xb, &wb, &bb, 1e-5)), &wide_rows(&layer), "LayerNorm");
    let rms = |x: &[f64]| {
        let root = (x.iter().map(|v| v * v).sum::<f64>() / d as f64 + 1e-3).sqrt();
        (0..d).map(|i| x[i] / root * f64::from(weight[i])).collect()
    };
    assert_close(&e.download(&e.rms_norm_rows(&xb, &wb, 1e-3)), &wide_rows(&rms), "RMSNorm");
    let tanh = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
    let (pairs, width) = (random(6 * 2 * 11, 4), 11);
    let gated: Vec<f64> = wide(&pairs).chunks(2 * width).flat_map(|row| (0..width).map(|i| tanh(row[i]) * row[width + i]).collect::<Vec<_>>()).collect();
    assert_close(&e.download(&e.gated_gelu(&e.upload(&pairs), width)), &gated, "gated GELU");
    let activated = |activation| {
        let mut y = e.upload(&x);
        e.activate(&mut y, activation);
        e.download(&y)
    };
    let quick: Vec<f64> = wide(&x).iter().map(|x| x / (1.0 + (-1.702 * x).exp())).collect();
    assert_close(&activated(TextActivation::QuickGelu), &quick, "quick GELU");
    // Φ by the series of the error function, which converges fast enough for |x| < 6.
    let erf = |z: f64| {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    let exact: Vec<f64> = wide(&x).iter().map(|x| 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt()))).collect();
    assert_close(&activated(TextActivation::Gelu), &exact, "GELU");
}

/// Layers in a file, of two parts each.
struct Stored {
    values: Vec<f32>,
    outputs: usize,
    inputs: usize,
    seen: std::sync::Mutex<Vec<String>>,
}

struct Part<'a>(&'a [f32], usize);

impl StoredMatrix for Part<'_> {
    fn read_block(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, out: &mut [f32]) {
        for (out, row) in out.chunks_exact_mut(columns.len()).zip(rows) {
            out.copy_from_slice(&self.0[row * self.1..][columns.clone()]);
        }
    }

    fn stored(&self) -> Option<(Precision, &[u8])> {
        None
    }
}

impl LayerSource for Stored {
    fn matrices(&self, index: usize) -> Vec<StoredRows<'_>> {
        let size = self.outputs * self.inputs;
        let part = |part| Box::new(Part(&self.values[(2 * index + part) * size..][..size], self.inputs)) as Box<dyn StoredMatrix>;
        vec![StoredRows { parts: vec![part(0), part(1)], kind: Precision::F32, part_outputs: self.outputs, inputs: self.inputs }]
    }

    fn will_need(&self, index: usize) {
        self.seen.lock().unwrap().push(format!("need {index}"));
    }

    fn done(&self, index: usize) {
        self.seen.lock().unwrap().push(format!("done {index}"));
    }
}

/// Rows that cross from one part into the next, sums longer than a block, with and without bias, set and added.
#[test]
fn layers_pass_through_one_after_another() {
    let e = engine();
    for (rows, outputs, inputs) in [(1, 3, 5), (30, 70, 300), (7, 130, 257)] {
        let layers = 3;
        let source = Stored { values: random(layers * 2 * outputs * inputs, 1), outputs, inputs, seen: std::sync::Mutex::default() };
        let (x, bias, before) = (random(rows * inputs, 2), random(2 * outputs, 3), random(rows * 2 * outputs, 4));
        let mut order = Vec::new();
        e.stream_layers(layers, &source, &mut |index, matrices| {
            order.push(index);
            let weight = &source.values[index * 2 * outputs * inputs..][..2 * outputs * inputs];
            assert_eq!((matrices.len(), matrices[0].outputs()), (1, 2 * outputs));
            for (bias, accumulate) in [(None, false), (None, true), (Some(&bias), false), (Some(&bias), true)] {
                let mut y = e.upload(&before);
                e.layer_product(rows, &e.upload(&x), matrices[0], bias.map(|b| e.upload(b)).as_ref(), &mut y, accumulate);
                let want: Vec<f64> = (0..rows * 2 * outputs)
                    .map(|i| {
                        let (row, o) = (i / (2 * outputs), i % (2 * outputs));
                        let sum: f64 = (0..inputs).map(|k| f64::from(x[row * inputs + k]) * f64::from(weight[o * inputs + k])).sum();
                        sum + bias.map_or(0.0, |b| f64::from(b[o])) + if accumulate { f64::from(before[i]) } else { 0.0 }
                    })
                    .collect();
                assert_close(&e.download(&y), &want, "product");
            }
            if index == 1 { Err("stop") } else { Ok(()) }
        })
        .unwrap_err();
        assert_eq!(order, [0, 1]);
        assert_eq!(*source.seen.lock().unwrap(), ["need 0", "need 1", "done 0", "need 2"]);
    }
}

#[test]
fn rows_of_a_table_are_embedded() {
    let e = engine();
    let table = random(5 * 4, 1);
    let got = e.download(&e.embed(&Part(&table, 4), 4, &[3, 0, 3], 4));
    assert_eq!(got, [&table[12..16], &table[..4], &table[12..16], &[0.0; 4]].concat());
    let (mut first, mut second) = ([0.0; 5], [0.0; 2]);
    e.download_to(&e.upload(&table), &mut [&mut first, &mut second]);
    assert_eq!([&first[..], &second].concat(), table[..7]);
}

/// The operations of the autoencoder against their definitions, on one small picture.
#[test]
fn pictures_are_convolved_normalised_and_mixed() {
    let e = engine();
    let (channels, height, width) = (4, 5, 6);
    let pixels = height * width;
    let x = random(channels * pixels, 1);
    let picture = e.upload_picture(&x, (channels, height, width), e.padded_channels(channels));
    assert_eq!(e.download_picture(&picture, channels), x);
    assert_eq!(e.download_picture(&picture, 1), x[..pixels]);
    let at = |c: usize, row: i64, column: i64| {
        if (0..height as i64).contains(&row) && (0..width as i64).contains(&column) {
            f64::from(x[(c * height + row as usize) * width + column as usize])
        } else {
            0.0
        }
    };
    for (resampling, out_height, out_width) in [(Resampling::Same, 5, 6), (Resampling::Halve, 2, 3), (Resampling::Double, 10, 12)] {
        let (weight, bias) = (random(3 * channels * 9, 2), random(3, 3));
        let host = HostConvolution { weight: &weight, bias: &bias, inputs: channels, outputs: 3, kernel: 3 };
        let convolution = e.convolution(host, (channels, 3), resampling);
        let y = e.convolve(&picture, &convolution, None);
        assert_eq!((y.height(), y.width()), (out_height, out_width));
        let mut want = Vec::new();
        for o in 0..3 {
            for row in 0..out_height as i64 {
                for column in 0..out_width as i64 {
                    let mut sum = f64::from(bias[o]);
                    for c in 0..channels {
                        for tap in 0..9_i64 {
                            let (r, q) = (tap / 3, tap % 3);
                            sum += f64::from(weight[(o * channels + c) * 9 + tap as usize])
                                * match resampling {
                                    Resampling::Same => at(c, row + r - 1, column + q - 1),
                                    Resampling::Halve => at(c, 2 * row + r, 2 * column + q),
                                    // Padding comes after doubling.
                                    Resampling::Double => at(c, (row + r - 1).div_euclid(2), (column + q - 1).div_euclid(2)),
                                };
                        }
                    }
                    want.push(sum);
                }
            }
        }
        assert_close(&e.download_picture(&y, 3), &want, "convolution");
        let twice: Vec<f64> = want.iter().map(|v| 2.0 * v).collect();
        assert_close(&e.download_picture(&e.convolve(&picture, &convolution, Some(y)), 3), &twice, "added to what was there");
    }
    let norm = e.group_norm(2, &[1.0, 2.0, 3.0, 4.0], &[0.1, 0.2, 0.3, 0.4], 1e-6);
    let got = e.download_picture(&e.normalise(&picture, &norm, false), channels);
    let group = &wide(&x)[..2 * pixels];
    let mean = group.iter().sum::<f64>() / (2 * pixels) as f64;
    let root = (group.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (2 * pixels) as f64 + 1e-6).sqrt();
    let want: Vec<f64> = group.iter().enumerate().map(|(i, v)| (v - mean) / root * [1.0, 2.0][i / pixels] + f64::from([0.1_f32, 0.2][i / pixels])).collect();
    assert_close(&got[..2 * pixels], &want, "group norm");
}

/// A damaged weight shows in every result, not as a probability of 1e-38.
#[test]
fn nan_survives_attention_and_activations() {
    let e = engine();
    let shape = AttentionShape { batch: 1, heads: 1, head_dim: 8, image: 5, context: 0, context_queries: false };
    let joint = |values: &[f32]| Joint { image: e.upload(values), context: None };
    let (mut q, k, v) = (random(40, 1), random(40, 2), random(40, 3));
    q[11] = f32::NAN;
    let (out, lse) = e.attention(&shape, &joint(&q), &joint(&k), &joint(&v));
    let (out, lse) = (e.download(&out.image), e.download(&lse));
    for (token, row) in out.chunks_exact(8).enumerate() {
        assert!(row.iter().all(|x| x.is_nan() == (token == 1)), "{token}: {row:?}");
        assert_eq!(lse[token].is_nan(), token == 1);
    }
    let x = e.upload(&[1.0, f32::NAN, -1.0]);
    for y in [e.gelu(&x), e.silu(&x)] {
        let y = e.download(&y);
        assert!(y[1].is_nan() && y[0].is_finite() && y[2].is_finite(), "{y:?}");
    }
}

/// With and without LoRA and a dropout mask, for few and many rows: `y`, `dx`, `dA`, `dB`.
#[test]
fn linear_with_lora_and_its_gradients() {
    let e = engine();
    for (rows, inputs, outputs, rank, dropped) in [(2, 5, 7, 1, false), (30, 9, 35, 3, true), (26, 33, 6, 17, false)] {
        let (w, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        let (a, b, x, dy) = (random(rank * inputs, 3), random(outputs * rank, 4), random(rows * inputs, 5), random(rows * outputs, 6));
        let scale = 0.75;
        let key = [(1, 2)];
        let mask = if dropped { e.dropout_mask(1, &key, 4, rows, inputs, 0.4) } else { e.upload(&vec![1.0; rows * inputs]) };
        let m = wide(&e.download(&mask));
        let reference = |x: &[f64], a: &[f64], b: &[f64]| -> Vec<f64> {
            let mut y = Vec::new();
            for r in 0..rows {
                let x_r = &x[r * inputs..][..inputs];
                let t: Vec<f64> = (0..rank).map(|q| (0..inputs).map(|i| a[q * inputs + i] * x_r[i] * m[r * inputs + i]).sum()).collect();
                y.extend((0..outputs).map(|o| {
                    let base: f64 = (0..inputs).map(|i| f64::from(w[o * inputs + i]) * x_r[i]).sum();
                    f64::from(bias[o]) + base + scale * (0..rank).map(|q| b[o * rank + q] * t[q]).sum::<f64>()
                }));
            }
            y
        };
        let (frozen, lora) = (e.frozen(outputs, inputs, &w), e.lora(rank, inputs, outputs, &a, &b, scale as f32));
        let (xb, dyb) = (e.upload(&x), e.upload(&dy));
        let mut x_lora = e.copy(&xb);
        e.multiply(&mut x_lora, &mask);
        let mut y = e.alloc(rows * outputs);
        let t = e.linear(rows, &xb, &frozen, Some(&e.upload(&bias)), Some((&lora, Some(&x_lora), 1.0)), &mut y).unwrap();
        assert_close(&e.download(&y), &reference(&wide(&x), &wide(&a), &wide(&b)), "forward");
        let mut dx = e.alloc(rows * inputs);
        let dt = e.linear_backward(rows, &dyb, &frozen, Some((&lora, dropped.then_some(&mask))), Some((&mut dx, false))).unwrap();
        assert_close(&e.download(&dx), &slopes(&x, &dy, |x| reference(x, &wide(&a), &wide(&b))), "dx");
        let mut gradients = e.zeros(a.len() + 3 + b.len());
        let target = LoraTarget { a: 0..a.len(), b: a.len() + 3..a.len() + 3 + b.len(), scale: scale as f32 };
        e.lora_gradient(rows, &x_lora, &dyb, &t, &dt, &mut gradients, &target);
        assert_close(&gradients[target.a], &slopes(&a, &dy, |a| reference(&wide(&x), a, &wide(&b))), "dA");
        assert_close(&gradients[target.b], &slopes(&b, &dy, |b| reference(&wide(&x), &wide(&a), b)), "dB");
    }
}

#[test]
fn dropout_keeps_the_mean_and_follows_its_name() {
    let e = engine();
    let mask = |samples: &[(u64, u64)], module| e.download(&e.dropout_mask(7, samples, module, 50, 200, 0.3));
    let both = mask(&[(0, 1), (0, 2)], 3);
    let kept = both.iter().filter(|m| **m != 0.0).count() as f64 / both.len() as f64;
    assert!((kept - 0.7).abs() < 0.015, "{kept}");
    assert!(both.iter().all(|m| *m == 0.0 || (m - 1.0 / 0.7).abs() < 1e-6));
    assert_eq!(both[10_000..], mask(&[(0, 2)], 3));
    for other in [mask(&[(0, 2)], 4), mask(&[(1, 2)], 3), mask(&[(0, 3)], 3)] {
        assert_ne!(both[10_000..], other);
    }
}
