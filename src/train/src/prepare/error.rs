//! Why data could not be prepared.

use finetune_common::tensor::ShapeError;
use finetune_compute::kernels::DeviceError;
use finetune_data::cache::CacheError;
use finetune_data::dataset::DatasetError;
use finetune_model::layout::LayoutError;
use finetune_model::sample::SampleError;
use finetune_model::text::TextError;
use finetune_model::vae::VaeError;
use finetune_store::StoreError;
use finetune_store::model_source::ModelSourceError;

/// Why data could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The model cannot be fetched.
    #[error("failed to fetch the model")]
    ModelSource(#[from] ModelSourceError),
    /// A store failed.
    #[error("failed to prepare the dataset")]
    Store(#[from] StoreError),
    /// A picture is not what it was when the dataset was scanned.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// Captions could not be encoded.
    #[error("failed to encode the captions")]
    Text(#[source] TextError),
    /// The device cannot draw class pictures in the precision that was asked for.
    #[error("failed to use training.priorPreservation.precision")]
    ClassPrecision(#[source] DeviceError),
    /// Class pictures could not be drawn.
    #[error("failed to draw the class pictures")]
    Draw(#[source] SampleError),
    /// Pictures could not be encoded.
    #[error("failed to encode the pictures")]
    Vae(#[from] VaeError),
    /// The model's folder is not as it should be.
    #[error("failed to load the model")]
    Layout(#[from] LayoutError),
    /// The cache failed.
    #[error("failed to use the cache of prepared data")]
    Cache(#[from] CacheError),
    /// What was prepared cannot be read.
    #[error(transparent)]
    Prepared(#[from] PreparedError),
    /// A tensor does not have the shape that it should have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// Asked to stop.
    #[error("preparation was stopped on request")]
    Stopped,
}

impl From<SampleError> for PrepareError {
    fn from(error: SampleError) -> Self {
        if matches!(error, SampleError::Stopped) { Self::Stopped } else { Self::Draw(error) }
    }
}

impl From<TextError> for PrepareError {
    fn from(error: TextError) -> Self {
        if matches!(error, TextError::Stopped) { Self::Stopped } else { Self::Text(error) }
    }
}

/// What was prepared cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PreparedError {
    /// The cache failed.
    #[error("failed to read prepared data from the cache")]
    Cache(#[from] CacheError),
    /// An entry is not there.
    #[error("the cache has lost {what} {index}: remove the cache folder and run again")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Which one, from 0.
        index: usize,
    },
    /// An entry is not as it was written.
    #[error("the cache holds {what} of an unexpected shape or type: remove the cache folder and run again")]
    Malformed {
        /// What it is.
        what: &'static str,
    },
}
