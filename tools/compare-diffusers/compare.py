"""Validation loss after training: this product against diffusers + peft, with equal data, hyper-parameters and steps, over seeds.

    python compare.py [--seeds 5] [--steps 400] [--finetune target/release/finetune] [--bucket examples/quickstart/bucket]

Both sides train the quickstart's LoRA. Every LoRA, whoever made it, is loaded by diffusers and judged by the same function:
the velocity error on held-out pictures with fixed noise and timesteps (`reference.evaluation_loss`). The last rows train on one
shared prompt instead of the pictures' own captions. Prints a Markdown table for docs/numerics.md.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import torch

import reference

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCH, RATE, RANK, LENGTH, SIZE = 8, 3e-3, 16, 16, 64


def ours(args, bucket, seed, out):
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "compare"},
        "spec": {
            "model": {"source": {"objectStore": {"uri": "s3://quickstart/models/tiny-sd3/"}}},
            "dataset": {"uri": "s3://quickstart/datasets/train/"},
            "training": {
                "maxSteps": args.steps, "resolution": SIZE, "batchSize": BATCH, "gradientAccumulationSteps": 1, "precision": "FP32", "seed": seed,
                "maxSequenceLength": LENGTH, "centerCrop": True, "flowMatching": {"preconditionOutputs": False},
                "optimizer": {"type": "AdamW", "learningRate": str(RATE)}, "learningRateSchedule": {"type": "Linear"},
                "lora": {"rank": RANK, "alpha": RANK, "targetModules": reference.TARGETS},
            },
            "output": {"uri": "s3://quickstart/loras/compare/", "existing": "Overwrite"},
        },
    }
    manifest = bucket / "job.json"
    manifest.write_text(json.dumps(job))
    command = [args.finetune, "run", manifest, "--bucket", f"s3://quickstart={bucket}", "--cache-dir", bucket / "cache"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.copytree(bucket / "loras/compare", out)


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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--finetune", type=pathlib.Path, default=ROOT / "target/release/finetune")
    parser.add_argument("--bucket", type=pathlib.Path, default=ROOT / "examples/quickstart/bucket")
    args = parser.parse_args()
    torch.set_num_threads(2)
    pipeline = reference.load_pipeline(args.bucket / "models/tiny-sd3")
    held_out = reference.encode(pipeline, *reference.load_dataset(args.bucket / "datasets/robi-held-out", SIZE), LENGTH)
    mean, _, embeds, pooled = held_out
    rows = {"base model": [reference.evaluation_loss(pipeline, mean, embeds, pooled)]}
    for name, caption in (("own captions", None), ("one shared prompt", "robi the robot")):
        for seed in range(args.seeds if caption is None else 2):
            work = pathlib.Path(tempfile.mkdtemp())
            (work / "models").mkdir()
            (work / "models/tiny-sd3").symlink_to((args.bucket / "models/tiny-sd3").resolve())
            with_captions(args.bucket / "datasets/robi", work / "datasets/train", caption)
            ours(args, work, seed, work / "ours")
            rows.setdefault(f"finetune, {name}", []).append(judge(pipeline, held_out, work / "ours"))
            data = reference.encode(pipeline, *reference.load_dataset(work / "datasets/train", SIZE), LENGTH)
            reference.train(pipeline, data, work / "theirs", seed=seed, steps=args.steps, batch=BATCH, accumulation=1, learning_rate=RATE, rank=RANK, precondition=False)
            rows.setdefault(f"diffusers + peft, {name}", []).append(judge(pipeline, held_out, work / "theirs"))
            shutil.rmtree(work)
            print(seed, {k: round(v[-1], 5) for k, v in rows.items()}, file=sys.stderr, flush=True)
    print("| trained by | validation loss, mean | standard deviation | seeds |\n|---|---|---|---|")
    for name, losses in rows.items():
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        print(f"| {name} | {statistics.mean(losses):.4f} | {deviation} | {len(losses)} |")


main()
