#!/usr/bin/env python3
"""A whole job beside its step: `finetune run` of a published model's full size, random weights, 40 pictures, from process start to published LoRA.

    benches/whole_job.py FINETUNE_BINARY BENCH_BINARY [--model sd3-medium] [--work FOLDER] [--updates 40] [--cpus N] SIZE/BATCH...

BENCH_BINARY is what `cargo bench --features cuda --bench gpu_step --no-run` prints. Needs a GPU with nothing else on it, torch, diffusers and transformers. For each shape, one JSON
line: milliseconds of a micro-step by the benchmark and in the whole job (from the fourth update's end to the last's; the first three record the step), their ratio, how busy the GPU
was meanwhile as its driver reports it, and the stages of the run in seconds. `--cpus` gives the trainer that many processors.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch

import models
from finetune_run import command, entries

ACCUMULATION = 5
PICTURES = 40


def dataset(folder):
    """Pictures of 1024 x 1024 pixels with a caption each."""
    from PIL import Image

    target = folder / "datasets/pictures"
    if target.exists():
        return
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    with open(target / "metadata.jsonl", "w") as metadata:
        for i in range(PICTURES):
            pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16, generator=generator), 1024, mode="bicubic").clamp(0, 1)
            Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy()).save(target / f"{i:02}.jpg", quality=92)
            metadata.write(json.dumps({"file_name": f"{i:02}.jpg", "caption": f"robi in picture number {i}"}) + "\n")


class Busy:
    """How much of the time kernels ran, in per cent, as the driver reports it."""

    def __init__(self):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.samples, self.done = [], threading.Event()

        def watch():
            while not self.done.wait(0.1):
                self.samples.append((time.time(), pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))

        self.thread = threading.Thread(target=watch)
        self.thread.start()

    def stop(self):
        self.done.set()
        self.thread.join()

    def between(self, begin, end):
        inside = [busy for when, busy in self.samples if begin <= when <= end]
        return round(statistics.mean(inside), 1) if inside else None


def run(binary, folder, model, shape, updates, cpus):
    size, batch = (int(word) for word in shape.split("/"))
    name = f"{model}-{shape.replace('/', '-')}"
    changes = (
        f"model.source.objectStore.uri=s3://quickstart/models/{model}/", "dataset.uri=s3://quickstart/datasets/pictures/", f"training.maxSteps={updates}",
        f"training.resolution={size}", f"training.batchSize={batch}", f"training.gradientAccumulationSteps={ACCUMULATION}",
        "training.maxSequenceLength=77", "training.precision=BF16", "training.lora.rank=4", "training.lora.alpha=4",
        "training.lora.targetModules=[to_q,to_k,to_v,to_out.0]", "training.optimizer.learningRate=1e-5", f"output.uri=s3://quickstart/loras/{name}/", "validation=null",
    )  # fmt: skip
    # What is done already would not be done again.
    shutil.rmtree(folder / "loras" / name, ignore_errors=True)
    allowed = sorted(os.sched_getaffinity(0))[: cpus or None]
    busy, begin = Busy(), time.time()
    process = subprocess.Popen(
        command(binary, folder, folder / "cache" / name, changes), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )  # fmt: skip
    stages, plan = [], {}
    for level, fields in entries(process.stderr):
        if level in ("WARN", "ERROR"):
            print(level, json.dumps(fields), file=sys.stderr)
        if fields.get("message") == "memory plan":
            plan = {key: fields[key] for key in ("weights", "micro_batch", "recomputed_blocks", "bytes")}
        stages.append((round(time.time() - begin, 2), fields.get("message")))
    code, end = process.wait(), time.time()
    busy.stop()
    if code:
        sys.exit(f"{shape}: finetune run ended with {code}")
    records = [json.loads(line) for line in open(folder / "loras" / name / "metrics.jsonl")]
    records = [record for record in records if record.get("stepSeconds")]
    seconds = [record["stepSeconds"] for record in records]
    first, last = records[3]["time"], records[-1]["time"]
    return {
        "model": model,
        "shape": shape,
        "plan": plan,
        "update_ms": round(1e3 * statistics.median(seconds[3:]) / ACCUMULATION, 2),
        "between_updates_ms": round(1e3 * (last - first) / (len(records) - 4) / ACCUMULATION, 2),
        "gpu_busy": busy.between(first, last),
        "first_update_after_s": round(records[0]["time"] - begin, 1),
        "seconds": round(end - begin, 1),
        "stages": stages,
    }


def benchmark(bench, model, shape, plan):
    """Milliseconds of a micro-step divided as the run's plan divides it."""
    options = ["--model", model, "--steps", "20", "--recompute", str(plan["recomputed_blocks"])] + ["--int8"] * (plan["weights"] == "Int8")
    measured = subprocess.run([bench, *options, shape], check=True, capture_output=True, text=True).stdout
    reports = [json.loads(line) for line in measured.splitlines() if line.startswith("{")]
    return next(round(report["step_ms"], 2) for report in reports if report.get("shape") == shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("finetune", type=pathlib.Path)
    parser.add_argument("bench", type=pathlib.Path)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--model", choices=models.TRANSFORMERS, default="sd3-medium")
    parser.add_argument("--work", type=pathlib.Path, default=None)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--cpus", type=int, default=None)
    args = parser.parse_args()
    folder = args.work or pathlib.Path(tempfile.mkdtemp())
    models.full_size(args.model, folder / "models" / args.model)
    dataset(folder)
    for shape in args.shapes:
        result = run(args.finetune, folder, args.model, shape, args.updates, args.cpus)
        result["benchmark_ms"] = benchmark(args.bench, args.model, shape, result["plan"])
        result["ratio"] = round(result["between_updates_ms"] / result["benchmark_ms"], 3)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
