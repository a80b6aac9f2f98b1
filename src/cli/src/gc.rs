//! `finetune gc`: what runs have left behind in a bucket, and its deletion.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::job;
use finetune_api::plan::StorageConfig;
use finetune_store::{Buckets, Store};
use finetune_train::environment;
use finetune_train::error::TrainError;
use finetune_train::gc::{self, Found};

/// Arguments of `finetune gc`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The folder of results (output.uri) or of checkpoints (checkpoint.uri) of a run.
    uri: String,

    /// Delete what is listed. Nothing is deleted while a run is at work there.
    #[arg(long)]
    delete: bool,

    /// The server of the bucket, as in spec.storage.endpoint. Default: the provider's own.
    #[arg(long)]
    endpoint: Option<String>,

    /// A directory that stands in for a bucket, as s3://NAME=DIR. May be repeated.
    #[arg(long, value_name = "URI=DIR")]
    bucket: Vec<String>,
}

/// Lists, and deletes where asked to.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let buckets = match Buckets::parse(&args.bucket) {
        Ok(buckets) => buckets,
        Err(error) => return Ok(job::refuse(&job::chain(&error))),
    };
    let storage = StorageConfig { endpoint: args.endpoint.clone(), ..StorageConfig::default() };
    let options = environment::options_of(&storage, &buckets);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("failed to start the runtime")?;
    let found = runtime.block_on(async {
        let open = |uri: &str| Store::open(uri, &options);
        let store = open(&args.uri)?;
        if args.delete { Ok(gc::delete(&store, open, job::claim_lease()).await?) } else { Ok::<_, TrainError>(gc::look(&store, open).await?) }
    });
    Ok(match found {
        Ok(found) => {
            say(&report(&args.uri, &found, args.delete));
            ExitCode::SUCCESS
        }
        Err(error) => job::fail(error.reason(), &job::chain(&error)),
    })
}

fn report(uri: &str, found: &Found, deleted: bool) -> String {
    let mut lines: Vec<String> =
        found.leftovers.iter().map(|leftover| format!("{}  ({}, {} bytes)", leftover.key, leftover.kind.describe(), leftover.size)).collect();
    let mut sums: BTreeMap<_, (usize, u64)> = BTreeMap::new();
    for leftover in &found.leftovers {
        let sum = sums.entry(leftover.kind).or_default();
        *sum = (sum.0 + 1, sum.1 + leftover.size);
    }
    lines.extend(sums.iter().map(|(kind, (files, bytes))| format!("{}: {files} files, {bytes} bytes", kind.describe())));
    lines.extend(
        found.unfinished.iter().map(|folder| format!("kept: {folder} is of a run that has not finished; a job of its spec and output goes on from there")),
    );
    lines.push(match (found.leftovers.is_empty(), deleted) {
        (true, _) if found.kept == 0 => format!("there is nothing at {uri}; gc takes the output.uri or the checkpoint.uri of a run"),
        (true, _) => format!("nothing to delete; {} files stay", found.kept),
        (false, true) => format!("deleted {} files; {} stay", found.leftovers.len(), found.kept),
        (false, false) => format!("nothing was deleted: --delete deletes these {} files; {} stay", found.leftovers.len(), found.kept),
    });
    lines.join("\n")
}

#[expect(clippy::print_stdout, reason = "the command's result")]
fn say(text: &str) {
    println!("{text}");
}
