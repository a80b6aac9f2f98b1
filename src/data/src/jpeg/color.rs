//! Chroma upsampling (`jdsample.c`) and colour conversion (`jdcolor.c`) of libjpeg-turbo.

use super::header::{Color, Frame};
use super::scan::Samples;

/// Upsamples every component and converts to RGB, `[height, width, 3]`.
pub(super) fn to_rgb(frame: &Frame, color: Color, samples: Vec<Samples>) -> Vec<u8> {
    let (width, height) = (usize::from(frame.width), usize::from(frame.height));
    let planes: Vec<Vec<u8>> = frame
        .components
        .iter()
        .zip(samples)
        .map(|(component, samples)| upsample(&samples, (frame.max_h / component.h, frame.max_v / component.v), (width, height)))
        .collect();
    let mut out = vec![0; width * height * 3];
    let pixels = out.as_chunks_mut::<3>().0.iter_mut();
    match planes.as_slice() {
        [y] => pixels.zip(y).for_each(|(pixel, y)| *pixel = [*y; 3]),
        [a, b, c] if color == Color::Rgb => pixels.zip(a).zip(b).zip(c).for_each(|(((pixel, a), b), c)| *pixel = [*a, *b, *c]),
        [y, cb, cr] => pixels.zip(y).zip(cb).zip(cr).for_each(|(((pixel, y), cb), cr)| *pixel = ycc_to_rgb(*y, *cb, *cr)),
        [a, b, c, k] => pixels.zip(a).zip(b).zip(c).zip(k).for_each(|((((pixel, a), b), c), k)| {
            // YCCK holds inverted CMY; Pillow inverts all four again ("CMYK;I").
            let inverted = if color == Color::Ycck { ycc_to_rgb(*a, *b, *c).map(|v| 255 - v) } else { [*a, *b, *c] };
            *pixel = cmyk_to_rgb(inverted.map(|v| 255 - v), 255 - k);
        }),
        _ => {}
    }
    out
}

/// `x * 65536`, rounded.
const fn fix(x: f64) -> i32 {
    (x * 65536.0 + 0.5) as i32
}

fn ycc_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((fix(1.402) * cr + HALF) >> 16);
    let green = y + ((-fix(0.344_14) * cb + HALF - fix(0.714_14) * cr) >> 16);
    let blue = y + ((fix(1.772) * cb + HALF) >> 16);
    [red, green, blue].map(|v| v.clamp(0, 255) as u8)
}

/// Pillow's conversion: `255-K` less the ink's share of it.
fn cmyk_to_rgb(cmy: [u8; 3], k: u8) -> [u8; 3] {
    let white = i32::from(255 - k);
    cmy.map(|ink| {
        let product = i32::from(ink) * white + 128;
        (white - (((product >> 8) + product) >> 8)).clamp(0, 255) as u8
    })
}

/// Brings a component to the picture's size, the triangle filter for factors of 2 and repetition otherwise.
fn upsample(samples: &Samples, factors: (usize, usize), (width, height): (usize, usize)) -> Vec<u8> {
    let mut out = Vec::with_capacity(width * height);
    let last_row = samples.height - 1;
    let smooth = samples.width > 2;
    let mut row = vec![0; samples.width * factors.0];
    let mut sums = vec![0; samples.width];
    for y in 0..height {
        let near_index = (y / factors.1).min(last_row);
        let near = samples.row(near_index);
        // The other row of the vertical filter: above for even rows, below for odd ones; edges repeat.
        let above = y % 2 == 0;
        let far = samples.row(if above { near_index.saturating_sub(1) } else { (near_index + 1).min(last_row) });
        match factors {
            (1, 1) => row.copy_from_slice(near),
            (2, 1) if smooth => double_columns(near, &mut row),
            (1, 2) => {
                let bias = if above { 1 } else { 2 };
                for ((out, n), f) in row.iter_mut().zip(near).zip(far) {
                    *out = ((u16::from(*n) * 3 + u16::from(*f) + bias) >> 2) as u8;
                }
            }
            (2, 2) if smooth => {
                for ((sum, n), f) in sums.iter_mut().zip(near).zip(far) {
                    *sum = u16::from(*n) * 3 + u16::from(*f);
                }
                double_sums(&sums, &mut row);
            }
            (h, _) => {
                for (out, n) in row.chunks_exact_mut(h).zip(near) {
                    out.fill(*n);
                }
            }
        }
        out.extend_from_slice(&row[..width]);
    }
    out
}

/// `h2v1_fancy_upsample`: 3/4 of the nearer sample, 1/4 of the farther one; ends are copied.
fn double_columns(input: &[u8], out: &mut [u8]) {
    let at = |i: usize| u16::from(input[i]);
    let last = input.len() - 1;
    for (i, pair) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let value = at(i) * 3;
        pair[0] = if i == 0 { input[0] } else { ((value + at(i - 1) + 1) >> 2) as u8 };
        pair[1] = if i == last { input[last] } else { ((value + at(i + 1) + 2) >> 2) as u8 };
    }
}

/// The horizontal half of `h2v2_fancy_upsample` on vertical sums (scaled by 4).
fn double_sums(sums: &[u16], out: &mut [u8]) {
    let last = sums.len() - 1;
    for (i, pair) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let value = sums[i] * 3;
        pair[0] = ((if i == 0 { sums[0] * 4 } else { value + sums[i - 1] } + 8) >> 4) as u8;
        pair[1] = ((if i == last { sums[last] * 4 } else { value + sums[i + 1] } + 7) >> 4) as u8;
    }
}
