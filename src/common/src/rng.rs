//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
//!
//! A stream is named by `(seed, purpose, a, b)`; by convention `a` is the epoch (or the step) and `b` the ordinal of the
//! sample within it. Equal names give equal numbers, whatever else was drawn before, in whichever thread, in
//! however many micro-batches: a resumed run, another number of threads or a recomputed block changes nothing.
//!
//! Layout: the 64-bit key is a SplitMix64 mix of the seed and the purpose; the 128-bit counter is
//! `(block, b.low, a.low, a.high ^ rotl(b.high, 16))`, where `block` counts groups of four 32-bit outputs.

/// What a stream of random numbers is for. The number is part of the stream's name and must never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The permutation of an epoch.
    Shuffle = 1,
    /// The crop of a copy of an image.
    Crop = 2,
    /// The flip of a copy of an image.
    Flip = 3,
    /// The draw from the VAE's posterior.
    Posterior = 4,
    /// The noise of flow matching.
    Noise = 5,
    /// The timestep of flow matching.
    Timestep = 6,
    /// Initial values of LoRA's A.
    LoraInit = 7,
    /// LoRA dropout masks.
    LoraDropout = 8,
    /// Initial latents of a picture.
    SampleLatents = 9,
    /// Noise of the evaluation loss.
    EvaluationNoise = 10,
    /// Timesteps of the evaluation loss.
    EvaluationTimestep = 11,
    /// Pictures of prior preservation.
    PriorPictures = 12,
    /// Jitter of retries.
    Jitter = 13,
    /// Which of several captions of a picture.
    Caption = 14,
    /// The orders of a caption's tags.
    TagOrder = 15,
    /// Whether a picture is trained with the empty caption.
    CaptionDropout = 16,
}

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// The Philox 4x32-10 block function.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
        }
        let p0 = u64::from(M0) * u64::from(counter[0]);
        let p1 = u64::from(M1) * u64::from(counter[2]);
        counter = [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

fn splitmix64(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A stream of random numbers; see the module's documentation.
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    buffer: [u32; 4],
    used: usize,
    spare_normal: Option<f64>,
}

impl Stream {
    /// The stream of this name, at its beginning.
    pub fn new(seed: u64, purpose: Purpose, a: u64, b: u64) -> Self {
        let key = splitmix64(splitmix64(seed) ^ u64::from(purpose as u32));
        let counter = [0, b as u32, a as u32, (a >> 32) as u32 ^ ((b >> 32) as u32).rotate_left(16)];
        Self { key: [key as u32, (key >> 32) as u32], counter, buffer: [0; 4], used: 4, spare_normal: None }
    }

    /// Its name in the form that other implementations want: the key, and the three words of the counter after the block number.
    pub fn words(&self) -> [u32; 5] {
        [self.key[0], self.key[1], self.counter[1], self.counter[2], self.counter[3]]
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = philox4x32(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform in `0..n` without bias (Lemire's method). `n` must be positive.
    pub fn below(&mut self, n: u64) -> u64 {
        debug_assert!(n > 0);
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if wide as u64 >= n.wrapping_neg() % n {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box-Muller in f64, rounded to f32).
    pub fn normal_f32(&mut self) -> f32 {
        self.normal_f64() as f32
    }

    /// Standard normal (Box-Muller in f64).
    pub fn normal_f64(&mut self) -> f64 {
        if let Some(z) = self.spare_normal.take() {
            return z;
        }
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform_f64()).sin_cos();
        self.spare_normal = Some(radius * sin);
        radius * cos
    }

    /// Fills `out` with standard normal values.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for x in out {
            *x = self.normal_f32();
        }
    }

    /// A uniformly random permutation in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn names_separate_streams() {
        let first = |seed, purpose, a, b| Stream::new(seed, purpose, a, b).next_u64();
        let base = first(42, Purpose::Noise, 1, 2);
        assert_eq!(base, first(42, Purpose::Noise, 1, 2));
        for other in [
            first(43, Purpose::Noise, 1, 2),
            first(42, Purpose::Crop, 1, 2),
            first(42, Purpose::Noise, 2, 2),
            first(42, Purpose::Noise, 1, 3),
            first(42, Purpose::Noise, 2, 1),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn normal_moments_and_tails() {
        let mut stream = Stream::new(7, Purpose::Noise, 0, 0);
        let n = 400_000;
        let values: Vec<f64> = (0..n).map(|_| stream.normal_f64()).collect();
        let moment = |k: i32| values.iter().map(|x| x.powi(k)).sum::<f64>() / f64::from(n);
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "kurtosis {}", moment(4));
        let beyond_two = values.iter().filter(|x| x.abs() > 2.0).count() as f64 / f64::from(n);
        assert!((beyond_two - 0.0455).abs() < 0.003, "tails {beyond_two}");
    }

    #[test]
    fn below_is_uniform_and_shuffle_permutes() {
        let mut stream = Stream::new(1, Purpose::Shuffle, 0, 0);
        let mut counts = [0_u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        for count in counts {
            assert!((9_600..10_400).contains(&count), "{counts:?}");
        }
        let mut items: Vec<u32> = (0..100).collect();
        stream.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
