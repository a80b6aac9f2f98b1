"""Validation loss after training: this product against diffusers + peft, with equal data, hyper-parameters and steps, over seeds.

    python compare.py WORK [--seeds 5] [--steps 200] [--job examples/quickstart/job.yaml] [--finetune target/release/finetune]

Both sides train the LoRA of the quickstart's manifest. Every LoRA, whoever made it, is loaded by diffusers and judged by the same function:
the velocity error on the held-out pictures with fixed noise and timesteps (`reference.evaluation_loss`). Each is trained twice: on the
pictures' own captions, and on one prompt shared by all. WORK keeps what is done: the same command goes on from there.

Prints a Markdown table for docs/numerics.md and writes WORK/captions.png: held-out pictures, and what the product's LoRAs of the first seed
draw for their captions from the same noise. Fails if the product is worse than the reference by more than the spread of the seeds, or if own
captions do not win.
"""

import argparse
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import torch
import yaml
from PIL import Image, ImageDraw

import reference

ROOT = pathlib.Path(__file__).resolve().parents[2]
OURS, THEIRS = "finetune", "diffusers + peft"
OWN, SHARED = "own captions", "one shared prompt"
COLUMNS, CELL, MARGIN, LINE = 8, 128, 6, 14


class Settings:
    """The quickstart's manifest, with what both sides need of it."""

    def __init__(self, job, steps):
        self.job = job
        spec = job["spec"]
        # A folder that stands in for the bucket: everything is below the first part of the path.
        place = lambda uri: re.fullmatch(r"s3://[^/]+/(.*?)/?", uri)[1]
        self.scheme = re.match(r"s3://([^/]+)/", spec["dataset"]["uri"])[1]
        self.model = place(spec["model"]["source"]["objectStore"]["uri"])
        self.dataset = place(spec["dataset"]["uri"])
        self.held_out = place(spec["validation"]["datasetUri"])
        self.validation = spec.pop("validation")
        training = spec["training"]
        training |= {"maxSteps": steps, "precision": "FP32", "centerCrop": True}
        self.steps, self.batch, self.size, self.length = steps, training["batchSize"], training["resolution"], training["maxSequenceLength"]
        self.accumulation, self.rate = training["gradientAccumulationSteps"], float(training["optimizer"]["learningRate"])
        self.rank, self.targets = training["lora"]["rank"], training["lora"]["targetModules"]
        self.precondition = training["flowMatching"]["preconditionOutputs"]
        self.schedule = training["learningRateSchedule"]["type"].lower()
        assert training["optimizer"]["type"] == "AdamW" and training["lora"].get("alpha", self.rank) == self.rank, "the reference does the same only then"

    def ours(self, args, bucket, seed, out):
        job = json.loads(json.dumps(self.job))
        job["metadata"]["name"] = "compare"
        job["spec"]["training"]["seed"] = seed
        job["spec"]["output"] = {"uri": f"s3://{self.scheme}/loras/compare/", "existing": "Overwrite"}
        (bucket / "job.json").write_text(json.dumps(job))
        command = [args.finetune, "run", bucket / "job.json", "--device", "cpu", "--bucket", f"s3://{self.scheme}={bucket}", "--cache-dir", args.work / "cache"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.copytree(bucket / "loras/compare", out)
        shutil.rmtree(bucket / "loras")

    def theirs(self, pipeline, bucket, seed, out):
        data = reference.encode(pipeline, *reference.load_dataset(bucket / self.dataset, self.size), self.length)
        reference.train(
            pipeline, data, out, seed=seed, steps=self.steps, batch=self.batch, accumulation=self.accumulation, learning_rate=self.rate, rank=self.rank,
            targets=self.targets, schedule=self.schedule, precondition=self.precondition,
        )


def judge(pipeline, held_out, lora):
    pipeline.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors", adapter_name="judged")
    mean, _, embeds, pooled = held_out
    loss = reference.evaluation_loss(pipeline, mean, embeds, pooled)
    pipeline.delete_adapters("judged")
    return loss


def with_captions(source, target, caption):
    """Copies a dataset; `caption` replaces every caption unless it is None."""
    shutil.copytree(source, target)
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row if caption is None else row | {"caption": caption}) + "\n" for row in rows)
    (target / "metadata.jsonl").write_text(text)


def draw(args, settings, model, captions, lora, scale):
    """The product's pictures of the captions, from the same noise for every LoRA."""
    out, prompts = args.work / "pictures", args.work / "prompts.txt"
    shutil.rmtree(out, ignore_errors=True)
    prompts.write_text("\n".join(captions) + "\n")
    command = [args.finetune, "sample", "--model", model, "--lora", lora / "pytorch_lora_weights.safetensors", "--lora-scale", str(scale), "--prompts", prompts]
    command += ["--size", str(settings.size), "--steps", str(settings.validation["steps"]), "--guidance-scale", settings.validation["guidanceScale"]]
    command += ["--max-sequence-length", str(settings.length), "--out", out]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return [Image.open(path).convert("RGB") for path in sorted(out.glob("[0-9]*.png"))]


def distance(truth, drawn):
    """Root mean square difference of values in [0, 1], over all pictures."""
    values = lambda pictures: torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).double() / 255 for p in pictures])
    return ((values(truth) - values(drawn)) ** 2).mean().sqrt().item()


def sheet(rows):
    """Rows of (label, pictures), at most eight columns wide, then the next pictures of every row."""
    count = len(rows[0][1])
    groups, height = -(-count // COLUMNS), LINE + CELL + MARGIN
    page = Image.new("RGB", (MARGIN + min(count, COLUMNS) * (CELL + MARGIN), groups * (len(rows) * height + MARGIN) + MARGIN), "white")
    pen, y = ImageDraw.Draw(page), MARGIN
    for first in range(0, count, COLUMNS):
        for label, pictures in rows:
            pen.text((MARGIN, y), label, fill=(32, 32, 32))
            for column, picture in enumerate(pictures[first : first + COLUMNS]):
                page.paste(picture.resize((CELL, CELL), Image.NEAREST), (MARGIN + column * (CELL + MARGIN), y + LINE))
            y += height
        y += MARGIN
    return page


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--shared-prompt", default="robi the robot")
    parser.add_argument("--job", type=pathlib.Path, default=ROOT / "examples/quickstart/job.yaml")
    parser.add_argument("--bucket", type=pathlib.Path, default=ROOT / "examples/quickstart/bucket")
    parser.add_argument("--finetune", type=pathlib.Path, default=ROOT / "target/release/finetune")
    args = parser.parse_args()
    # The model is small: threads would spend their time waiting for each other.
    torch.set_num_threads(1)
    settings = Settings(yaml.safe_load(args.job.read_text()), args.steps)
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline = reference.load_pipeline(args.bucket / settings.model)
    pictures, captions = reference.load_dataset(args.bucket / settings.held_out, settings.size)
    held_out = reference.encode(pipeline, pictures, captions, settings.length)
    mean, _, embeds, pooled = held_out
    base = reference.evaluation_loss(pipeline, mean, embeds, pooled)
    losses = {}
    for seed in range(args.seeds):
        for name, caption in ((OWN, None), (SHARED, args.shared_prompt)):
            bucket = args.work / "bucket"
            shutil.rmtree(bucket, ignore_errors=True)
            (bucket / settings.model).parent.mkdir(parents=True)
            (bucket / settings.model).symlink_to((args.bucket / settings.model).resolve())
            with_captions(args.bucket / settings.dataset, bucket / settings.dataset, caption)
            for side in (OURS, THEIRS):
                out = args.work / side.split()[0] / name.replace(" ", "-") / str(seed)
                if not (out / "pytorch_lora_weights.safetensors").exists():
                    if side == OURS:
                        settings.ours(args, bucket, seed, out)
                    else:
                        settings.theirs(pipeline, bucket, seed, out)
                losses.setdefault((side, name), []).append(judge(pipeline, held_out, out))
        print(seed, {" ".join(k): round(v[-1], 5) for k, v in losses.items()}, file=sys.stderr, flush=True)

    print(f"{settings.steps} updates of {settings.batch * settings.accumulation} pictures, base model {base:.4f}:\n")
    print("| trained by | on | validation loss, mean | standard deviation | each seed |\n|---|---|---|---|---|")
    spread = {}
    for (side, name), values in losses.items():
        spread[side, name] = (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        each = ", ".join(f"{value:.4f}" for value in values)
        print(f"| {side} | {name} | {spread[side, name][0]:.4f} | {spread[side, name][1]:.4f} | {each} |")

    truth = [Image.fromarray(((p.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for p in pictures]
    loras = {name: args.work / OURS / name.replace(" ", "-") / "0" for name in (OWN, SHARED)}
    drawn = {
        "base model": draw(args, settings, args.bucket / settings.model, captions, loras[OWN], 0.0),
        f'LoRA trained on one shared prompt ("{args.shared_prompt}")': draw(args, settings, args.bucket / settings.model, captions, loras[SHARED], 1.0),
        "LoRA trained on each picture's own caption": draw(args, settings, args.bucket / settings.model, captions, loras[OWN], 1.0),
    }
    rows = [("held-out pictures, never trained on", truth)]
    rows += [(f"{label}, distance {distance(truth, row):.3f}", row) for label, row in drawn.items()]
    sheet(rows).save(args.work / "captions.png")
    print("\n" + "\n".join(label for label, _ in rows))

    (our_mean, our_sd), (their_mean, their_sd) = spread[OURS, OWN], spread[THEIRS, OWN]
    if our_mean > their_mean + max(our_sd, their_sd):
        sys.exit(f"the product's loss {our_mean:.4f} is above the reference's {their_mean:.4f} by more than the spread")
    for side in (OURS, THEIRS):
        if max(losses[side, OWN]) >= min(losses[side, SHARED]):
            sys.exit(f"{side}: own captions do not win with every seed")


main()
