//! The model of the commands that take one from this machine: a folder in diffusers' layout, or single files.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::job;
use finetune_api::ModelFiles;
use finetune_model::ModelDir;
use finetune_store::model_source::{ModelSource, Parts};
use finetune_store::{NoProgress, StoreOptions};
use finetune_train::model_files;

/// Arguments that name a model.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArgs {
    /// Which of the files in the folder of --model holds which part, where they are not in diffusers' layout: FIELD=PATH as in the manifest's
    /// model.source.files, with FIELD transformer, vae, clipL, clipG, t5 or t5Tokenizer; or withoutT5. Repeat, or separate by commas.
    #[arg(long, value_name = "FIELD=PATH", value_delimiter = ',', requires = "model")]
    model_files: Vec<String>,
}

/// Opens the model at `path`, a folder or a single file; of single files a folder of links is made in the user's cache.
pub(super) fn open(path: &Path, args: &ModelArgs) -> Result<ModelDir> {
    let single = path.is_file();
    if !single && args.model_files.is_empty() && !is_single_files(path) {
        return Ok(ModelDir::open(path)?);
    }
    let mut files = files(&args.model_files)?;
    let folder = if single {
        let name = path.file_name().and_then(|name| name.to_str()).with_context(|| format!("{} has no name in UTF-8", path.display()))?;
        if files.as_ref().is_some_and(|files| files.transformer.is_some()) {
            bail!("--model-files names a transformer, where --model is a single file already: give its folder");
        }
        files = Some(ModelFiles { transformer: Some(name.to_owned()), ..files.unwrap_or_default() });
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
    } else {
        path.to_owned()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start the runtime")?;
    let cache = std::env::var_os("FINETUNE_CACHE_DIR").map_or_else(job::users_cache, PathBuf::from);
    let made = runtime.block_on(async {
        let folder = model_files::open(&ModelSource::Directory(folder), files.as_ref(), &StoreOptions::default(), &cache).await?;
        folder.fetch(Parts::ALL, &NoProgress).await
    })?;
    Ok(ModelDir::open(&made)?)
}

/// Whether a folder has no table of contents, and weights at its top.
fn is_single_files(path: &Path) -> bool {
    let weights = |entry: std::fs::DirEntry| entry.path().extension().is_some_and(|end| end == "safetensors");
    !path.join("model_index.json").exists() && std::fs::read_dir(path).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(weights)))
}

fn files(given: &[String]) -> Result<Option<ModelFiles>> {
    let mut files = ModelFiles::default();
    for entry in given {
        let (field, path) = entry.split_once('=').unwrap_or((entry, ""));
        let place = match field {
            "transformer" => &mut files.transformer,
            "vae" => &mut files.vae,
            "clipL" => &mut files.clip_l,
            "clipG" => &mut files.clip_g,
            "t5" => &mut files.t5,
            "t5Tokenizer" => &mut files.t5_tokenizer,
            "withoutT5" if matches!(path, "" | "true") => {
                files.without_t5 = true;
                continue;
            }
            _ => bail!("--model-files {entry}: give transformer, vae, clipL, clipG, t5 or t5Tokenizer with a path, as t5=t5xxl_fp16.safetensors, or withoutT5"),
        };
        if path.is_empty() || place.replace(path.to_owned()).is_some() {
            bail!("--model-files {entry}: give each field one path");
        }
    }
    Ok((!given.is_empty()).then_some(files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_slips_named() {
        let read = |given: &[&str]| files(&given.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_eq!(read(&[]).unwrap(), None);
        let found = read(&["clipL=clip/clip_l.safetensors", "withoutT5"]).unwrap().unwrap();
        assert_eq!((found.clip_l.as_deref(), found.without_t5), (Some("clip/clip_l.safetensors"), true));
        for bad in [&["clip=x"][..], &["t5"], &["t5="], &["vae=a", "vae=b"], &["withoutT5=no"]] {
            assert!(read(bad).unwrap_err().to_string().contains("--model-files"), "{bad:?}");
        }
    }
}
