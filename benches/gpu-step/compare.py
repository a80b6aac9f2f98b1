#!/usr/bin/env python3
"""Times PyTorch's training micro-step (diffusers, peft) and ours on one GPU in one run, on full-size SD3-Medium with random weights.

    benches/gpu-step/compare.py [--ours BENCH] [--out FOLDER] [--compile-limit S] [--limit S] [--only NAME,...]

Needs torch, diffusers and peft in this Python; bitsandbytes (optional) on its path or in $BITSANDBYTES. BENCH is the compiled bench "gpu_step"; it is
started for each shape when PyTorch is done.
All variants compile side by side; once the last one is ready or out of time, they are timed one after the other with the GPU to themselves.
Prints each figure as a JSON line, then the table for docs/benchmarks.md.
"""
import argparse
import json
import os
import pathlib
import selectors
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent


def step(pixels, batch, **more):
    return dict(what="step", pixels=pixels, batch=batch, **more)


# Most important first: what does not get done within the limit is left out from the end. "regional" compiles one block and uses it for all (minutes
# less than the whole model); "+graph", which such a variant reports too, is the same step as one CUDA graph.
COMPILED = {
    "512/4 regional": step(512, 4, mode="regional", graph=True),
    "1024/4 regional checkpointing": step(1024, 4, mode="regional", checkpointing=True),
    "1024/1 regional": step(1024, 1, mode="regional", graph=True),
    "512/1 regional": step(512, 1, mode="regional", graph=True),
    "1024/4 regional": step(1024, 4, mode="regional", graph=True),
    "512/4 compile": step(512, 4, mode="compile", graph=True),
    "512/1 reduce-overhead": step(512, 1, mode="reduce-overhead"),
    "1024/1 compile": step(1024, 1, mode="compile", graph=True),
    "1024/4 compile checkpointing": step(1024, 4, mode="compile", checkpointing=True),
    "512/1 compile": step(512, 1, mode="compile", graph=True),
    "512/4 compile checkpointing": step(512, 4, mode="compile", checkpointing=True),
    "1024/1 compile cudnn": step(1024, 1, mode="compile", sdpa="cudnn"),
    "1024/4 compile": step(1024, 4, mode="compile"),
    "512/4 reduce-overhead": step(512, 4, mode="reduce-overhead"),
    "1024/1 reduce-overhead": step(1024, 1, mode="reduce-overhead"),
}
EAGER = {
    "512/4 article": step(512, 4, checkpointing=True, article=True),
    "512/4 checkpointing": step(512, 4, checkpointing=True),
    "512/4": step(512, 4, graph=True),
    "1024/4 checkpointing": step(1024, 4, checkpointing=True),
    "512/1": step(512, 1, graph=True),
    "1024/1": step(1024, 1, graph=True),
    "vae": dict(what="vae"),
    "t5": dict(what="t5"),
    "1024/1 checkpointing": step(1024, 1, checkpointing=True),
    "512/1 checkpointing": step(512, 1, checkpointing=True),
    "optimizer": dict(what="optimizer"),
    "optimizer rank 64": dict(what="optimizer", rank=64),
    "1024/4": step(1024, 4, graph=True),
}


class Peer:
    """One variant in its own process."""

    def __init__(self, name, request, threads):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads), "PYTORCH_ALLOC_CONF": "expandable_segments:False"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peer.py"), json.dumps(request)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env
        )
        self.ready = False
        self.lines = []

    def read(self):
        """Takes in one line; False at the end of the process's output."""
        line = self.process.stdout.readline()
        if line.strip() == "ready":
            self.ready = True
        elif line.startswith("{"):
            self.lines.append({"variant": self.name, **json.loads(line)})
        return bool(line)

    def wait_until_ready(self, deadline):
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not self.ready and selector.select(max(0, deadline - time.monotonic())):
                if not self.read():
                    break
        return self.ready

    def finish(self, limit):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.process.stdin.close()
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while selector.select(max(0, deadline - time.monotonic())):
                if not self.read():
                    break
            else:
                self.lines.append({"variant": self.name, "what": "failed", "error": f"not done after {limit} s"})
        self.stop()

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        complaint = self.errors.read()
        if any(line["what"] == "failed" for line in self.lines) or not self.lines:
            print(f"--- {self.name}\n{complaint[-1500:]}", file=sys.stderr, flush=True)


# A process for each shape, so that its memory is its own. The last one fits 14.5 GiB with libraries and context.
OURS = [("512/4", []), ("512/1", []), ("1024/1", []), ("1024/4", ["--recompute", "6", "--cap", "13.5"])]


def ours(bench, limit):
    """The lines of our bench, in the peers' words."""
    for shape, more in OURS:
        try:
            done = subprocess.run([bench, "--precision", "bf16", "--steps", "20", *more, shape], stdout=subprocess.PIPE, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            yield {"variant": f"ours {shape}", "what": "failed", "error": f"not done after {limit} s"}
            continue
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                pixels, batch = map(int, found["shape"].split("/"))
                yield dict(
                    variant="ours", what="step", engine="finetune", pixels=pixels, batch=batch, mode=found["precision"], checkpointing=found["recompute"],
                    ms=found["step_ms"], allocated_gib=round(found["pool_peak_gib"], 3), process_gib=round(found["card_used_gib"], 3),
                )


def table(lines):
    """The ratio table in Markdown."""
    steps = [line for line in lines if line["what"] == "step" and "ms" in line]
    mine = [line for line in steps if line["engine"] == "finetune"]
    theirs = [line for line in steps if line["engine"] == "pytorch"]
    memory = lambda line: f"{line.get('allocated_gib') or '?'} / {line.get('process_gib') or '?'}"  # noqa: E731
    yield "| size, batch | engine | variant | ms | GiB allocated / process | ours / this |"
    yield "|---|---|---|---|---|---|"
    for size in sorted({(line["pixels"], line["batch"]) for line in steps}):
        at = lambda lines: sorted((line for line in lines if (line["pixels"], line["batch"]) == size), key=lambda line: line["ms"])  # noqa: E731, B023
        best = at(mine)[0]["ms"] if at(mine) else None
        for line in at(mine) + at(theirs):
            words = [line["mode"], *(word for word in ("checkpointing", "article") if line.get(word))]
            words += [line["sdpa"]] if line.get("sdpa", "default") != "default" else []
            ratio = f"{best / line['ms']:.2f}x" if best and line["engine"] == "pytorch" else ""
            yield f"| {size[0]} px, {size[1]} | {line['engine']} | {' '.join(words)} | {line['ms']:.1f} | {memory(line)} | {ratio} |"


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--ours")
    arguments.add_argument("--out", type=pathlib.Path)
    arguments.add_argument("--compile-limit", type=float, default=600)
    arguments.add_argument("--limit", type=float, default=1800)
    arguments.add_argument("--only")
    chosen = arguments.parse_args()
    begun = time.monotonic()
    wanted = chosen.only.split(",") if chosen.only else [*COMPILED, *EAGER]
    compiled = [name for name in COMPILED if name in wanted]
    eager = [name for name in EAGER if name in wanted]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(compiled)))
    compiling = [Peer(name, COMPILED[name], threads) for name in compiled]
    waiting = [Peer(name, EAGER[name], threads) for name in eager]
    lines = []

    def keep(found):
        for line in found:
            print(json.dumps(line), flush=True)
        lines.extend(found)

    for peer in compiling:
        peer.wait_until_ready(begun + chosen.compile_limit)
    for peer in [peer for peer in compiling if not peer.ready]:
        peer.stop()
        keep([{"variant": peer.name, "what": "failed", "error": f"not compiled after {chosen.compile_limit} s"}])
    print(f"compiled after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    for peer in [peer for peer in compiling if peer.ready] + waiting:
        left = chosen.limit - (time.monotonic() - begun)
        if left < 5 or not peer.wait_until_ready(time.monotonic() + min(60, left)):
            peer.stop()
            keep([{"variant": peer.name, "what": "failed", "error": "no time left"}])
            continue
        peer.finish(min(left, 60))
        keep(peer.lines)
    if chosen.ours:
        for line in ours(chosen.ours, 60):
            keep([line])
    rows = list(table(lines))
    print("\n".join(rows))
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    if chosen.out:
        (chosen.out / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (chosen.out / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
