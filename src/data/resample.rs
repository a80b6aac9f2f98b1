//! Antialiased bilinear resizing in Pillow's fixed-point arithmetic, so that a picture becomes the same bytes as there.

/// Fraction bits of the weights: 32 bits less 8 of the pixel and 2 of headroom.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Weights of the input pixels for each output pixel of one axis.
struct Kernel {
    /// First input pixel and number of weights, per output pixel.
    bounds: Vec<(usize, usize)>,
    weights: Vec<i32>,
    /// Weights reserved per output pixel.
    stride: usize,
}

impl Kernel {
    /// The triangle filter, widened by the scale when the picture shrinks.
    fn bilinear(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter_scale;
        let stride = support.ceil() as usize * 2 + 1;
        let mut bounds = Vec::with_capacity(output);
        let mut weights = vec![0; output * stride];
        let mut row = vec![0.0; stride];
        for (out, fixed) in weights.chunks_exact_mut(stride).enumerate() {
            let center = (out as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let count = ((center + support + 0.5) as usize).min(input) - first;
            let row = &mut row[..count];
            for (x, weight) in row.iter_mut().enumerate() {
                let distance = ((x + first) as f64 - center + 0.5) * (1.0 / filter_scale);
                *weight = (1.0 - distance.abs()).max(0.0);
            }
            let sum: f64 = row.iter().sum();
            for (fixed, weight) in fixed.iter_mut().zip(row) {
                let weight = if sum == 0.0 { *weight } else { *weight / sum };
                *fixed = (0.5 + weight * f64::from(1_u32 << PRECISION_BITS)) as i32;
            }
            bounds.push((first, count));
        }
        Self { bounds, weights, stride }
    }

    fn of(&self, out: usize) -> (usize, &[i32]) {
        let (first, count) = self.bounds[out];
        (first, &self.weights[out * self.stride..out * self.stride + count])
    }
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Resizes `[height, width, 3]` bytes to `[to_height, to_width, 3]`, one axis after the other, rounding in between.
///
/// The vertical pass comes first where the height loses more than twice what the width loses, as in Pillow 13
/// (python-pillow/Pillow#9549). The order is visible: it decides which rounding happens first.
pub(super) fn bilinear_rgb(data: &[u8], (width, height): (usize, usize), (to_width, to_height): (usize, usize)) -> Vec<u8> {
    match (width == to_width, height == to_height) {
        (true, true) => data.to_vec(),
        (false, true) => resize_rows(data, width, height, to_width),
        (true, false) => resize_columns(data, width, height, to_height),
        (false, false) => {
            let height_loss = height as i64 - to_height as i64;
            let width_loss = width as i64 - to_width as i64;
            if height_loss > 0 && height_loss > 2 * width_loss {
                resize_rows(&resize_columns(data, width, height, to_height), width, to_height, to_width)
            } else {
                resize_columns(&resize_rows(data, width, height, to_width), to_width, height, to_height)
            }
        }
    }
}

fn resize_rows(data: &[u8], width: usize, height: usize, to_width: usize) -> Vec<u8> {
    let kernel = Kernel::bilinear(width, to_width);
    let mut out = vec![0; to_width * height * 3];
    for (from, to) in data.chunks_exact(width * 3).zip(out.chunks_exact_mut(to_width * 3)) {
        for (x, pixel) in to.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (first, weights) = kernel.of(x);
            let mut sum = [1_i32 << (PRECISION_BITS - 1); 3];
            for (source, weight) in from[first * 3..].as_chunks::<3>().0.iter().zip(weights) {
                for c in 0..3 {
                    sum[c] += i32::from(source[c]) * weight;
                }
            }
            *pixel = sum.map(clip8);
        }
    }
    out
}

fn resize_columns(data: &[u8], width: usize, height: usize, to_height: usize) -> Vec<u8> {
    let kernel = Kernel::bilinear(height, to_height);
    let row = width * 3;
    let mut out = vec![0; row * to_height];
    let mut sums = vec![0_i32; row];
    for (y, to) in out.chunks_exact_mut(row).enumerate() {
        let (first, weights) = kernel.of(y);
        sums.fill(1 << (PRECISION_BITS - 1));
        for (from, weight) in data[first * row..].chunks_exact(row).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(from) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (value, sum) in to.iter_mut().zip(&sums) {
            *value = clip8(*sum);
        }
    }
    out
}
