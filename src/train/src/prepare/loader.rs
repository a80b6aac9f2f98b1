//! Pictures on their way to the VAE: fetched, decoded and transformed by several tasks, so that the encoder need not wait for them.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};

use super::PrepareError;
use finetune_data::dataset::{DatasetError, Pictures, Sample};
use finetune_data::transform::{Pixels, Transform};

/// Pictures that are loaded before they are needed.
pub(super) const AHEAD: usize = 8;
/// Most pixels that are decoded at once, unless one picture has more.
const PIXELS: u64 = 64 << 20;
/// Pixels of a permit.
const UNIT: u64 = 4096;

/// Loads pictures of a dataset.
pub(super) struct Loader {
    pictures: Pictures,
    pixels: Arc<Semaphore>,
}

/// A picture that is being loaded. Dropped, it is loaded no further than its present step.
pub(super) struct Loading(JoinHandle<Result<Pixels, DatasetError>>);

impl Loader {
    pub(super) fn new(pictures: Pictures) -> Self {
        Self { pictures, pixels: Arc::new(Semaphore::new((PIXELS / UNIT) as usize)) }
    }

    /// Begins to load a picture.
    pub(super) fn load(&self, sample: Sample, transform: Transform) -> Loading {
        let (pictures, pixels) = (self.pictures.clone(), Arc::clone(&self.pixels));
        Loading(tokio::spawn(async move {
            let (width, height) = sample.size;
            let permits = (u64::from(width) * u64::from(height)).min(PIXELS).div_ceil(UNIT) as u32;
            let _permit = pixels.acquire_many(permits).await;
            let picture = pictures.load(&sample).await?;
            Ok(spawn_blocking(move || transform.apply(&picture)).await?)
        }))
    }
}

impl Loading {
    /// The picture as the model takes it.
    pub(super) async fn wait(mut self) -> Result<Pixels, PrepareError> {
        Ok((&mut self.0).await.map_err(DatasetError::from)??)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use finetune_data::dataset::Dataset;
    use finetune_store::{Store, StoreOptions};

    /// Each picture comes with its own pixels, whatever the order in which they are ready; a changed one is an error.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn pictures_are_those_of_their_samples_and_changed_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = Vec::new();
        for i in 0..12_u8 {
            // Larger ones first: they are ready last.
            let side = 400 - 30 * u32::from(i);
            image::RgbImage::from_pixel(side, side, image::Rgb([i * 20, 0, 0])).save(folder.path().join(format!("{i}.png"))).unwrap();
            rows.push(serde_json::json!({"file_name": format!("{i}.png"), "caption": i.to_string()}).to_string());
        }
        std::fs::write(folder.path().join("metadata.jsonl"), rows.join("\n")).unwrap();
        let store = Store::open(folder.path().to_str().unwrap(), &StoreOptions::default()).unwrap();
        let spec = serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/"}, "output": {"uri": "s3://o/"},
        });
        let config = finetune_api::plan::resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &finetune_api::plan::Facts::default()).unwrap().config;
        let dataset = Dataset::scan(&store, &config.dataset).await.unwrap();
        let loader = Loader::new(dataset.pictures(&store));
        let transform = Transform { size: (16, 16), flip: false, top: 0, left: 0 };
        let loading: BTreeMap<String, Loading> = dataset.samples.iter().map(|s| (s.captions[0].clone(), loader.load(s.clone(), transform))).collect();
        for (caption, loading) in loading {
            let pixels = loading.wait().await.unwrap();
            let red = f32::from(caption.parse::<u8>().unwrap() * 20) / 127.5 - 1.0;
            assert!((pixels.data[0] - red).abs() < 0.01, "{caption}: {} {red}", pixels.data[0]);
        }
        let changed = dataset.samples[3].clone();
        std::fs::write(folder.path().join(&changed.file_name), b"other bytes").unwrap();
        let error = loader.load(changed, transform).wait().await.unwrap_err();
        assert!(matches!(error, PrepareError::Dataset(DatasetError::Changed { .. })), "{error:?}");
    }
}
