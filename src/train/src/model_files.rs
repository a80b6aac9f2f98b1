//! Opening a base model, whichever way its files lie: as a folder in diffusers' layout, or as single files, which are put into one.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::try_join_all;
use serde_json::Value;

use finetune_api::ModelFiles;
use finetune_model::layout::Part;
use finetune_model::single_file::{self, Arrangement, File, Named};
use finetune_model::survey::Header;
use finetune_store::StoreOptions;
use finetune_store::model_source::{ModelFolder, ModelSource, ModelSourceError};

use super::look::read_header;

/// Files whose headers are read where none is named.
const MOST_FILES: usize = 64;
/// Largest configuration that is read.
const MAX_CONFIG_BYTES: usize = 1 << 20;

/// Opens the model at `source`. Of single files the headers are read, and the small files that they lack are written below `cache`.
///
/// # Errors
/// If the source cannot be read, or its files are no Stable Diffusion 3: everything at once.
pub async fn open(source: &ModelSource, files: Option<&ModelFiles>, options: &StoreOptions, cache: &std::path::Path) -> Result<ModelFolder, ModelSourceError> {
    let mut folder = ModelFolder::open(source, options, cache).await?;
    let named = files.map(named).unwrap_or_default();
    if named.files.is_empty() && folder.has_contents() {
        return match files {
            None => Ok(folder),
            Some(_) => Err(unusable(
                &folder,
                vec!["it is a folder in diffusers' layout: spec.model.source.files is for other files, so name the transformer's".into()],
            )),
        };
    }
    let paths: BTreeSet<String> = if named.files.is_empty() { candidates(&folder) } else { named.files.values().cloned().collect() };
    if paths.is_empty() || paths.len() > MOST_FILES {
        // What the folder lacks is reported where its files are selected.
        return if paths.is_empty() { Ok(folder) } else { Err(unusable(&folder, vec![too_many(&paths)])) };
    }
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for path in paths.iter().chain(&named.t5_tokenizer) {
        match folder.size_of(path)? {
            None => problems.push(format!("it has no file {path}")),
            Some(_) if named.t5_tokenizer.as_ref() == Some(path) => {}
            Some(size) => found.push((path.clone(), size)),
        }
    }
    if !problems.is_empty() {
        return Err(unusable(&folder, problems));
    }
    let headers = try_join_all(found.iter().map(|(path, size)| read_header(&folder, path, *size)).collect::<Vec<_>>()).await?;
    let files = found.into_iter().zip(headers).map(|((path, _), header)| File { path, header: header.and_then(whole) });
    let files: Vec<File> = files.collect();
    let beside = beside(&folder);
    let configs = configs(&folder, &beside).await?;
    let arrangement = single_file::choose(&files, &named)
        .and_then(|chosen| single_file::arrange(&chosen, &named, &beside.iter().map(String::as_str).collect::<Vec<_>>(), &configs));
    match arrangement {
        Ok(Arrangement { texts, links }) => folder.arranged(links, texts),
        Err(problems) => Err(unusable(&folder, problems)),
    }
}

fn whole(header: Header) -> Result<finetune_model::survey::Tensors, String> {
    match header {
        Header::Whole(tensors) => Ok(tensors),
        Header::Longer(_) => Err("is shorter than its header: download it again".to_owned()),
    }
}

fn named(files: &ModelFiles) -> Named {
    let ModelFiles { transformer, vae, clip_l, clip_g, t5, t5_tokenizer, without_t5 } = files;
    let parts = [(Part::Transformer, transformer), (Part::Vae, vae), (Part::TextEncoder, clip_l), (Part::TextEncoder2, clip_g), (Part::TextEncoder3, t5)];
    let files = parts.into_iter().filter_map(|(part, path)| Some((part, path.clone()?))).collect();
    Named { files, t5_tokenizer: t5_tokenizer.clone(), without_t5: *without_t5 }
}

/// Whether the path is in the folder of a part in diffusers' layout.
fn of_a_part(path: &str) -> bool {
    path.split_once('/').is_some_and(|(folder, _)| Part::ALL.iter().any(|part| part.folder() == folder))
}

/// Every file that might hold a part, at the top or in a folder there.
fn candidates(folder: &ModelFolder) -> BTreeSet<String> {
    let weights = |path: &&str| path.ends_with(".safetensors") && path.matches('/').count() < 2 && !of_a_part(path);
    folder.files().map(|(path, _)| path).filter(weights).map(str::to_owned).collect()
}

fn too_many(paths: &BTreeSet<String>) -> String {
    format!("it has {} safetensors files and no model_index.json: name those to use in spec.model.source.files", paths.len())
}

/// The small files of a folder in diffusers' layout that lies beside the single files.
fn beside(folder: &ModelFolder) -> Vec<String> {
    let small = |path: &&str| {
        let index = path.contains(".index.");
        of_a_part(path) && path.matches('/').count() == 1 && !index && [".json", ".txt", ".model"].iter().any(|end| path.ends_with(end))
    };
    folder.files().map(|(path, _)| path).filter(small).map(str::to_owned).collect()
}

async fn configs(folder: &ModelFolder, beside: &[String]) -> Result<BTreeMap<Part, Value>, ModelSourceError> {
    let mut configs = BTreeMap::new();
    for part in Part::ALL {
        let path = format!("{}/config.json", part.folder());
        if beside.contains(&path) {
            let json = folder.first_bytes(&path, MAX_CONFIG_BYTES).await?;
            let config = serde_json::from_slice(&json).map_err(|error| unusable(folder, vec![format!("failed to understand {path}: {error}")]))?;
            configs.insert(part, config);
        }
    }
    Ok(configs)
}

fn unusable(folder: &ModelFolder, problems: Vec<String>) -> ModelSourceError {
    ModelSourceError::Unusable { location: folder.location().to_owned(), problems }
}
