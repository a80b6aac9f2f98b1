"""Which kernels are compared and timed, and how each is launched."""

import itertools
import os

from driver import Kernel, Module

MODULES = {}


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
    m = module(folder, "any.cubin")
    return [Kernel(m, f"attention_{part}_{dtype}_upto{upto}", rows, 256, shared) for part, shared in (("forward", forward), ("backward_q", backward), ("backward_kv", backward))]


FORWARD = [(2, 4, 64, 2), (2, 4, 32, 2), (2, 4, 32, 3), (1, 4, 64, 3), (1, 4, 64, 4), (1, 4, 128, 2), (1, 8, 64, 2), (2, 8, 64, 1), (2, 4, 128, 2)]
BACKWARD_Q = [(2, 4, 64, 32, 2), (2, 4, 64, 16, 2), (1, 4, 64, 64, 3), (1, 4, 64, 32, 4), (1, 8, 64, 32, 2), (2, 8, 64, 32, 1)]
BACKWARD_KV = [(1, 4, 64, 64, 2), (1, 4, 64, 32, 3), (2, 4, 64, 16, 2), (1, 8, 64, 32, 1), (1, 8, 64, 64, 1), (2, 8, 64, 16, 1), (1, 4, 32, 32, 2), (1, 4, 32, 32, 3)]


def forward_tile(m, name, mt, warps, keys, blocks):
    rows = 16 * mt * warps
    return Kernel(m, name, rows, 32 * warps, max(4 * keys, 2 * keys + rows) * 128)


def backward_q_tile(m, name, mt, warps, keys, step, blocks):
    rows = 16 * mt * warps
    return Kernel(m, name, rows, 32 * warps, max(2 * rows, 4 * keys) * 128)


def backward_kv_tile(m, name, mt, warps, queries, step, blocks):
    rows = 16 * mt * warps
    return Kernel(m, name, rows, 32 * warps, max(2 * queries * 264, 2 * rows * 128))


def tensor_core(folder, dtype):
    f, b = module(folder, "forward.cubin"), module(folder, "backward.cubin")
    return (
        [forward_tile(f, "attention_forward_%s_d64_m%dw%dk%db%d" % (dtype, *t), *t) for t in FORWARD],
        [backward_q_tile(b, "attention_backward_q_%s_d64_m%dw%dk%ds%db%d" % (dtype, *t), *t) for t in BACKWARD_Q],
        [backward_kv_tile(b, "attention_backward_kv_%s_d64_m%dw%dq%ds%db%d" % (dtype, *t), *t) for t in BACKWARD_KV],
    )


HOPPER = {
    "forward": [(2, 64, 4, 1), (2, 128, 3, 1), (3, 64, 4, 1)],
    "backward_q": [(2, 64, 4, 1), (3, 64, 4, 1)],
    "backward_kv": [(2, 64, 4, 1), (2, 64, 3, 1)],
}


def hopper(folder, dtype):
    m = module(folder, "hopper.cubin")
    return [
        [
            Kernel(m, "attention_%s_%s_d64_hopper_g%dk%ds%db%d" % (part, dtype, *t), 64 * t[0], 128 * (t[0] + 1), 1024 + t[2] * t[1] * 264 + 16 * t[2])
            for t in tiles
        ]
        for part, tiles in HOPPER.items()
    ]


def correctness(folder):
    """(dtype, head_dim, label, [(forward, backward_q, backward_kv)])"""
    for dtype in ["bf16", "f16"]:
        parts = tensor_core(folder, dtype)
        yield dtype, 64, "product", [tuple(p[0] for p in parts)]
        yield dtype, 64, "variants", [tuple(p[min(i, len(p) - 1)] for p in parts) for i in range(1, max(map(len, parts)))]
    for dtype in ["bf16", "f16"]:
        parts = hopper(folder, dtype)
        yield dtype, 64, "hopper", [tuple(p[min(i, len(p) - 1)] for p in parts) for i in range(max(map(len, parts)))]
    # sm_75's code, compiled by the driver for this card
    f, b = module(folder, "forward.75.ptx"), module(folder, "backward.75.ptx")
    yield "f16", 64, "sm_75", [
        (
            forward_tile(f, "attention_forward_f16_d64", *FORWARD[0]),
            backward_q_tile(b, "attention_backward_q_f16_d64", *BACKWARD_Q[0]),
            backward_kv_tile(b, "attention_backward_kv_f16_d64", *BACKWARD_KV[0]),
        )
    ]
    for head_dim in [8, 16, 32, 33, 64, 96, 128]:
        yield "f32", head_dim, "product", [tuple(plain(folder, "f32", head_dim))]
    for dtype, head_dim in itertools.product(["f16", "bf16"], [8, 32, 64, 80]):
        yield dtype, head_dim, "plain", [tuple(plain(folder, dtype, head_dim))]


def timed(folder, dtype):
    parts = tensor_core(folder, dtype)
    if dtype == "f16":
        parts = tuple(p[:1] for p in parts)
    return tuple(a + b for a, b in zip(parts, hopper(folder, dtype))) if os.environ.get("HOPPER") != "0" else parts
