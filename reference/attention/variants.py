"""Which kernels are compared and timed, and how each is launched."""

import itertools
import os

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
    """The large blocks and the pairs."""
    modules = [module(folder, f"attention_{name}_hopper.cubin") for name in ("forward", "backward", "backward")]
    sizes = {
        "": [(256, 640, 135168), (192, 512, 118784), (128, 384, 69632)],
        "_pair": [(128, 384, 84992), (64, 256, 69632), (64, 256, 69632)],
    }
    return [
        tuple(Kernel(m, f"attention_{part}_{dtype}_d64_hopper{suffix}", *size) for m, part, size in zip(modules, PARTS, of))
        for suffix, of in sizes.items()
    ]


def correctness(folder):
    """(dtype, head_dim, label, [(forward, backward_q, backward_kv)])"""
    for dtype in ["bf16", "f16"]:
        yield dtype, 64, "portable", [tuple(tensor_cores(folder, dtype))]
    yield "f16", 64, "sm_75", [tuple(tensor_cores(folder, "f16", old=True))]
    for dtype in ["bf16", "f16"]:
        yield dtype, 64, "hopper", hopper(folder, dtype)
    for head_dim in [8, 16, 32, 33, 64, 96, 128]:
        yield "f32", head_dim, "plain", [tuple(plain(folder, "f32", head_dim))]
    for dtype, head_dim in itertools.product(["f16", "bf16"], [8, 32, 64, 80]):
        yield dtype, head_dim, "plain", [tuple(plain(folder, dtype, head_dim))]


def timed(folder, dtype):
    """Kernels by part."""
    return list(zip(tensor_cores(folder, dtype), *hopper(folder, dtype)))
