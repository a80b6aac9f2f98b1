#!/usr/bin/env python3
"""16 GB as a promise: whole runs of a model of SD3-Medium's size beside another process's ballast, as on a 16 GB card.

    benches/gpu_memory.py FINETUNE_BINARY [WORK_FOLDER]

Needs a GPU with nothing else on it, torch and diffusers. The model is the quickstart's with a transformer of full width and depth (random
weights); the job is the quickstart's at 1024 px, batch 4. Three runs:
  alone      nothing else on the card;
  ballast    another process leaves 14.75 GiB free before the trainer starts, what a T4 shows;
  squeezed   that process takes 2 GiB more once the trainer has made its plan, so that the plan cannot hold.
Of each: the most that the card showed as taken by the trainer, against the plan's figure and against 14.5 GiB; and that the first two give
the same LoRA, and the third a LoRA that differs by rounding only. Exit code 1 if a bound is missed.
"""
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import torch
from safetensors.torch import load_file

import models
from finetune_run import BUCKET, command, entries

GIB = 1 << 30
BUDGET = 14.5
DIVIDED = "out of GPU memory: the step is divided further and computed again"


def free():
    return torch.cuda.mem_get_info()[0]


def prepare(folder, model):
    """The model with the quickstart's encoders, and its datasets."""
    models.trained_size(model, folder / "models" / model)
    for name in ("robi", "robi-held-out"):
        shutil.copytree(BUCKET / "datasets" / name, folder / "datasets" / name, dirs_exist_ok=True)


class Ballast:
    """A process that holds memory of the card until it is asked to let go; more on request."""

    def __init__(self, leave):
        code = (
            "import sys, torch\n"
            "held = [torch.zeros(1, device='cuda')]\n"
            "for line in sys.stdin:\n"
            "    leave, more = (int(word) for word in line.split())\n"
            "    size = more or torch.cuda.mem_get_info()[0] - leave\n"
            "    held.append(torch.empty(size, dtype=torch.uint8, device='cuda'))\n"
            "    print(torch.cuda.mem_get_info()[0], flush=True)\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask(leave, 0)

    def ask(self, leave, more):
        print(leave, more, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def run(binary, folder, name, model, shape, rank=4, ballast=None, squeeze=0):
    """One run of four updates; its plan, the most it took of the card in GiB, its log and its LoRA."""
    begin, least, done = free(), free(), threading.Event()

    def watch():
        nonlocal least
        while not done.is_set():
            least = min(least, free())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = f"s3://quickstart/loras/{name}/"
    process = subprocess.Popen(
        command(binary, folder, folder / "cache", (
            f"model.source.objectStore.uri=s3://quickstart/models/{model}/", "training.maxSteps=4", f"training.resolution={shape[0]}",
            f"training.batchSize={shape[1]}", "training.precision=BF16", f"output.uri={output}", "validation=null", f"training.lora.rank={rank}",
            "training.lora.targetModules=[to_q,to_k,to_v,to_out.0]",
        )),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    fields, taken = [], 0
    for _, entry in entries(process.stderr):
        fields.append(entry)
        if squeeze and entry.get("message") == "memory plan":
            before = free()
            ballast.ask(0, squeeze)
            taken = before - free()
            squeeze = 0
    code = process.wait()
    done.set()
    watcher.join()
    for entry in fields:
        if entry.get("message") in ("memory plan", DIVIDED) or code:
            print(name, json.dumps(entry), flush=True)
    plan = next((entry for entry in fields if entry.get("message") == "memory plan"), {})
    path = folder / "loras" / name / "pytorch_lora_weights.safetensors"
    lora = load_file(path) if path.exists() else {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None
    result = {"run": name, "exit": code, "taken_gib": round((begin - least - taken) / GIB, 3), "planned_gib": round(plan.get("bytes", 0) / GIB, 3), "lora": digest}
    result |= {key: plan.get(key) for key in ("weights", "micro_batch", "recomputed_blocks")}
    print(json.dumps(result), flush=True)
    return result, fields, lora


def main():
    binary = sys.argv[1]
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    job = ("sd3-medium", (1024, 4))
    prepare(folder, job[0])
    torch.zeros(1, device="cuda")
    wrong = []

    def check(condition, what):
        if not condition:
            wrong.append(what)

    ballast = Ballast(int(14.75 * GIB))
    try:
        beside, _, lora = run(binary, folder, "ballast", *job, ballast=ballast)
        again, fields, divided = run(binary, folder, "squeezed", *job, ballast=ballast, squeeze=2 * GIB)
    finally:
        ballast.stop()
    alone, _, _ = run(binary, folder, "alone", *job)
    for result in (alone, beside, again):
        check(result["exit"] == 0, f"{result['run']} ended with {result['exit']}")
        check(result["taken_gib"] <= BUDGET, f"{result['run']} took {result['taken_gib']} GiB")
    for result in (alone, beside):
        share = result["taken_gib"] / max(result["planned_gib"], 1e-9)
        check(abs(share - 1) <= 0.05, f"{result['run']}: the card showed {share:.3f} of the plan")
    check(alone["lora"] == beside["lora"], "the LoRA is not the same alone and beside ballast")
    check(any(entry.get("message") == DIVIDED for entry in fields), "the squeezed run did not run out of memory")
    worst = max(((divided[key] - lora[key]).norm() / lora[key].norm()).item() for key in lora) if lora and divided else float("inf")
    print(json.dumps({"largest relative difference after division": worst}))
    check(worst < 0.02, f"the divided run's LoRA differs by {worst}")
    for what in wrong:
        print("FAILED:", what)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
