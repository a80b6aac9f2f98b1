#!/usr/bin/env python3
"""A whole job beside its step: `finetune run` of SD3-Medium's full size, random weights, 40 pictures, from process start to published LoRA.

    benches/whole_job.py FINETUNE_BINARY BENCH_BINARY [--work FOLDER] [--updates 40] [--cpus N] SIZE/BATCH...

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

from finetune_run import BUCKET, command, entries

ACCUMULATION = 5
PICTURES = 40


def model(folder):
    """SD3-Medium's sizes in every part, the quickstart's tokenizers and scheduler. No trained weights: time does not depend on them."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    source, target = BUCKET / "models/tiny-sd3", folder / "models/sd3"
    if target.exists():
        return
    for part in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(source / part, target / part)
    shutil.copy(source / "model_index.json", target)
    vocabulary = json.loads((source / "text_encoder/config.json").read_text())
    clip = lambda width, layers, act: CLIPTextConfig(  # noqa: E731
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64, projection_dim=width, hidden_act=act,
        vocab_size=vocabulary["vocab_size"], bos_token_id=vocabulary.get("bos_token_id"), eos_token_id=vocabulary.get("eos_token_id"),
        pad_token_id=vocabulary.get("pad_token_id"),
    )  # fmt: skip
    parts = {
        "transformer": lambda: SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
        ),
        "vae": lambda: AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
        ),
        "text_encoder": lambda: CLIPTextModelWithProjection(clip(768, 12, "quick_gelu")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(clip(1280, 32, "gelu")),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )),
    }  # fmt: skip
    torch.manual_seed(0)
    for name, make in parts.items():
        with torch.device("cuda"):
            made = make().half()
        made.save_pretrained(target / name, max_shard_size="20GB")
        del made
        torch.cuda.empty_cache()


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


def run(binary, folder, shape, updates, cpus):
    size, batch = (int(word) for word in shape.split("/"))
    name = shape.replace("/", "-")
    changes = (
        "model.source.objectStore.uri=s3://quickstart/models/sd3/", "dataset.uri=s3://quickstart/datasets/pictures/", f"training.maxSteps={updates}",
        f"training.resolution={size}", f"training.batchSize={batch}", f"training.gradientAccumulationSteps={ACCUMULATION}",
        "training.maxSequenceLength=77", "training.precision=BF16", "training.lora.rank=4", "training.lora.alpha=4",
        "training.lora.targetModules=[to_q,to_k,to_v,to_out.0]", "training.optimizer.learningRate=1e-5", f"output.uri=s3://quickstart/loras/{name}/", "validation=null",
    )  # fmt: skip
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
            plan = {key: fields[key] for key in ("micro_batch", "recomputed_blocks", "bytes")}
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
        "shape": shape,
        "plan": plan,
        "update_ms": round(1e3 * statistics.median(seconds[3:]) / ACCUMULATION, 2),
        "between_updates_ms": round(1e3 * (last - first) / (len(records) - 4) / ACCUMULATION, 2),
        "gpu_busy": busy.between(first, last),
        "first_update_after_s": round(records[0]["time"] - begin, 1),
        "seconds": round(end - begin, 1),
        "stages": stages,
    }


def benchmark(bench, shape, recompute):
    """Milliseconds of a micro-step divided as the run's plan divides it."""
    measured = subprocess.run([bench, "--steps", "20", "--recompute", str(recompute), shape], check=True, capture_output=True, text=True).stdout
    reports = [json.loads(line) for line in measured.splitlines() if line.startswith("{")]
    return next(round(report["step_ms"], 2) for report in reports if report.get("shape") == shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("finetune", type=pathlib.Path)
    parser.add_argument("bench", type=pathlib.Path)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--work", type=pathlib.Path, default=None)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--cpus", type=int, default=None)
    args = parser.parse_args()
    folder = args.work or pathlib.Path(tempfile.mkdtemp())
    model(folder)
    dataset(folder)
    for shape in args.shapes:
        result = run(args.finetune, folder, shape, args.updates, args.cpus)
        result["benchmark_ms"] = benchmark(args.bench, shape, result["plan"]["recomputed_blocks"])
        result["ratio"] = round(result["between_updates_ms"] / result["benchmark_ms"], 3)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
