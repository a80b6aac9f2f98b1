#!/usr/bin/env python3
"""Prior preservation on a GPU: class pictures are drawn in the precision that is asked for, and only where they are missing.

    tests/gpu/prior.py FINETUNE_BINARY [WORK_FOLDER]

Needs a GPU. Runs of the quickstart's job with class pictures, training in bf16, with one cache: `Auto`, `FP32`, `FP32` again and `BF16`.
Checks which of them draw, that `BF16` gives the LoRA of `Auto`, FP32 another one, and that its second run gives the
LoRA of its first. Exit code 1 if one of these does not hold.
"""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

REPO = pathlib.Path(__file__).resolve().parents[2]
BUCKET = REPO / "examples/quickstart/bucket"
IMAGES = 6


def run(binary, folder, name, precision):
    """How many class pictures the run drew, its first update's loss of the class pictures, and its LoRA file."""
    changes = (
        "training.maxSteps=3", "training.precision=BF16", f"output.uri=s3://quickstart/loras/{name}/", "validation=null",
        f'training.priorPreservation={{"classPrompt": "robot, noto style", "images": {IMAGES}, "precision": "{precision}"}}',
    )  # fmt: skip
    command = [binary, "run", REPO / "examples/quickstart/job.yaml", "--device", "cuda", "--bucket", f"s3://quickstart={folder}", "--log-format", "json"]
    command += ["--cache-dir", folder / "cache"] + [part for change in changes for part in ("--set", change)]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}\n{done.stderr[-3000:]}")
    drawn = 0
    for line in done.stderr.splitlines():
        if "drawing class pictures" in line:
            entry = json.loads(line)
            drawn = entry.get("total") or entry.get("fields", {}).get("total")
    out = folder / "loras" / name
    first = next(record for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if record.get("priorLoss") is not None)
    result = {"run": name, "drawn": drawn, "first_prior_loss": first["priorLoss"]}
    print(json.dumps(result), flush=True)
    return drawn, first["priorLoss"], (out / "pytorch_lora_weights.safetensors").read_bytes()


def main():
    binary = sys.argv[1]
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    shutil.copytree(BUCKET / "models", folder / "models")
    shutil.copytree(BUCKET / "datasets", folder / "datasets")
    auto, auto_loss, auto_lora = run(binary, folder, "auto", "Auto")
    full, full_loss, full_lora = run(binary, folder, "fp32", "FP32")
    again, _, again_lora = run(binary, folder, "fp32-again", "FP32")
    bf16, _, bf16_lora = run(binary, folder, "bf16", "BF16")
    wrong = []

    def check(condition, what):
        if not condition:
            wrong.append(what)

    check(auto == IMAGES, "the first run must draw all")
    check(full == IMAGES, "FP32 must not take the pictures that were drawn in bf16")
    check(again == 0 and again_lora == full_lora, "the second run of FP32 must take the first one's pictures and give its LoRA")
    check(bf16 == 0 and bf16_lora == auto_lora, "BF16 is what Auto draws in")
    check(auto_lora != full_lora and auto_loss != full_loss, "pictures drawn in bf16 are others than those in f32")
    check(abs(auto_loss / full_loss - 1) < 0.2, f"but of the same class: {auto_loss} {full_loss}")
    for what in wrong:
        print("FAILED:", what)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
