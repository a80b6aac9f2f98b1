//! `report.html`: one file that shows a run, and needs no network. Pure: what is known of the run in, HTML out.
//!
//! The template escapes what it is given; the page's own policy (`Content-Security-Policy`) keeps it from loading anything. Charts are uPlot's
//! (`vendor/`, MIT), unchanged and pinned by digest. Served by the trainer, the page asks for [`Page::live`] and draws the new numbers.

mod curves;
mod pictures;
mod stages;
mod view;

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;

pub use curves::Curves;
pub use pictures::{COMPARISON, Embedded, Gallery, TRAINING, TRAINING_PICTURES};
pub use stages::Stages;
pub(crate) use view::shape;

use crate::history::History;
use crate::result::RunResult;
use finetune_api::Progress;
use finetune_api::plan::{MemoryPlan, TrainConfig};
use finetune_data::buckets::Bucket;

/// Name below the output prefix, and while training below the folder of the attempt's logs.
pub const FILE_NAME: &str = "report.html";

const TEMPLATE: &str = include_str!("template.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
const UPLOT: &str = include_str!("vendor/uPlot.iife.min.js");
const UPLOT_LICENCE: &str = include_str!("vendor/LICENSE-uPlot");
const UPLOT_STYLE: &str = include_str!("vendor/uPlot.min.css");

/// Why a page cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The template failed.
    #[error("failed to write {FILE_NAME}")]
    Template(#[from] minijinja::Error),
    /// A number cannot be written as JSON.
    #[error("failed to write the curves of {FILE_NAME}")]
    Json(#[from] serde_json::Error),
}

/// What is known of a run. Everything may be absent: the page is served from the first second.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// What is trained.
    pub run: Option<Run>,
    /// How memory was planned.
    pub memory: Option<MemoryPlan>,
    /// What was measured.
    pub history: History,
    /// How far the run is.
    pub progress: Progress,
    /// Where its time went.
    pub stages: Stages,
    /// What a person should know besides.
    pub warnings: Vec<String>,
    /// Validation pictures.
    pub gallery: Gallery,
    /// Some of the training pictures.
    pub training: Vec<TrainingPicture>,
    /// Held-out pictures before and after.
    pub comparison: Option<Embedded>,
    /// The result, when the run has one.
    pub result: Option<RunResult>,
}

/// What is trained.
#[derive(Debug, Clone)]
pub struct Run {
    /// The configuration.
    pub config: TrainConfig,
    /// `sha256:<hex>` of metadata and pictures.
    pub dataset_digest: String,
    /// `sha256:<hex>` of the base model's files.
    pub model_digest: String,
    /// Pictures in the dataset.
    pub samples: usize,
    /// Their buckets; none where all are squares.
    pub buckets: Vec<Bucket>,
    /// `cpu` or the accelerator's name.
    pub device: String,
    /// Type of frozen weights and activations.
    pub dtype: String,
}

/// A training picture as it is trained: resized, cropped and flipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TrainingPicture {
    /// File below the dataset.
    pub file: String,
    /// Its captions as they are trained.
    pub captions: Vec<String>,
    /// The shape of its bucket, as text; none where all are squares.
    pub bucket: Option<String>,
    /// The picture.
    pub picture: Option<Embedded>,
    /// Why there is none.
    pub problem: Option<String>,
}

impl Page {
    /// The page as HTML.
    ///
    /// # Errors
    /// If a number cannot be written, or the template has a mistake.
    pub fn html(&self) -> Result<String, PageError> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let data = in_script(&self.live()?);
        let gallery = in_script(&serde_json::to_string(&view::Slider::of(self))?);
        let assets =
            view::Assets { style: STYLE, script: SCRIPT, uplot: UPLOT, uplot_style: UPLOT_STYLE, uplot_licence: UPLOT_LICENCE, data: &data, gallery: &gallery };
        Ok(environment.render_str(TEMPLATE, Serde(view::View::of(self, assets)))?)
    }

    /// What the page shows of a run that lasts, as JSON: `GET /report.json`.
    ///
    /// # Errors
    /// If a number cannot be written.
    pub fn live(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(&view::Live::of(self))
    }
}

/// JSON within a `<script>` element: nothing in it can end the element.
fn in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Record;
    use finetune_common::digest;

    /// As npm's uplot 1.6.32 has them; a newer version is put in on purpose.
    #[test]
    fn the_plotting_library_is_the_published_one() {
        let of = |text: &str| digest::to_text(&digest::sha256(text.as_bytes()));
        assert_eq!(of(UPLOT), "sha256:19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f");
        assert_eq!(of(UPLOT_STYLE), "sha256:df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04");
        assert!(!UPLOT.contains("</script"), "it stands within a script element");
    }

    #[test]
    fn a_page_of_a_run_that_has_just_begun_can_be_made() {
        let html = Page::default().html().unwrap();
        assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"), "{html}");
    }

    #[test]
    fn what_people_write_cannot_become_part_of_the_page() {
        let evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>";
        let spec = serde_json::json!({
            "model": {"source": {"objectStore": {"uri": "s3://m/"}}}, "dataset": {"uri": "s3://d/", "caption": evil, "captions": {"triggerWord": evil}}, "output": {"uri": "s3://o/"},
            "validation": {"prompts": [evil]},
        });
        let config = finetune_api::plan::resolve(&serde_json::from_value(spec).unwrap(), "n", "j", &finetune_api::plan::Facts::default()).unwrap().config;
        let run = Run {
            config,
            dataset_digest: String::new(),
            model_digest: String::new(),
            samples: 1,
            buckets: Vec::new(),
            device: "cpu".into(),
            dtype: "f32".into(),
        };
        let training = vec![TrainingPicture { file: evil.into(), captions: vec![evil.into()], bucket: None, picture: None, problem: Some(evil.into()) }];
        let page = Page { run: Some(run), training, warnings: vec![evil.into()], ..Page::default() };
        let html = page.html().unwrap();
        assert!(!html.contains("<script>alert") && !html.contains("<img src=x"), "{html}");
        assert!(html.contains("onerror=alert(2)"), "it is shown as text");
    }

    #[test]
    fn the_live_numbers_are_those_of_the_history() {
        let mut page = Page::default();
        page.history.push(Record { step: 1, loss: Some(0.1 + 0.2), ..Record::default() });
        let live: serde_json::Value = serde_json::from_str(&page.live().unwrap()).unwrap();
        assert_eq!(live["curves"]["loss"][0].as_f64(), Some(0.1 + 0.2));
    }
}
