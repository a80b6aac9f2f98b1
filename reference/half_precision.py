"""The error of half precision at SD3-Medium's widths: PyTorch's own beside ours, per tensor, both against PyTorch in f32.

Usage, on a machine with a GPU, PyTorch and diffusers: half_precision.py FINETUNE_BINARY OUT_DIR [DRAWS]
Writes a case (three layers, head width 64, odd numbers of tokens, LoRA B not zero) per draw of random numbers (default 1), computes it in f32 without TF32, then as diffusers' training
script does: frozen weights in the half type, LoRA in f32, under autocast. PyTorch's errors become part of the case, by which
`finetune verify --precision bf16|fp16` judges ours; exit code 1 if one tensor's is more than 1.1 times PyTorch's.
"""
import json, math, os, re, subprocess, sys
import torch
from diffusers import SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
binary, out, draws = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1
CONFIGS = {
    "sd3-medium": dict(qk_norm=None, dual_attention_layers=()),
    "sd35-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0,)),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
RANK, BATCH, SIZE, TOKENS = 4, 2, (34, 26), 133


class Lora(torch.nn.Module):
    """peft's: base(x) + B(A(x)) with A and B in f32."""

    def __init__(self, base, a, b):
        super().__init__()
        self.base, self.a, self.b = base, torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        y = self.base(x)
        f = torch.nn.functional.linear
        return y + f(f(x.to(self.a.dtype), self.a), self.b).to(y.dtype)


def with_lora(m, values):
    names = [n for n, l in m.named_modules() if isinstance(l, torch.nn.Linear) and any(n.endswith("." + t) for t in TARGETS)]
    params = {}
    for n in names:
        parent = m.get_submodule(n.rsplit(".", 1)[0])
        base = getattr(parent, n.rsplit(".", 1)[1]) if not n.endswith(".0") else parent[0]
        layer = Lora(base, *values(n, base))
        if n.endswith(".0"):
            parent[0] = layer
        else:
            setattr(parent, n.rsplit(".", 1)[1], layer)
        params["transformer." + n + ".lora_A.weight"], params["transformer." + n + ".lora_B.weight"] = layer.a, layer.b
    return params


def error(got, want):
    norm = want.double().norm()
    return ((got.double() - want.double()).norm() / (norm if norm > 0 else 1)).item()


def cosine(got, want):
    return torch.nn.functional.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


failures = 0
for draw_number, (case, extra) in [(i, c) for i in range(draws) for c in CONFIGS.items()]:
    case = f"{case}-{draw_number}"
    d = os.path.join(out, case)
    torch.manual_seed(1 + 10 * draw_number)
    m = SD3Transformer2DModel(sample_size=128, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=24,
                              joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
                              pos_embed_max_size=64, **extra).float()
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.0 / math.sqrt(p[0].numel()))
            elif "norm_q" in n or "norm_k" in n or "norm_added" in n:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.1)
        for t in list(m.parameters()) + [b for b in m.buffers() if b.is_floating_point()]:
            t.copy_(t.half().float())
    m.requires_grad_(False)
    m.half().save_pretrained(os.path.join(d, "model/transformer"))
    m.float().cuda()
    generator = torch.Generator().manual_seed(2 + 10 * draw_number)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    factors = {}

    def values(n, base):
        if n not in factors:
            factors[n] = draw(RANK, base.in_features) / math.sqrt(base.in_features), draw(base.out_features, RANK) * 0.02
        return tuple(v.cuda() for v in factors[n])

    params = with_lora(m, values)
    x0, noise = draw(BATCH, 16, *SIZE), draw(BATCH, 16, *SIZE)
    index = torch.randint(0, 1000, (BATCH,), generator=generator)
    prompt, pooled = draw(BATCH, TOKENS, 4096), draw(BATCH, 2048)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    sigma, timestep = scheduler.sigmas[index].float().view(-1, 1, 1, 1), scheduler.timesteps[index].float()
    x_t = (1 - sigma) * x0 + sigma * noise

    def step(dtype, scale):
        for p in params.values():
            p.grad = None
        inputs = [t.cuda().to(dtype) for t in (x_t, prompt, pooled)]
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            v = m(hidden_states=inputs[0], timestep=timestep.cuda(), encoder_hidden_states=inputs[1], pooled_projections=inputs[2], return_dict=False)[0]
        loss = ((v.float() * -sigma.cuda() + x_t.cuda() - x0.cuda()) ** 2).reshape(BATCH, -1).mean(1).mean()
        (loss * scale).backward()
        result = {"velocity.0.0": v.detach().float().cpu(), "loss.0.0": loss.detach().reshape(1).cpu()}
        result.update({"grad.0." + n: (torch.zeros_like(p) if p.grad is None else p.grad / scale).float().cpu() for n, p in params.items()})
        return result

    want = step(torch.float32, 1.0)
    expected = dict(want)
    given = {n: p.detach().cpu().clone() for n, p in params.items()}
    norm = torch.sqrt(sum((want["grad.0." + n].double() ** 2).sum() for n in params)).float()
    expected["grad_norm.0"] = norm.reshape(1)
    twins = {n: torch.nn.Parameter(v.clone()) for n, v in given.items()}
    for n, p in twins.items():
        p.grad = want["grad.0." + n] * min(1.0, 1.0 / (norm.item() + 1e-6))
    torch.optim.AdamW(twins.values(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4).step()
    expected.update({"lora.0." + n: p.detach() for n, p in twins.items()})
    inputs = {"lora." + n: v for n, v in given.items()}
    inputs.update({"x0.0.0": x0, "noise.0.0": noise, "sigma_index.0.0": index, "prompt_embeds.0.0": prompt, "pooled.0.0": pooled})
    save_file({k: v.contiguous() for k, v in inputs.items()}, d + "/inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, d + "/expected.safetensors")
    settings = dict(kind="train", tolerance=2e-4, weighting_scheme="logit_normal", precondition_outputs=True, max_grad_norm=1.0,
                    gradient_accumulation_steps=1, optimizer_steps=1, lora=dict(rank=RANK, alpha=RANK, target_modules=TARGETS),
                    optimizer=dict(name="adamw", learning_rate=1e-4, betas=[0.9, 0.999], epsilon=1e-8, weight_decay=1e-4))
    json.dump(settings, open(d + "/case.json", "w"))

    frozen = [(t, t.data) for n, t in list(m.named_parameters()) + list(m.named_buffers()) if not n.endswith((".a", ".b"))]

    def ours(precision):
        text = subprocess.run([binary, "verify", d, "--device", "cuda", "--precision", precision], capture_output=True, text=True)
        rows = re.findall(r"^  (\S+)\s+(\S+)\s+\S+\s+(?:ok|FAILED|not judged)$", text.stdout, re.M)
        if not rows:
            print(text.stdout[-2000:], text.stderr[-2000:])
        return {n: float(e) for n, e in rows}

    exact = ours("fp32")
    print(f"{case} fp32: worst {max(exact.values(), default=math.inf):.2e} of {len(exact)} tensors")
    for dtype, name, scale in ((torch.bfloat16, "bf16", 1.0), (torch.float16, "fp16", 1024.0)):
        for t, data in frozen:
            t.data = data.to(dtype)
        got = step(dtype, scale)
        for t, data in frozen:
            t.data = data
        theirs = {n: error(got[n], want[n]) for n in want}
        settings.setdefault("half_precision", {})[name] = {n: e for n, e in theirs.items() if e > 0}
        json.dump(settings, open(d + "/case.json", "w"))
        mine = ours(name)
        ratios = {}
        for n in settings["half_precision"][name]:
            ratios[n] = (mine.get(n, math.inf) / theirs[n], mine.get(n, math.inf), theirs[n], cosine(got[n], want[n]))
        above = {n: r for n, r in ratios.items() if r[0] > 1.1}
        failures += len(above)
        mean = math.exp(sum(math.log(r[0]) for r in ratios.values()) / len(ratios))
        print(f"{case} {name}: {len(ratios)} tensors, geometric mean of ours / PyTorch's {mean:.3f}, above 1.1: {len(above)}")
        for n, r in sorted(ratios.items(), key=lambda r: -r[1][0])[:12 if draws == 1 else 3]:
            print(f"  {r[0]:.3f}  ours {r[1]:.2e}  PyTorch {r[2]:.2e}  its cosine {r[3]:.6f}  {n}")
sys.exit(1 if failures else 0)
