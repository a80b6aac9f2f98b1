"""Launches the attention kernels on PyTorch's tensors by the CUDA driver's own calls."""

import ctypes
import math

import torch

cuda = ctypes.CDLL("libcuda.so.1")


class Operand(ctypes.Structure):
    _fields_ = [("image", ctypes.c_void_p), ("context", ctypes.c_void_p), ("image_stride", ctypes.c_int64), ("context_stride", ctypes.c_int64)]


class Parameters(ctypes.Structure):
    """AttentionParameters of src/compute/src/kernels/cuda/attention.cuh."""

    OPERANDS = ["q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"]
    _fields_ = [(name, Operand) for name in OPERANDS] + [
        ("lse", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        *[(name, ctypes.c_int32) for name in ["heads", "head_dim", "image", "context", "queries"]],
        ("scale", ctypes.c_float),
    ]


def check(code, call):
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{call}: {text.value and text.value.decode()}")


class Module:
    """A loaded cubin, fatbin or PTX file."""

    def __init__(self, path):
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        data = open(path, "rb").read() + b"\0"
        self.handle = ctypes.c_void_p()
        check(cuda.cuModuleLoadData(ctypes.byref(self.handle), data), f"load {path}")
        self.functions = {}

    def function(self, name, shared):
        if name not in self.functions:
            f = ctypes.c_void_p()
            check(cuda.cuModuleGetFunction(ctypes.byref(f), self.handle, name.encode()), name)
            check(cuda.cuFuncSetAttribute(f, 8, shared), f"{name}: {shared} bytes of shared memory")
            self.functions[name] = f
        return self.functions[name]


class Kernel:
    """One entry point: its module and name, rows per block, threads, bytes of dynamic shared memory."""

    def __init__(self, module, name, rows, threads, shared):
        self.name, self.rows, self.threads, self.shared = name, rows, threads, shared
        self.f = module.function(name, shared)

    def launch(self, p, batch, tokens):
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(p))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid = math.ceil(tokens / self.rows), p.heads, batch
        check(cuda.cuLaunchKernel(self.f, *grid, self.threads, 1, 1, self.shared, stream, arguments, None), self.name)


class Problem:
    """One problem: operands drawn at random, in guarded memory, outputs full of NaN.

    `packed`: q, k and v of a stream stand side by side in one buffer [rows, 3 · width], as do their gradients.
    """

    def __init__(self, dtype, batch, heads, head_dim, image, context, context_queries=True, packed=False, spread=1.0, seed=0):
        self.dtype, self.batch, self.heads, self.head_dim = dtype, batch, heads, head_dim
        self.image, self.context, self.keys = image, context, image + context
        self.queries = self.keys if context_queries else image
        self.generator = torch.Generator("cuda").manual_seed(seed)
        width = heads * head_dim
        self.values = {}
        for group, names in {"in": ["q", "k", "v"], "d_in": ["d_q", "d_k", "d_v"]}.items():
            if packed:
                for stream, tokens in (("image", image), ("context", context)):
                    whole = self.guarded(batch * tokens, 3 * width)
                    for i, name in enumerate(names):
                        self.values[name, stream] = whole[:, i * width : (i + 1) * width]
            else:
                for name in names:
                    self.values[name, "image"] = self.guarded(batch * image, width)
                    self.values[name, "context"] = self.guarded(batch * context, width)
        for name in ["out", "d_out"]:
            self.values[name, "image"] = self.guarded(batch * image, width)
            self.values[name, "context"] = self.guarded(batch * context, width)
        for name in ["q", "k", "v", "d_out"]:
            scale = spread if name in "qk" else 1.0
            for stream in ["image", "context"]:
                if name in ["q", "d_out"] and stream == "context" and not context_queries:
                    continue
                x = self.values[name, stream]
                x.copy_(torch.randn(x.shape, device="cuda", generator=self.generator) * scale)
        self.lse = torch.full((batch, heads, self.keys), math.nan, device="cuda")
        self.rows = torch.full((batch, heads, self.keys, 2), math.nan, device="cuda")
        self.parameters = Parameters(
            *[
                Operand(
                    self.values[name, "image"].data_ptr(),
                    self.values[name, "context"].data_ptr() if context else None,
                    self.values[name, "image"].stride(0),
                    self.values[name, "context"].stride(0),
                )
                for name in Parameters.OPERANDS
            ],
            self.lse.data_ptr(),
            self.rows.data_ptr(),
            heads,
            head_dim,
            image,
            context,
            self.queries,
            1 / math.sqrt(head_dim),
        )

    def guarded(self, rows, width):
        """[rows, width] of NaN within a larger buffer of NaN."""
        guard = 64 * width
        whole = torch.full((rows * width + 2 * guard,), math.nan, device="cuda", dtype=self.dtype)
        return whole[guard : guard + rows * width].view(rows, width)

    def poison(self, names):
        for name in names:
            for stream in ["image", "context"]:
                self.values[name, stream].fill_(math.nan)

    def joint(self, name):
        """[batch, heads, tokens, head_dim]: all keys of k, v and their gradients, the queries of the others."""
        parts = [self.values[name, "image"].reshape(self.batch, self.image, self.heads, self.head_dim)]
        if self.context and (name in ["k", "v", "d_k", "d_v"] or self.queries > self.image):
            parts.append(self.values[name, "context"].reshape(self.batch, self.context, self.heads, self.head_dim))
        return torch.cat(parts, 1).transpose(1, 2)

    def forward(self, kernel):
        kernel.launch(self.parameters, self.batch, self.queries)

    def backward_q(self, kernel):
        kernel.launch(self.parameters, self.batch, self.queries)

    def backward_kv(self, kernel):
        kernel.launch(self.parameters, self.batch, self.keys)

    def reference(self, dtype=torch.float64):
        """out, lse, d_q, d_k, d_v of the same operands in `dtype`, by the formulae."""
        q, k, v, d_out = (self.joint(name).to(dtype) for name in ["q", "k", "v", "d_out"])
        scale = 1 / math.sqrt(self.head_dim)
        results = [torch.empty_like(q), torch.empty(q.shape[:3], device="cuda", dtype=dtype), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
        for b in range(self.batch):
            for h in range(self.heads):
                s = q[b, h] @ k[b, h].T * scale
                lse = s.logsumexp(1)
                probabilities = (s - lse[:, None]).exp()
                out = probabilities @ v[b, h]
                d_p = d_out[b, h] @ v[b, h].T
                d_s = probabilities * (d_p - (d_out[b, h] * out).sum(1, keepdim=True))
                for result, x in zip(results, [out, lse, d_s @ k[b, h] * scale, d_s.T @ q[b, h] * scale, probabilities.T @ d_out[b, h]]):
                    result[b, h] = x
        return dict(zip(["out", "lse", "d_q", "d_k", "d_v"], results))
