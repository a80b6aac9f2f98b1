//! Instruction sets chosen at run time, and functions that compilers vectorise.

use std::sync::OnceLock;

/// The instruction set of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// What the target guarantees.
    Plain,
}

/// The best instruction set of this processor; the environment variable `FINETUNE_SIMD` (`avx512`, `avx2`, `plain`)
/// limits it.
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let limit = std::env::var("FINETUNE_SIMD").unwrap_or_default();
        detect(match limit.as_str() {
            "plain" => Level::Plain,
            "avx2" => Level::Avx2,
            _ => Level::Avx512,
        })
    })
}

#[cfg(target_arch = "x86_64")]
fn detect(limit: Level) -> Level {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match limit {
        Level::Avx512 if avx512 && avx2 => Level::Avx512,
        Level::Avx512 | Level::Avx2 if avx2 => Level::Avx2,
        _ => Level::Plain,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect(_limit: Level) -> Level {
    Level::Plain
}

/// Defines a function compiled for each instruction set; the call picks one at run time.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) {
                    body($($arg),*)
                }
                match $crate::kernels::cpu::simd::level() {
                    // SAFETY: the processor has these instructions (`level`).
                    $crate::kernels::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::kernels::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::cpu::simd::Level::Plain => {}
                }
            }
            body($($arg),*);
        }
    };
}
pub(crate) use vectorised;

/// Lanes of a sum: fixed, so that every instruction set adds in the same order.
pub(crate) const LANES: usize = 16;

/// Σ f(i) over `0..n` in [`LANES`] fixed lanes.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(i + lane);
        }
        i += LANES;
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(n - whole) {
        *sum += f(whole + lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// e^x to about one unit in the last place, for x clamped to [-87, 88]; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r, |r| <= ln 2 / 2; n by adding 1.5 * 2^23, which leaves the integer in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    // Comparisons with NaN are false, so this order keeps it: a damaged weight must not become a small probability.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts (Cody and Waite).
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0.0_f64;
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(super::exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert!((super::exp(-1000.0) - (-87.0_f32).exp()).abs() < 1e-44);
    }

    vectorised! {
        fn exp_each(x: &mut [f32]) {
            for x in x {
                *x = exp(*x);
            }
        }
    }

    /// In every lane, and in code compiled for each instruction set.
    #[test]
    fn exp_keeps_nan() {
        for place in 0..19 {
            let mut values = [1.0_f32; 19];
            values[place] = f32::NAN;
            exp_each(&mut values);
            for (i, value) in values.iter().enumerate() {
                assert_eq!(value.is_nan(), i == place, "{i}: {value}");
            }
        }
        assert!(exp(-f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) > 0.0 && exp(f32::INFINITY).is_finite(), "infinities are clamped");
    }

    #[test]
    fn sums_count_every_element_once() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert!((super::sum(n, |i| i as f32) - (n * n.saturating_sub(1) / 2) as f32).abs() < 1e-3);
        }
    }
}
