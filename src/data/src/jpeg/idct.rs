//! The accurate integer inverse DCT of libjpeg (`jidctint.c`): Loeffler, Ligtenberg and Moschytz, "Practical Fast 1-D DCT
//! Algorithms with 11 Multiplications", 1989, with 13-bit constants.

const CONST_BITS: u32 = 13;
const PASS1_BITS: u32 = 2;

/// Constants scaled by 2^13, named by their values.
const C0_298: i32 = 2446;
const C0_390: i32 = 3196;
const C0_541: i32 = 4433;
const C0_765: i32 = 6270;
const C0_899: i32 = 7373;
const C1_175: i32 = 9633;
const C1_501: i32 = 12299;
const C1_847: i32 = 15137;
const C1_961: i32 = 16069;
const C2_053: i32 = 16819;
const C2_562: i32 = 20995;
const C3_072: i32 = 25172;

/// One dimension; the result is scaled by 2^13 (and sqrt(8)). Damaged files may overflow, so sums wrap.
fn idct_1d(v: [i32; 8]) -> [i32; 8] {
    let mul = i32::wrapping_mul;
    let add = i32::wrapping_add;
    let sub = i32::wrapping_sub;
    // Even part.
    let z1 = mul(add(v[2], v[6]), C0_541);
    let t2 = sub(z1, mul(v[6], C1_847));
    let t3 = add(z1, mul(v[2], C0_765));
    let t0 = add(v[0], v[4]) << CONST_BITS;
    let t1 = sub(v[0], v[4]) << CONST_BITS;
    let (e0, e3) = (add(t0, t3), sub(t0, t3));
    let (e1, e2) = (add(t1, t2), sub(t1, t2));
    // Odd part.
    let [o0, o1, o2, o3] = [v[7], v[5], v[3], v[1]];
    let z5 = mul(add(add(o0, o2), add(o1, o3)), C1_175);
    let z1 = mul(add(o0, o3), -C0_899);
    let z2 = mul(add(o1, o2), -C2_562);
    let z3 = add(mul(add(o0, o2), -C1_961), z5);
    let z4 = add(mul(add(o1, o3), -C0_390), z5);
    let o0 = add(mul(o0, C0_298), add(z1, z3));
    let o1 = add(mul(o1, C2_053), add(z2, z4));
    let o2 = add(mul(o2, C3_072), add(z2, z3));
    let o3 = add(mul(o3, C1_501), add(z1, z4));
    [add(e0, o3), add(e1, o2), add(e2, o1), add(e3, o0), sub(e3, o0), sub(e2, o1), sub(e1, o2), sub(e0, o3)]
}

/// Divides by 2^bits, rounding to nearest.
fn descale(v: i32, bits: u32) -> i32 {
    v.wrapping_add(1 << (bits - 1)) >> bits
}

/// Dequantizes and transforms `coefficients` (natural order) to 8 rows of 8 samples at `out`, `stride` apart.
pub(super) fn idct(coefficients: &[i16; 64], quantization: &[u16; 64], out: &mut [u8], stride: usize) {
    let mut work = [0_i32; 64];
    for x in 0..8 {
        let column: [i32; 8] = std::array::from_fn(|y| i32::from(coefficients[y * 8 + x]) * i32::from(quantization[y * 8 + x]));
        if column[1..] == [0; 7] {
            (0..8).for_each(|y| work[y * 8 + x] = column[0] << PASS1_BITS);
            continue;
        }
        for (y, value) in idct_1d(column).into_iter().enumerate() {
            work[y * 8 + x] = descale(value, CONST_BITS - PASS1_BITS);
        }
    }
    for (row, out) in work.as_chunks::<8>().0.iter().zip(out.chunks_mut(stride)) {
        for (value, sample) in idct_1d(*row).into_iter().zip(&mut out[..8]) {
            *sample = (descale(value, CONST_BITS + PASS1_BITS + 3) + 128).clamp(0, 255) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition in f64: the integer transform is within one level.
    #[test]
    fn is_the_inverse_dct() {
        let mut stream = finetune_common::rng::Stream::new(1, finetune_common::rng::Purpose::Noise, 0, 0);
        for _ in 0..200 {
            let mut coefficients = [0_i16; 64];
            coefficients.iter_mut().take(20).for_each(|c| *c = (stream.normal_f32() * 60.0) as i16);
            let mut got = [0_u8; 64];
            idct(&coefficients, &[1; 64], &mut got, 8);
            for (i, got) in got.iter().enumerate() {
                let (y, x) = (i / 8, i % 8);
                let mut sum = 0.0;
                for (k, c) in coefficients.iter().enumerate() {
                    let norm = |k: usize| if k == 0 { 0.5_f64.sqrt() } else { 1.0 };
                    let wave = |k: usize, n: usize| ((2 * n + 1) as f64 * k as f64 * std::f64::consts::PI / 16.0).cos();
                    sum += 0.25 * norm(k / 8) * norm(k % 8) * f64::from(*c) * wave(k / 8, y) * wave(k % 8, x);
                }
                let want = (sum + 128.0).clamp(0.0, 255.0);
                assert!((f64::from(*got) - want).abs() < 1.0, "{got} for {want}");
            }
        }
    }
}
