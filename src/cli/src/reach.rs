//! The part of `finetune validate` that looks at datasets and models.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::job;
use super::validate::Reached;
use finetune_api::FineTuneJob;
use finetune_api::plan::{self, Facts};
use finetune_api::validate::Violation;
use finetune_model::survey::{self, Model};
use finetune_store::Buckets;
use finetune_store::claims::LEASE;
use finetune_train::division;
use finetune_train::environment::JobEnvironment;
use finetune_train::inspect::{self, Inspection};
use finetune_train::interrupt::Interrupt;
use finetune_train::log::LogTail;
use finetune_train::look::LookError;
use finetune_train::report::Reporter;

/// Looks at what each job reads.
///
/// # Errors
/// If a stand-in for a bucket cannot be used or the runtime cannot be set up.
pub(super) fn look(jobs: &[FineTuneJob], buckets: &[String]) -> Result<Reached> {
    let buckets = Buckets::parse(buckets)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("failed to start the runtime")?;
    let mut reached = Reached::default();
    for (index, job) in jobs.iter().enumerate() {
        let name = job.metadata.name.clone().unwrap_or_default();
        let claim = job.spec.model.source.persistent_volume_claim.is_some();
        let facts = Facts { model_directory: claim.then(PathBuf::new), ..Facts::default() };
        let config = plan::resolve(&job.spec, job.metadata.namespace.as_deref().unwrap_or("default"), &name, &facts)?.config;
        let environment = JobEnvironment {
            buckets: buckets.clone(),
            cache_dir: job::cache_dir(None, &config),
            owner: String::new(),
            run_id: String::new(),
            claim_lease: LEASE,
            interrupt: Interrupt::default(),
            reporter: Reporter::new(),
            log: LogTail::default(),
        };
        let Inspection { dataset, held_out, model, truncation } = runtime.block_on(inspect::inspect(&config, &environment));
        let violation = |path: &str, message| Violation { document: index + 1, object: Some(name.clone()), path: path.to_owned(), message };
        let datasets = [("the dataset", "spec.dataset", Some(dataset)), ("the held-out dataset", "spec.validation.datasetUri", held_out)];
        for (what, path, found) in datasets.into_iter().filter_map(|(what, path, found)| found.map(|found| (what, path, found))) {
            match found {
                Ok(dataset) => {
                    let largest = model.as_ref().ok().map(Model::largest_side);
                    match inspect::buckets(&config.training, &dataset, largest) {
                        Ok((buckets, warning)) => {
                            reached.good.push(format!("{name}: {what} has {} usable pictures{buckets}; {}", dataset.samples.len(), dataset.sources));
                            reached.warnings.extend(warning.map(|warning| format!("{name}: {what}: {warning}")));
                        }
                        Err(error) => reached.violations.push(violation("spec.training.buckets", format!("{what}: {error}"))),
                    }
                    reached.warnings.extend(dataset.notices.iter().map(|notice| format!("{name}: {what}: {notice}")));
                    if !dataset.skipped.is_empty() {
                        reached.warnings.push(format!("{name}: {what}: left out, as dataset.onBadSample is Skip: {}", dataset.skipped));
                    }
                }
                Err(error) if inspect::dataset_is_unreachable(&error) => {
                    reached.unchecked.push(format!("{name}: {what} was not checked: {}", job::chain(&error)));
                }
                Err(error) => reached.violations.push(violation(path, job::chain(&error))),
            }
        }
        match model {
            _ if claim => reached.unchecked.push(format!("{name}: the model was not checked: its volume is the cluster's")),
            Ok(model) => match plan::resolve(&job.spec, "default", &name, &Facts { model: Some(division::shape(&model.transformer)), ..facts }) {
                Ok(_) => {
                    let without = if model.t5 { "" } else { ", without T5 (its place is filled with zeros)" };
                    reached.good.push(format!("{name}: the model is {} and has every part{without}", survey::name(&model.transformer)));
                }
                Err(error) => reached.violations.push(violation("spec.training", error.to_string())),
            },
            Err(LookError::Unfit(unfit)) => {
                reached.violations.extend(unfit.problems.iter().map(|problem| violation(&problem.path, problem.message.clone())));
            }
            Err(error) if inspect::model_is_unreachable(&error) => {
                reached.unchecked.push(format!("{name}: the model was not checked: {}", job::chain(&error)));
            }
            Err(error) => reached.violations.push(violation("spec.model.source", job::chain(&error))),
        }
        match truncation {
            None | Some(Ok(None)) => {}
            Some(Ok(Some(truncation))) => reached.warnings.push(format!("{name}: {truncation}")),
            Some(Err(error)) => reached.unchecked.push(format!("{name}: the captions' lengths were not checked: {}", job::chain(&error))),
        }
    }
    Ok(reached)
}
