//! `finetune sample`: pictures from a model folder, with or without a LoRA.

use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use image::RgbImage;
use indicatif::{ProgressBar, ProgressStyle};

use super::device::{DeviceName, PrecisionName, WeightsName};
use super::model::{self, ModelArgs};
use finetune_compute::kernels::Engine;
use finetune_model::lora::LoraState;
use finetune_model::sample::{COLUMNS, Denoise, Pipeline, PipelineSettings, Sheet, SheetRow, SkipLayers, Stage, in_groups, save_png};

/// Arguments of `finetune sample`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Model: a folder in diffusers layout, a folder with single files, or a single file.
    #[arg(long)]
    model: PathBuf,

    #[command(flatten)]
    files: ModelArgs,

    /// What to draw. Repeat for several pictures.
    #[arg(long = "prompt", required_unless_present = "prompts")]
    prompt: Vec<String>,

    /// File with one prompt per line.
    #[arg(long)]
    prompts: Option<PathBuf>,

    /// What guidance leads away from.
    #[arg(long, default_value = "")]
    negative_prompt: String,

    /// LoRA: a file (as diffusers, peft, kohya, ComfyUI and OneTrainer write them), or a folder with one, as an output of this program.
    /// Repeat for several.
    #[arg(long)]
    lora: Vec<PathBuf>,

    /// Scale of the LoRA: one for all, or one for each in the order of --lora.
    #[arg(long, default_value = "1.0", requires = "lora")]
    lora_scale: Vec<f64>,

    /// Draw every prompt without the LoRA too, from the same noise.
    #[arg(long, requires = "lora")]
    compare: bool,

    /// Number of steps.
    #[arg(long, default_value_t = 28)]
    steps: usize,

    /// Strength of guidance; 1 is none.
    #[arg(long, default_value_t = 7.0)]
    guidance_scale: f64,

    /// Blocks left out for skip-layer guidance, as `7,8,9` for Stable Diffusion 3.5 Medium.
    #[arg(long, value_delimiter = ',')]
    skip_layers: Vec<usize>,

    /// Strength of skip-layer guidance.
    #[arg(long, default_value_t = SkipLayers::default().scale)]
    skip_layers_scale: f64,

    /// T5's number of tokens.
    #[arg(long, default_value_t = 256)]
    max_sequence_length: usize,

    /// Names the noise.
    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Size in pixels: `1024` or `1024x768` (width x height).
    #[arg(long, default_value = "1024", value_parser = parse_size)]
    size: (u32, u32),

    /// A PNG file for one contact sheet; or a folder for every picture and the sheet.
    #[arg(long)]
    out: PathBuf,

    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceName,

    /// What the GPU computes in.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: PrecisionName,

    /// How the weights of the transformer's blocks are kept.
    #[arg(long, value_enum, default_value = "float")]
    weights: WeightsName,
}

fn parse_size(text: &str) -> Result<(u32, u32), String> {
    let side = |t: &str| t.parse::<u32>().map_err(|_| format!("{text:?} is not a size such as 1024 or 1024x768"));
    match text.split_once('x') {
        Some((width, height)) => Ok((side(width)?, side(height)?)),
        None => side(text).map(|s| (s, s)),
    }
}

/// Draws the pictures and prints what was written.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(extension) = picture_extension(&args.out) {
        bail!("--out {}: pictures are written as PNG, not as {extension}: give a file that ends in .png, or a folder", args.out.display());
    }
    let engine = args.device.open(args.precision)?;
    let mut prompts = args.prompt.clone();
    if let Some(file) = &args.prompts {
        let text = std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
        prompts.extend(text.lines().map(str::trim).filter(|l| !l.is_empty()).map(ToOwned::to_owned));
    }
    if prompts.is_empty() {
        bail!("no prompt: give --prompt or a file with --prompts");
    }
    let pictures = draw(args, &prompts, &engine)?;
    let rows = rows(args, &prompts, &pictures);
    let sheet = Sheet { rows, least_width: 128 }.draw();
    if args.out.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
        // A single picture is written as it is.
        let whole = if let [row] = &pictures[..]
            && let [one] = &row[..]
        {
            one
        } else {
            &sheet
        };
        write(whole, &args.out)?;
    } else {
        for (name, row) in names(args).iter().zip(&pictures) {
            for (i, picture) in row.iter().enumerate() {
                write(picture, &args.out.join(format!("{i:04}-seed{}{name}.png", args.seed)))?;
            }
        }
        write(&sheet, &args.out.join("sheet.png"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The ending of a name that asks for a picture file in another format than PNG; a folder of such a name may exist.
fn picture_extension(out: &Path) -> Option<String> {
    let extension = out.extension()?.to_str()?.to_ascii_lowercase();
    let picture = ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif"].contains(&extension.as_str());
    (picture && !out.is_dir()).then_some(extension)
}

/// LoRA scales to draw with, and what their files are called.
fn variants(args: &Args) -> Vec<f64> {
    // Several have their scales as factors of their own.
    let scale = if let ([_], [scale]) = (&args.lora[..], &args.lora_scale[..]) { *scale } else { 1.0 };
    match (args.lora.is_empty(), args.compare) {
        (true, _) => vec![0.0],
        (false, false) => vec![scale],
        (false, true) => vec![0.0, scale],
    }
}

fn names(args: &Args) -> Vec<&'static str> {
    match (args.lora.is_empty(), args.compare) {
        (true, _) => vec![""],
        (false, false) => vec!["-lora"],
        (false, true) => vec!["-base", "-lora"],
    }
}

/// Each LoRA with its factor.
fn loras(args: &Args) -> Result<Vec<(LoraState, f64)>> {
    let (files, scales) = (args.lora.len(), &args.lora_scale);
    if scales.len() > 1 && scales.len() != files {
        bail!("there are {files} --lora and {} --lora-scale: give one scale for all, or one for each", scales.len());
    }
    let scale = |i: usize| if files == 1 { 1.0 } else { scales.get(i).or(scales.first()).copied().unwrap_or(1.0) };
    args.lora.iter().enumerate().map(|(i, path)| Ok((LoraState::open(path)?, scale(i)))).collect()
}

fn draw(args: &Args, prompts: &[String], engine: &Engine) -> Result<Vec<Vec<RgbImage>>> {
    let model = model::open(&args.model, &args.files)?;
    let mut pipeline = Pipeline::open(&model, engine)?.with_weights(args.weights.into());
    for (lora, factor) in loras(args)? {
        pipeline = pipeline.with_lora(lora, factor);
    }
    let skip_layers =
        (!args.skip_layers.is_empty()).then(|| SkipLayers { layers: args.skip_layers.clone(), scale: args.skip_layers_scale, ..SkipLayers::default() });
    let settings = PipelineSettings {
        denoise: Denoise { steps: args.steps, guidance_scale: args.guidance_scale, lora_scale: 1.0, skip_layers },
        negative_prompt: args.negative_prompt.clone(),
        max_sequence_length: args.max_sequence_length,
        seed: args.seed,
        width: args.size.0,
        height: args.size.1,
    };
    let style = ProgressStyle::with_template("{msg:10} {bar:40} {pos}/{len} {eta}").context("should be a template")?.progress_chars("=> ");
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(1).with_style(style) } else { ProgressBar::hidden() };
    let pictures = pipeline.run(prompts, &variants(args), &settings, &mut |stage| {
        let (message, done, total) = match stage {
            Stage::Encoding(p) => ("prompts", p.layers_done, p.layers),
            Stage::Sampling { done, total } => ("steps", done, total),
            Stage::Decoding { done, total } => ("pictures", done, total),
        };
        bar.set_message(message);
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    Ok(pictures)
}

/// One row for each variant, grouped; base above LoRA when both are drawn.
fn rows(args: &Args, prompts: &[String], pictures: &[Vec<RgbImage>]) -> Vec<SheetRow> {
    let row = |(variant, pictures): (usize, &Vec<RgbImage>)| {
        let label = if args.compare { ["base", "LoRA"].get(variant).copied().unwrap_or("").to_owned() } else { String::new() };
        SheetRow { label, cells: pictures.iter().cloned().zip(prompts.iter().cloned()).collect(), space: 0 }
    };
    let mut rows: Vec<SheetRow> = pictures.iter().enumerate().map(row).collect();
    // Captions once, below the last variant.
    for row in rows.iter_mut().rev().skip(1) {
        row.cells.iter_mut().for_each(|(_, caption)| caption.clear());
    }
    in_groups(&rows, COLUMNS)
}

#[expect(clippy::print_stdout, reason = "the command's result")]
fn write(picture: &RgbImage, path: &Path) -> Result<()> {
    save_png(picture, path)?;
    println!("{}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_picture_files_than_png_are_refused() {
        for (out, want) in [("o.jpg", Some("jpg")), ("a/O.JPEG", Some("jpeg")), ("o.png", None), ("folder", None), ("v1.2", None)] {
            assert_eq!(picture_extension(Path::new(out)).as_deref(), want, "{out}");
        }
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("512"), Ok((512, 512)));
        assert_eq!(parse_size("1024x768"), Ok((1024, 768)));
        for bad in ["", "x", "12x", "-1", "1x2x3"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
