//! The table of crates in docs/architecture.md is what Cargo sees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Crate to (folder, crates of this workspace that it uses).
type Crates = BTreeMap<String, (PathBuf, BTreeSet<String>)>;

fn documented() -> Crates {
    let text = std::fs::read_to_string(repository().join("docs/architecture.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, folder, _, uses] = cells[..] else { return None };
        let name = name.strip_prefix('`')?.strip_suffix('`')?;
        let uses = uses.split(',').map(str::trim).filter(|u| !u.is_empty()).map(|u| format!("finetune-{u}")).collect();
        Some((name.to_owned(), (repository().join(folder.trim_matches('`')), uses)))
    });
    rows.collect()
}

fn declared() -> Crates {
    let output = Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(repository()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let package = |package: &Value| {
        let name = package["name"].as_str().unwrap().to_owned();
        let folder = Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().join(".");
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let uses = dependencies.filter(|d| d["path"].is_string() && d["kind"].is_null()).map(|d| d["name"].as_str().unwrap().to_owned());
        (name, (folder, uses.collect()))
    };
    packages.iter().map(package).collect()
}

#[test]
fn the_documented_crates_are_those_of_cargo() {
    let normal = |crates: Crates| -> Crates { crates.into_iter().map(|(name, (folder, uses))| (name, (folder.canonicalize().unwrap(), uses))).collect() };
    assert_eq!(normal(documented()), normal(declared()));
}
