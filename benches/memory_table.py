#!/usr/bin/env python3
"""Does every planned run fit? `finetune run` of each model, size, batch and rank on a GPU: what the card shows as taken against the plan.

    benches/memory_table.py FINETUNE_BINARY [--work FOLDER] [--seconds N] MODEL:SIZE/BATCH[:RANK]...

with MODEL one of sd3-medium, sd3.5-medium, sd3.5-large, as sd3.5-large:1024/4:16. Needs a GPU with nothing else on it, torch and diffusers. One JSON line for each; exit code 1 if a run
failed, took more than 14.5 GiB, is more than 3 % from its plan, or ran out of memory on the way. `--seconds`: no run is started after that time.
"""
import argparse
import json
import pathlib
import shutil
import sys
import tempfile
import time

import torch

from gpu_memory import BUDGET, DIVIDED, prepare, run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("finetune", type=pathlib.Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--work", type=pathlib.Path, default=None)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    folder = args.work or pathlib.Path(tempfile.mkdtemp())
    torch.zeros(1, device="cuda")
    begin, wrong = time.monotonic(), []
    for name in args.runs:
        if time.monotonic() - begin > args.seconds:
            wrong.append(f"{name}: not started, the time was over")
            continue
        model, shape, *rank = name.split(":")
        prepare(folder, model)
        size, batch = (int(word) for word in shape.split("/"))
        result, fields, _ = run(args.finetune, folder, name.replace("/", "-").replace(":", "-"), model, (size, batch), int(rank[0]) if rank else 4)
        share = result["taken_gib"] / max(result["planned_gib"], 1e-9)
        divided = sum(entry.get("message") == DIVIDED for entry in fields)
        bad = result["exit"] != 0 or result["taken_gib"] > BUDGET or abs(share - 1) > 0.03 or divided > 0
        print(json.dumps({"job": name, "share of the plan": round(share, 3), "divided further": divided, "ok": not bad}), flush=True)
        wrong += [name] * bad
        shutil.rmtree(folder / "loras", ignore_errors=True)
    for name in wrong:
        print("FAILED:", name)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
