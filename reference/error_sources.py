"""Which rounding makes the error of half precision? Stable Diffusion 3 at its width (three blocks, random weights), forward and backward in f32, with
values rounded to bf16 at one place at a time, and at all places but one.

Usage, on a machine with a GPU and PyTorch: error_sources.py [DRAWS]
Prints, per place, the relative error against f32: root mean square over LoRA's gradients and the draws.
"""
import math
import sys

import torch
import torch.nn.functional as F

torch.backends.cuda.matmul.allow_tf32 = False
WIDTH, HEADS, BLOCKS, RANK, BATCH, PICTURE, TOKENS = 1536, 24, 3, 4, 2, (17, 13), 133
# What a sample's tokens share, and the layers that make it.
SHARED = ("t1", "t2", "p1", "p2", "n1", "n1c", "no")
PLACES = {
    "weights: embedders of timestep and pooled prompt": {"w.embedder"},
    "weights: modulations": {"w.modulation"},
    "weights: attention and feed-forward": {"w.block"},
    "weights: input and output projections": {"w.ends"},
    "weights: LoRA": {"w.lora"},
    "biases": {"w.bias", "w.bias.shared"},
    "inputs": {"in.f"},
    "modulations and embeddings": {"vec.f"},
    "residual stream": {"stream.f"},
    "normalised inputs": {"mod.f", "normal.f"},
    "queries, keys, values": {"qkv.f"},
    "attention: probabilities, output": {"P.f", "o.f"},
    "feed-forward inside": {"ff.f"},
    "branches before their gate": {"y.f"},
    "velocity": {"v.f"},
    "LoRA's inner products": {"t.f", "t.b"},
    "gradients: residual stream": {"stream.b"},
    "gradients: queries, keys, values": {"qkv.b"},
    "gradients: attention's scores, probabilities, row sums": {"dS", "P.b", "D"},
    "gradients: the others": {"mod.b", "normal.b", "o.b", "y.b", "ff.b", "v.b"},
}
EVERYWHERE = set().union(*PLACES.values())
# As the trainer computes on a GPU: what is shared in f32.
OURS = EVERYWHERE - {"w.embedder", "w.modulation", "w.bias.shared", "vec.f"}
on = set()


def half(x):
    return x.bfloat16().float()


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return half(x) if place + ".f" in on else x.clone()

    @staticmethod
    def backward(ctx, g):
        return (half(g) if ctx.place + ".b" in on else g), None


class Attention(torch.autograd.Function):
    """As flash attention: probabilities rounded before the product, row sums of dO · O from the rounded O."""

    @staticmethod
    def forward(ctx, q, k, v):
        s = q @ k.transpose(-1, -2) * 0.125
        e = torch.exp(s - s.max(-1, keepdim=True).values)
        total = e.sum(-1, keepdim=True)
        o = (half(e) if "P.f" in on else e) @ v / total
        ctx.save_for_backward(q, k, v, e / total, o)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, p, o = ctx.saved_tensors
        dp = do @ v.transpose(-1, -2)
        d = (do * (half(o) if "D" in on else o)).sum(-1, keepdim=True)
        ds = p * (dp - d)
        ds, p = (half(ds) if "dS" in on else ds), (half(p) if "P.b" in on else p)
        return ds @ k * 0.125, ds.transpose(-1, -2) @ q * 0.125, p.transpose(-1, -2) @ do


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    weights, lora = {}, {}

    def linear(name, outputs, inputs):
        weights[name + ".w"], weights[name + ".b"] = draw(outputs, inputs) / math.sqrt(inputs), draw(outputs) * 0.1

    for name, inputs in (("patch", 64), ("ctx", 4096), ("t1", 256), ("t2", WIDTH), ("p1", 2048), ("p2", WIDTH)):
        linear(name, WIDTH, inputs)
    for i in range(BLOCKS):
        last = i == BLOCKS - 1
        linear(f"{i}.n1", 6 * WIDTH, WIDTH)
        linear(f"{i}.n1c", (2 if last else 6) * WIDTH, WIDTH)
        for name in ["q", "k", "v", "o", "cq", "ck", "cv"] + ([] if last else ["co"]):
            linear(f"{i}.{name}", WIDTH, WIDTH)
            lora[f"{i}.{name}.A"], lora[f"{i}.{name}.B"] = draw(RANK, WIDTH) / math.sqrt(WIDTH), draw(WIDTH, RANK) * 0.02
        for name in ["f"] if last else ["f", "g"]:
            linear(f"{i}.{name}1", 4 * WIDTH, WIDTH)
            linear(f"{i}.{name}2", WIDTH, 4 * WIDTH)
    linear("no", 2 * WIDTH, WIDTH)
    linear("po", 64, WIDTH)
    n = PICTURE[0] * PICTURE[1]
    inputs = dict(x0=draw(BATCH, n, 64), noise=draw(BATCH, n, 64), prompt=draw(BATCH, TOKENS, 4096), pooled=draw(BATCH, 2048), features=draw(BATCH, 256))
    inputs.update(positions=draw(1, n, WIDTH) * 0.5, sigma=torch.rand(BATCH, 1, 1, generator=generator))
    # As a file of f16 has them.
    return [{k: v.half().float().cuda() for k, v in d.items()} for d in (weights, lora, inputs)]


def place_of(name):
    layer, shared = name.split(".")[-2], name.split(".")[-2] in SHARED
    if name.endswith(".b"):
        return "w.bias.shared" if shared else "w.bias"
    if shared:
        return "w.modulation" if layer.startswith("n") else "w.embedder"
    return "w.ends" if layer in ("patch", "ctx", "po") else "w.block"


def gradients(weights, lora, inputs):
    weights = {k: half(v) if place_of(k) in on else v for k, v in weights.items()}
    parameters = {k: v.clone().requires_grad_() for k, v in lora.items()}
    factors = {k: half(v.detach()) + (v - v.detach()) if "w.lora" in on else v for k, v in parameters.items()}
    r = Round.apply

    def linear(name, x, place):
        y = F.linear(x, weights[name + ".w"], weights[name + ".b"])
        if name + ".A" in factors:
            y = y + F.linear(r(F.linear(x, factors[name + ".A"]), "t"), factors[name + ".B"])
        return r(y, place)

    def modulate(x, shift, scale, place="mod"):
        return r(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None], place)

    def feed_forward(x, up, down):
        return linear(down, r(F.gelu(linear(up, x, "ff"), approximate="tanh"), "ff"), "y")

    def add(x, gate, y):
        return r(x + gate[:, None] * y, "stream")

    sigma = inputs["sigma"]
    noisy = (1 - sigma) * inputs["x0"] + sigma * inputs["noise"]
    x = r(linear("patch", r(noisy, "in"), "exact") + inputs["positions"], "stream")
    c = linear("ctx", r(inputs["prompt"], "in"), "stream")
    embed = lambda value, a, b: linear(b, r(F.silu(linear(a, r(value, "vec"), "vec")), "vec"), "vec")
    shared = r(F.silu(r(embed(inputs["features"], "t1", "t2") + embed(inputs["pooled"], "p1", "p2"), "vec")), "vec")
    for i in range(BLOCKS):
        last = i == BLOCKS - 1
        m, mc = linear(f"{i}.n1", shared, "vec").chunk(6, 1), linear(f"{i}.n1c", shared, "vec").chunk(2 if last else 6, 1)
        xn, cn = modulate(x, m[0], m[1]), modulate(c, mc[1], mc[0]) if last else modulate(c, mc[0], mc[1])
        both = lambda name: torch.cat([linear(f"{i}.{name}", xn, "qkv"), linear(f"{i}.c{name}", cn, "qkv")], 1)
        q, k, v = (both(name).view(BATCH, -1, HEADS, 64).transpose(1, 2) for name in "qkv")
        o = r(Attention.apply(q, k, v).transpose(1, 2).reshape(BATCH, -1, WIDTH), "o")
        n = x.shape[1]
        x = add(x, m[2], linear(f"{i}.o", o[:, :n], "y"))
        x = add(x, m[5], feed_forward(modulate(x, m[3], m[4]), f"{i}.f1", f"{i}.f2"))
        if not last:
            c = add(c, mc[2], linear(f"{i}.co", o[:, n:], "y"))
            c = add(c, mc[5], feed_forward(modulate(c, mc[3], mc[4]), f"{i}.g1", f"{i}.g2"))
    scale, shift = linear("no", shared, "vec").chunk(2, 1)
    velocity = linear("po", modulate(x, shift, scale, "normal"), "v")
    ((velocity * -sigma + noisy - inputs["x0"]) ** 2).mean().backward()
    # The last block's context asks nothing.
    return {k: p.grad for k, p in parameters.items() if not k.startswith(f"{BLOCKS - 1}.cq")}


draws = [make(seed) for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4)]
exact = [gradients(*draw) for draw in draws]


def errors(places):
    on.clear()
    on.update(places)
    each = [{k: ((g - want[k]).norm() / want[k].norm()).item() for k, g in gradients(*draw).items()} for draw, want in zip(draws, exact)]
    on.clear()
    return {k: math.sqrt(sum(e[k] ** 2 for e in each) / len(each)) for k in each[0]}


def mean(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


everywhere = errors(EVERYWHERE)
print(f"everywhere: {mean(everywhere.values()):.2e}")
print(f"everywhere but in what tokens share: {mean(errors(OURS).values()):.2e}")
for name, found in sorted(((name, errors(places)) for name, places in PLACES.items()), key=lambda row: -mean(row[1].values())):
    print(f"{mean(found.values()):.2e}  {name}")
