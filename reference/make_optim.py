"""Reference trajectories of the optimizers and learning rates of the schedules.

Writes into tests/golden/optim: adamw.safetensors, adamw8bit.safetensors, prodigy-<variant>.safetensors (a parameter tensor after
every update) and schedules.json. The versions that made them are in the files' metadata ("versions").

    pip install -r requirements.txt && python make_optim.py
"""

import importlib.metadata
import json
import os

import torch

torch.set_num_threads(1)

import bitsandbytes
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler
from prodigyopt import Prodigy
from safetensors.torch import save_file

HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "golden", "optim")
VERSIONS = json.dumps({p: importlib.metadata.version(p) for p in ("torch", "bitsandbytes", "prodigyopt", "diffusers")}, sort_keys=True)



def problem(sizes, seed, updates):
    """Initial values (one of them zero, as LoRA's B) and gradients of widely different magnitudes, with exact zeros."""
    g = torch.Generator().manual_seed(seed)
    start = {n: torch.randn(s, generator=g) * 0.1 for n, s in sizes.items()}
    start["a"].zero_()
    grads = []
    for _ in range(updates):
        step = {n: torch.randn(s, generator=g) * 10 ** (torch.rand(s, generator=g) * 6 - 6) for n, s in sizes.items()}
        step["b"][:300] = 0
        grads.append(step)
    return start, grads


def run(name, make, updates=6, seed=1, lrs=None):
    # AdamW8bit: one parameter below its limit of 4096 values, one above with a partial block of 256.
    start, grads = problem({"a": 40, "b": 4400 if name == "adamw8bit" else 700}, seed, updates)
    params = {n: torch.nn.Parameter(v.clone()) for n, v in start.items()}
    optimizer = make(list(params.values()))
    out = {f"start.{n}": v for n, v in start.items()}
    for t, step in enumerate(grads):
        if lrs is not None:
            for group in optimizer.param_groups:
                group["lr"] = lrs[t]
        for n, p in params.items():
            out[f"grad.{t}.{n}"] = step[n].half().float()
            p.grad = out[f"grad.{t}.{n}"].clone()
        optimizer.step()
        for n, p in params.items():
            out[f"value.{t}.{n}"] = p.detach().clone()
        if isinstance(optimizer, Prodigy):
            out[f"d.{t}"] = torch.tensor([optimizer.param_groups[0]["d"]], dtype=torch.float64)
    if name == "adamw8bit":
        for k in ("state1", "state2", "absmax1", "absmax2"):
            out[f"{k}.b"] = optimizer.state[params["b"]][k].clone()
    # Gradients are exact in half precision; files stay small.
    out = {k: v.half() if k.startswith("grad.") else v for k, v in out.items()}
    save_file({k: v.contiguous() for k, v in out.items()}, f"{HERE}/{name}.safetensors", metadata={"versions": VERSIONS})


LRS = [1e-3, 5e-4, 1e-3, 2e-3, 1e-3, 1e-3]
run("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05), lrs=LRS)
run("adamw8bit", lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05), lrs=LRS)
run("prodigy-default", lambda p: Prodigy(p))
run("prodigy-all", lambda p: Prodigy(p, lr=1.0, betas=(0.9, 0.99), beta3=0.98, weight_decay=0.01, use_bias_correction=True,
                                     safeguard_warmup=True, d0=1e-5, d_coef=2.0, growth_rate=1.5), lrs=[0.1, 0.5, 1.0, 1.0, 0.0, 0.7])
run("prodigy-coupled", lambda p: Prodigy(p, weight_decay=0.1, decouple=False, d0=1e-4))

schedules = []
for name in ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"):
    for warmup, total, cycles, power in ((0, 10, 1, 1.0), (3, 17, 3, 2.0), (5, 5, 1, 0.5), (0, 1, 2, 1.0)):
        if name == "polynomial" and warmup == total:
            continue  # divides by zero
        o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        s = get_scheduler(name, o, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles, power=power)
        values = []
        for _ in range(total + 3):
            values.append(s.get_last_lr()[0])
            o.step(); s.step()
        schedules.append(dict(name=name, warmup=warmup, total=total, cycles=0.5 if name == "cosine" else cycles, power=power, lr=3e-4, values=values))
for cycles in (1.0, 1.75):
    o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    s = get_cosine_schedule_with_warmup(o, 2, 12, num_cycles=cycles)
    values = []
    for _ in range(14):
        values.append(s.get_last_lr()[0])
        o.step(); s.step()
    schedules.append(dict(name="cosine", warmup=2, total=12, cycles=cycles, power=1.0, lr=3e-4, values=values))
json.dump({"versions": json.loads(VERSIONS), "schedules": schedules}, open(f"{HERE}/schedules.json", "w"), indent=1)
