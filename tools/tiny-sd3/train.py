"""Trains the parts for given times, and saves their weights and contact sheets; `--resume` goes on from saved weights.

    python train.py --subjects subjects.json.xz --tokenizers TOKENIZERS --out OUT [--resume DIR] --vae SECONDS --mmdit SECONDS --recipe RECIPE
"""

import argparse
import pathlib
import time

import torch
from PIL import Image

import data
import networks
import pictures
import scenes
import sheet
import train_mmdit
import train_vae

STARTED = time.time()


def log(text):
    print(f"[{time.time() - STARTED:6.1f}] {text}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", required=True)
    parser.add_argument("--tokenizers", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--resume", type=pathlib.Path)
    parser.add_argument("--recipe", choices=networks.RECIPES, required=True)
    parser.add_argument("--vae", type=float, default=0, help="seconds for the autoencoder")
    parser.add_argument("--mmdit", type=float, default=0, help="seconds for the MMDiT and the text encoders")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after the start at which the MMDiT's training ends at the latest")
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--bank", type=int, default=400_000, help="scenes for the MMDiT, encoded before its training")
    parser.add_argument("--rate", type=float, default=train_mmdit.RATE)
    parser.add_argument("--last-rate", type=float, default=0.0, help="share of the rate at the end")
    parser.add_argument("--keep", type=float, default=0.999, help="share of the moving average that a step keeps")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def reconstructions(model, stock, rows):
    """Pictures and what the autoencoder makes of them, side by side."""
    x = scenes.compose(stock, rows[:32])
    y = model.vae.decode(model.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    both = ((torch.stack([x, y], 1).flatten(0, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    size = both.shape[1]
    image = Image.new("RGB", (8 * size, 8 * size))
    for i, picture in enumerate(both):
        image.paste(Image.fromarray(picture), (i % 8 * size, i // 8 * size))
    return image


def main():
    options = arguments()
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.suppress_errors = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = networks.RECIPES[options.recipe]
    options.out.mkdir(parents=True, exist_ok=True)
    subjects = pictures.load(options.subjects, recipe.subjects)
    stock = torch.from_numpy(pictures.render_all(subjects, recipe.size, max(1, options.workers))).permute(0, 3, 1, 2).contiguous().to(device)
    log(f"{len(subjects)} subjects, pictures {tuple(stock.shape)} on {device}")
    model = networks.Model(recipe, networks.Tokens(options.tokenizers, recipe))
    log("parameters: " + ", ".join(f"{part} {sum(p.numel() for p in getattr(model, part).parameters()) / 1e6:.2f} M" for part in networks.PARTS))
    if options.resume:
        model.restore(options.resume)
    model.to(device)

    def batches(size, seed):
        return data.batches(subjects, options.tokenizers, recipe, size, seed, options.workers, device.type == "cuda")

    if options.vae > 0:
        source = batches(options.vae_batch, 2 * options.seed)
        train_vae.train(model, stock, source, time.time() + options.vae, log)
        reconstructions(model, stock, next(source)[0]).save(options.out / "autoencoder.png")
        model.save(options.out)
        del source
    if options.mmdit > 0:
        source = batches(options.batch, 2 * options.seed + 1)
        end = min(time.time() + options.mmdit, STARTED + options.until)
        model.vae.eval().requires_grad_(False)
        known = train_mmdit.bank(model.vae, stock, source, options.bank)
        del source
        log(f"{len(known[0])} scenes in the bank")
        train_mmdit.train(model, known, options.batch, end, options.rate, options.last_rate, options.keep, log)
        model.save(options.out)
        log("saved")
    pipeline = model.pipeline(options.tokenizers)
    prompts = sheet.PROMPTS[: sheet.PLAIN] if recipe.plain else sheet.PROMPTS
    for guidance in (4.0, 1.0):
        images = sheet.draw(pipeline, prompts, recipe, guidance)
        sheet.contact_sheet(images, prompts, 8).save(options.out / f"guidance-{guidance:g}.png")
    log("end")


if __name__ == "__main__":
    main()
