//! Compiles the CUDA kernels (feature `cuda`): each `src/compute/src/kernels/cuda/*.cu` into one fat binary for every supported GPU.
//!
//! `FINETUNE_NVCC` or `CUDA_HOME` name the compiler, else that of `tools/cuda/toolkit` or of the search path is taken.
//! `FINETUNE_CUDA_ARCHS="90"` builds for fewer architectures while developing; "none" builds no kernels, for lints without a compiler.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const SOURCES: &str = "src/kernels/cuda";

/// T4; A100; A4000 and the 30 series; the 40 series; H100; the 50 series.
const ARCHITECTURES: &str = "75 80 86 89 90 120";

/// In place of architectures: the Rust code alone.
const NONE: &str = "none";

/// Sources of this ending use instructions that only compute capability 9.0 has.
const HOPPER: &str = "_hopper";

/// Intermediate code for what comes between and after them.
const INTERMEDIATE: [&str; 2] = ["90", "120"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in ["FINETUNE_NVCC", "FINETUNE_CUDA_ARCHS", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(problem) = compile()
    {
        let lines: Vec<&str> = problem.lines().take(10).collect();
        println!("cargo::error={}", lines.join(" | "));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let chosen = std::env::var("FINETUNE_CUDA_ARCHS").unwrap_or_default();
    if chosen == NONE {
        return std::fs::write(out.join("kernels.rs"), "pub(super) const IMAGES: &[(&str, &[u8])] = &[];\n").map_err(|e| e.to_string());
    }
    let nvcc = nvcc()?;
    let mut sources = Vec::new();
    let mut headers_changed = std::time::SystemTime::UNIX_EPOCH;
    for entry in std::fs::read_dir(SOURCES).map_err(|e| format!("{SOURCES}: {e}"))? {
        let path = entry.map_err(|e| e.to_string())?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers_changed = headers_changed.max(changed(&path)),
            _ => {}
        }
    }
    sources.sort();
    let mut images = String::from("pub(super) const IMAGES: &[(&str, &[u8])] = &[\n");
    let mut report = String::new();
    for source in &sources {
        let name = source.file_stem().and_then(|n| n.to_str()).ok_or("a file name that is not UTF-8")?;
        let image = out.join(format!("{name}-{}.fatbin", if chosen.is_empty() { "all".to_owned() } else { chosen.replace(' ', "-") }));
        let log = image.with_extension("log");
        if changed(&image) <= changed(source).max(headers_changed) {
            run(&nvcc, source, &image, &log, &chosen)?;
        }
        writeln!(images, "    ({name:?}, include_bytes!({:?})),", image.display().to_string()).map_err(|e| e.to_string())?;
        report.push_str(&std::fs::read_to_string(&log).unwrap_or_default());
    }
    images.push_str("];\n");
    // Registers, shared memory and spills of every kernel on every architecture.
    std::fs::write(out.join("kernels.log"), report).map_err(|e| e.to_string())?;
    std::fs::write(out.join("kernels.rs"), images).map_err(|e| e.to_string())
}

fn changed(path: &Path) -> std::time::SystemTime {
    std::fs::metadata(path).and_then(|m| m.modified()).unwrap_or(std::time::SystemTime::UNIX_EPOCH)
}

fn run(nvcc: &Path, source: &Path, image: &Path, log: &Path, chosen: &str) -> Result<(), String> {
    let architectures = if chosen.is_empty() { ARCHITECTURES } else { chosen };
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "--compress-mode=size", "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2"]);
    let hopper = source.file_stem().is_some_and(|n| n.to_string_lossy().ends_with(HOPPER));
    if hopper {
        command.arg("-gencode=arch=compute_90a,code=sm_90a");
    }
    for architecture in architectures.split_whitespace().filter(|_| !hopper) {
        command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    for architecture in INTERMEDIATE.iter().filter(|_| chosen.is_empty() && !hopper) {
        command.arg(format!("-gencode=arch=compute_{architecture},code=compute_{architecture}"));
    }
    let output = command.arg("-o").arg(image).arg(source).output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // A failed compilation must not look done.
        let _ = std::fs::remove_file(image);
        return Err(format!("nvcc failed on {}: {said}", source.display()));
    }
    std::fs::write(log, said.as_bytes()).map_err(|e| e.to_string())
}

fn nvcc() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("FINETUNE_NVCC") {
        return Ok(path.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let laid_out = cache.map(|cache| cache.join("finetune-operator/cuda/bin"));
    let path: Vec<PathBuf> = std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
    let mut places = home.into_iter().chain(laid_out).chain(path).map(|dir| dir.join("nvcc"));
    places.find(|nvcc| nvcc.exists()).ok_or_else(|| "no nvcc found: run tools/cuda/toolkit (or `make cuda`), or set CUDA_HOME".to_owned())
}
