//! A model folder in diffusers layout: where its parts are, and what their `config.json` files say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Why a model folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A part of the folder is missing.
    #[error("{path} is missing: a model folder in diffusers layout has {part}")]
    Missing {
        /// What was looked for.
        path: PathBuf,
        /// Its place in the layout, as `vae/config.json`.
        part: String,
    },
    /// A file cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A configuration cannot be understood.
    #[error("failed to understand {path}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A configuration asks for what this program does not do.
    #[error("{path}: {problem}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What and why.
        problem: String,
    },
}

/// Parts of a model folder, by their diffusers names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// CLIP-L's tokenizer.
    Tokenizer,
    /// CLIP-G's tokenizer.
    Tokenizer2,
    /// T5's tokenizer.
    Tokenizer3,
    /// CLIP-L.
    TextEncoder,
    /// CLIP-G.
    TextEncoder2,
    /// T5's encoder. May be absent.
    TextEncoder3,
    /// The autoencoder.
    Vae,
    /// The MMDiT.
    Transformer,
    /// The scheduler's configuration.
    Scheduler,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 9] = [
        Self::Tokenizer,
        Self::Tokenizer2,
        Self::Tokenizer3,
        Self::TextEncoder,
        Self::TextEncoder2,
        Self::TextEncoder3,
        Self::Vae,
        Self::Transformer,
        Self::Scheduler,
    ];

    /// The sub-folder's name.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Tokenizer2 => "tokenizer_2",
            Self::Tokenizer3 => "tokenizer_3",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::TextEncoder3 => "text_encoder_3",
            Self::Vae => "vae",
            Self::Transformer => "transformer",
            Self::Scheduler => "scheduler",
        }
    }
}

/// A model folder in diffusers layout, as `stabilityai/stable-diffusion-3-medium-diffusers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelDir {
    root: PathBuf,
}

impl ModelDir {
    /// The model in the folder `root`. Parts are looked at when they are needed.
    ///
    /// # Errors
    /// If `root` is not a folder.
    pub fn open(root: &Path) -> Result<Self, LayoutError> {
        if !root.is_dir() {
            return Err(LayoutError::Missing { path: root.to_owned(), part: "at least transformer/, vae/, text_encoder/ and tokenizer/".into() });
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The sub-folder of a part, whether it exists or not.
    pub fn path(&self, part: Part) -> PathBuf {
        self.root.join(part.folder())
    }

    /// Whether the model has a part: its sub-folder exists, and `model_index.json`, if there is one, does not leave it out (`[null, null]`).
    ///
    /// # Errors
    /// If `model_index.json` lists a part whose sub-folder is missing, or cannot be understood.
    pub fn has(&self, part: Part) -> Result<bool, LayoutError> {
        const CONTENTS: &str = "model_index.json";
        let path = self.path(part);
        if !self.root.join(CONTENTS).is_file() {
            return Ok(path.is_dir());
        }
        let contents: BTreeMap<String, serde_json::Value> = read_json(&self.root.join(CONTENTS), CONTENTS)?;
        match contents.get(part.folder()) {
            None => Ok(path.is_dir()),
            Some(serde_json::Value::Array(pair)) if pair.iter().any(|name| !name.is_null()) => {
                let part = format!("{}/, which {CONTENTS} lists", part.folder());
                if path.is_dir() { Ok(true) } else { Err(LayoutError::Missing { path, part }) }
            }
            Some(_) => Ok(false),
        }
    }

    /// Reads the JSON file `name` of a part.
    ///
    /// # Errors
    /// If it is missing or cannot be understood.
    pub fn json<T: DeserializeOwned>(&self, part: Part, name: &str) -> Result<T, LayoutError> {
        read_json(&self.path(part).join(name), &format!("{}/{name}", part.folder()))
    }

    /// Reads and checks `config.json` of a part.
    ///
    /// # Errors
    /// If it is missing, cannot be understood, or asks for what this program does not do.
    pub fn config<T: ComponentConfig>(&self, part: Part) -> Result<T, LayoutError> {
        let config: T = self.json(part, "config.json")?;
        config.check().map_err(|problem| LayoutError::Unsupported { path: self.path(part).join("config.json"), problem })?;
        Ok(config)
    }

    /// Reads `scheduler/scheduler_config.json`; the defaults of Stable Diffusion 3 if there is none.
    ///
    /// # Errors
    /// If it cannot be understood or asks for what this program does not do.
    pub fn scheduler(&self) -> Result<SchedulerConfig, LayoutError> {
        let path = self.path(Part::Scheduler).join("scheduler_config.json");
        if !path.exists() {
            return Ok(SchedulerConfig::default());
        }
        let config: SchedulerConfig = self.json(Part::Scheduler, "scheduler_config.json")?;
        config.check().map_err(|problem| LayoutError::Unsupported { path, problem })?;
        Ok(config)
    }
}

/// A `config.json` that can be checked against what this program does.
pub trait ComponentConfig: DeserializeOwned {
    /// `Err` names what is not supported or contradictory, for a person.
    fn check(&self) -> Result<(), String>;
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, part: &str) -> Result<T, LayoutError> {
    let text = std::fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => LayoutError::Missing { path: path.to_owned(), part: part.to_owned() },
        _ => LayoutError::Read { path: path.to_owned(), source },
    })?;
    serde_json::from_slice(&text).map_err(|source| LayoutError::Json { path: path.to_owned(), source })
}

/// diffusers' `FlowMatchEulerDiscreteScheduler`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct SchedulerConfig {
    /// Number of steps of the training table.
    #[serde(default = "thousand")]
    pub num_train_timesteps: u32,
    /// Shift of the noise levels towards 1.
    #[serde(default = "one")]
    pub shift: f64,
    /// Of the shift that depends on the picture: its logarithm for pictures with `base_image_seq_len` patches.
    #[serde(default)]
    pub base_shift: Option<f64>,
    /// Of the shift that depends on the picture: its logarithm for pictures with `max_image_seq_len` patches.
    #[serde(default)]
    pub max_shift: Option<f64>,
    /// Patches of a picture.
    #[serde(default)]
    pub base_image_seq_len: Option<f64>,
    /// Patches of a picture.
    #[serde(default)]
    pub max_image_seq_len: Option<f64>,
    /// Not supported.
    #[serde(default)]
    pub use_dynamic_shifting: bool,
    /// Not supported.
    #[serde(default)]
    pub use_karras_sigmas: Option<bool>,
    /// Not supported.
    #[serde(default)]
    pub use_exponential_sigmas: Option<bool>,
    /// Not supported.
    #[serde(default)]
    pub use_beta_sigmas: Option<bool>,
    /// Not supported.
    #[serde(default)]
    pub invert_sigmas: bool,
    /// Not supported.
    #[serde(default)]
    pub shift_terminal: Option<f64>,
    /// Not supported.
    #[serde(default)]
    pub stochastic_sampling: bool,
}

fn thousand() -> u32 {
    1000
}

fn one() -> f64 {
    1.0
}

impl SchedulerConfig {
    /// The shift for pictures of so many patches: `exp(μ)`, where μ is the straight line through (`base_image_seq_len`, `base_shift`) and
    /// (`max_image_seq_len`, `max_shift`). As diffusers' `calculate_shift` and the exponential `time_shift`,
    /// `e^μ / (e^μ + 1/t - 1) = s t / (1 + (s - 1) t)` with `s = e^μ`; the constants are its scheduler's where the model has none.
    ///
    /// # Errors
    /// What is wrong with the scheduler's numbers, for a person.
    pub fn shift_by_resolution(&self, patches: usize) -> Result<f64, String> {
        let (base_shift, max_shift) = (self.base_shift.unwrap_or(0.5), self.max_shift.unwrap_or(1.15));
        let (base, max) = (self.base_image_seq_len.unwrap_or(256.0), self.max_image_seq_len.unwrap_or(4096.0));
        let shift = (base_shift + (max_shift - base_shift) / (max - base) * (patches as f64 - base)).exp();
        if shift.is_finite() && shift > 0.0 {
            return Ok(shift);
        }
        Err(format!(
            "the shift for {patches} patches is {shift} by base_shift {base_shift}, max_shift {max_shift}, base_image_seq_len {base} and max_image_seq_len {max}; set \
             training.flowMatching.shift to a number"
        ))
    }
}

impl Default for SchedulerConfig {
    /// Stable Diffusion 3: 1000 steps, shift 3.
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 3.0,
            base_shift: None,
            max_shift: None,
            base_image_seq_len: None,
            max_image_seq_len: None,
            use_dynamic_shifting: false,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            invert_sigmas: false,
            shift_terminal: None,
            stochastic_sampling: false,
        }
    }
}

impl ComponentConfig for SchedulerConfig {
    fn check(&self) -> Result<(), String> {
        let extras = [
            ("use_dynamic_shifting", self.use_dynamic_shifting),
            ("use_karras_sigmas", self.use_karras_sigmas == Some(true)),
            ("use_exponential_sigmas", self.use_exponential_sigmas == Some(true)),
            ("use_beta_sigmas", self.use_beta_sigmas == Some(true)),
            ("invert_sigmas", self.invert_sigmas),
            ("shift_terminal", self.shift_terminal.is_some()),
            ("stochastic_sampling", self.stochastic_sampling),
        ];
        if let Some((name, _)) = extras.iter().find(|(_, on)| *on) {
            return Err(format!("{name} is not supported: Stable Diffusion 3 does not use it"));
        }
        if self.num_train_timesteps < 2 {
            return Err(format!("num_train_timesteps is {}, it must be at least 2", self.num_train_timesteps));
        }
        if !(self.shift.is_finite() && self.shift > 0.0) {
            return Err(format!("shift is {}, it must be a positive number", self.shift));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_scheduler(text: &str) -> (tempfile::TempDir, ModelDir) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("scheduler")).unwrap();
        std::fs::write(dir.path().join("scheduler/scheduler_config.json"), text).unwrap();
        let model = ModelDir::open(dir.path()).unwrap();
        (dir, model)
    }

    /// The numbers are those of diffusers' `calculate_shift` and `FlowMatchEulerDiscreteScheduler.time_shift` for squares of 256, 512, 768, 1024 and 2048 pixels.
    #[test]
    fn the_shift_by_resolution_is_that_of_diffusers() {
        let scheduler = SchedulerConfig::default();
        for (patches, shift, levels) in [
            (256, 1.648_721_270_700_128_2, [0.001_647_652_403_539_232, 0.354_661_244_392_443_4, 0.622_459_331_201_854_6, 0.999_393_230_595_129_9]),
            (1024, 1.877_610_579_264_343_2, [0.001_875_964_213_224_496, 0.384_944_748_817_469_26, 0.652_489_462_192_744_5, 0.999_467_159_144_808_5]),
            (2304, 2.331_861_012_694_066_6, [0.002_328_759_428_802_900_4, 0.437_344_673_303_070_8, 0.699_867_432_587_944_9, 0.999_570_912_897_923_3]),
            (4096, 3.158_192_909_689_767, [0.003_151_391_598_685_828, 0.512_844_101_509_133_8, 0.759_510_916_949_111_1, 0.999_683_146_704_729_5]),
            (16384, 25.279_656_970_962_883, [0.024_680_424_724_748_323, 0.893_916_676_461_798_8, 0.961_947_752_929_007_9, 0.999_960_404_471_983_6]),
        ] {
            let found = scheduler.shift_by_resolution(patches).unwrap();
            assert!((found / shift - 1.0).abs() < 1e-12, "{patches}: {found}");
            for (t, level) in [0.001, 0.25, 0.5, 0.999].into_iter().zip(levels) {
                let shifted = found * t / (1.0 + (found - 1.0) * t);
                assert!((shifted - level).abs() < 1e-12, "{patches} at {t}: {shifted}");
            }
        }
        let (_dir, model) = with_scheduler(r#"{"base_shift": 1.0, "max_shift": 2.0, "base_image_seq_len": 100, "max_image_seq_len": 200, "shift": 3.0}"#);
        assert!((model.scheduler().unwrap().shift_by_resolution(150).unwrap() - 1.5_f64.exp()).abs() < 1e-12);
        let (_dir, model) = with_scheduler(r#"{"base_image_seq_len": 4096, "max_image_seq_len": 4096, "base_shift": null}"#);
        assert!(model.scheduler().unwrap().shift_by_resolution(150).unwrap_err().contains("training.flowMatching.shift"));
    }

    #[test]
    fn scheduler_is_read_and_checked() {
        let (_dir, model) = with_scheduler(r#"{"shift": 3.0, "base_shift": 0.5}"#);
        assert!((model.scheduler().unwrap().shift - 3.0).abs() < 1e-12);
        for (text, part) in [
            (r#"{"use_dynamic_shifting": true}"#, "use_dynamic_shifting is not supported"),
            (r#"{"shift": 0}"#, "positive"),
            (r#"{"num_train_timesteps": 1}"#, "at least 2"),
        ] {
            let (_dir, model) = with_scheduler(text);
            assert!(model.scheduler().unwrap_err().to_string().contains(part));
        }
        let (_dir, model) = with_scheduler("{");
        assert!(matches!(model.scheduler(), Err(LayoutError::Json { .. })));
    }

    #[test]
    fn missing_parts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = ModelDir::open(dir.path()).unwrap();
        assert_eq!(model.scheduler().unwrap(), SchedulerConfig::default());
        let error = model.json::<serde_json::Value>(Part::Vae, "config.json").unwrap_err().to_string();
        assert!(error.contains("vae/config.json"), "{error}");
        assert!(ModelDir::open(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn a_part_that_is_listed_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let has = |contents: Option<&str>| {
            if let Some(text) = contents {
                std::fs::write(dir.path().join("model_index.json"), text).unwrap();
            }
            ModelDir::open(dir.path()).unwrap().has(Part::TextEncoder3)
        };
        let listed = r#"{"text_encoder_3": ["transformers", "T5EncoderModel"]}"#;
        assert!(!has(None).unwrap());
        assert!(has(Some(listed)).unwrap_err().to_string().contains("text_encoder_3"));
        std::fs::create_dir(dir.path().join("text_encoder_3")).unwrap();
        assert!(has(Some(listed)).unwrap());
        assert!(has(Some("{}")).unwrap());
        assert!(!has(Some(r#"{"text_encoder_3": [null, null]}"#)).unwrap());
        assert!(has(Some("[")).is_err());
    }
}
