"""Which kernels are compared and timed, and how each is launched."""

import itertools
import os
import re

from driver import Kernel, Module

MODULES = {}
PARTS = ["forward", "backward_q", "backward_kv"]


def module(folder, name):
    path = os.path.join(folder, name)
    if path not in MODULES:
        MODULES[path] = Module(path)
    return MODULES[path]


def plain(folder, dtype, head_dim):
    """Any head width, no tensor cores."""
    upto = next(w for w in (32, 64, 128) if head_dim <= w)
    rows = 32 if upto == 128 else 64
    forward, backward = {32: (41984, 50944), 64: (41728, 58624), 128: (35200, 51840)}[upto]
    m = module(folder, "attention_any.cubin")
    return [Kernel(m, f"attention_{part}_{dtype}_upto{upto}", rows, 256, shared) for part, shared in zip(PARTS, (forward, backward, backward))]


def tensor_cores(folder, dtype, old=False):
    """Head width 64, any card; `old`: the code of cards before sm_80, compiled by the driver for this one."""
    end, shared = (".75.ptx", (16384, 16384, 16896)) if old else (".cubin", (32768, 32768, 33792))
    modules = [module(folder, f"attention_{name}{end}") for name in ("forward", "backward", "backward")]
    return [Kernel(m, f"attention_{part}_{dtype}_d64", 64, 128, bytes) for m, part, bytes in zip(modules, PARTS, shared)]


def hopper(folder, dtype):
    modules = [module(folder, f"attention_{name}_hopper.cubin") for name in ("forward", "backward", "backward")]
    return [Kernel(m, f"attention_{part}_{dtype}_d64_hopper", rows, threads, 69632) for m, part, rows, threads in zip(modules, PARTS, (192, 128, 128), (512, 384, 384))]


def tiles(folder):
    """The other tiles of tiles_hopper.cu, by part."""
    found = {part: [] for part in PARTS}
    if not os.path.exists(os.path.join(folder, "tiles_hopper.cubin")):
        return found
    m = module(folder, "tiles_hopper.cubin")
    for part, name, tile in re.findall(r"^TILE\((\w+), (\w+), (.*)\)", open(os.path.join(os.path.dirname(__file__), "tiles_hopper.cu")).read(), re.M):
        groups, step, stages, _, _, own = (x.strip() for x in tile.split(","))
        groups, step, stages = int(groups), int(step), int(stages)
        shared = -(-stages * (step * 264 + 16) // 1024) * 1024 + 1024 + (groups * 64 * 256 if own == "true" else 0)
        found[part].append(Kernel(m, f"attention_{part}_bf16_d64_{name}", 64 * groups, 128 * (groups + 1), shared))
    return found


def correctness(folder):
    """(dtype, head_dim, label, [(forward, backward_q, backward_kv)])"""
    for dtype in ["bf16", "f16"]:
        yield dtype, 64, "product", [tuple(tensor_cores(folder, dtype))]
    yield "f16", 64, "sm_75", [tuple(tensor_cores(folder, "f16", old=True))]
    for dtype in ["bf16", "f16"]:
        yield dtype, 64, "hopper", [tuple(hopper(folder, dtype))]
    found = tiles(folder)
    chosen = hopper(folder, "bf16")
    yield "bf16", 64, "tiles", [
        tuple(of[i] if i < len(of) else default for of, default in zip(found.values(), chosen)) for i in range(max(map(len, found.values())))
    ]
    for head_dim in [8, 16, 32, 33, 64, 96, 128]:
        yield "f32", head_dim, "plain", [tuple(plain(folder, "f32", head_dim))]
    for dtype, head_dim in itertools.product(["f16", "bf16"], [8, 32, 64, 80]):
        yield dtype, head_dim, "plain", [tuple(plain(folder, dtype, head_dim))]


def timed(folder, dtype):
    """Kernels by part."""
    parts = [[a, b] for a, b in zip(tensor_cores(folder, dtype), hopper(folder, dtype))]
    if dtype == "bf16":
        parts = [part + more for part, more in zip(parts, tiles(folder).values())]
    return parts
