"""Reads a LoRA of this product with diffusers and peft, and checks what they make of it.

    python check_lora.py MODEL_DIR LORA_DIR CASE_DIR

LORA_DIR holds pytorch_lora_weights.safetensors and a kohya file (<job>.safetensors). Three checks:

1. diffusers loads the file through load_lora_weights, leaves no key over, and reads rank and alpha as they were trained.
2. Writes CASE_DIR in the format of tests/golden: velocity, loss and gradients of base + LoRA computed by diffusers.
   `finetune verify CASE_DIR` then compares this product's own model with them (tolerance 1e-4).
3. The kohya file, read as ComfyUI reads it (delta = alpha / rows(down) * up @ down on the fused module names of the original
   SD3 checkpoint), gives the same delta for every module.
"""

import json
import os
import pathlib
import re
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-4


def load(model, lora):
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.transformer.requires_grad_(False)
    pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name="trained")
    return pipeline


def check_keys(pipeline, lora):
    path = lora / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    loaded = {"transformer." + k: v for k, v in get_peft_model_state_dict(pipeline.transformer, adapter_name="trained").items()}
    assert set(loaded) == set(tensors), f"keys differ: {sorted(set(loaded) ^ set(tensors))[:5]}"
    for key, value in tensors.items():
        assert torch.equal(loaded[key].float(), value.float()), f"{key} changed while loading"
    config = pipeline.transformer.peft_config["trained"]
    with safe_open(path, "pt") as f:
        metadata = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    rank = metadata.get("transformer.r", next(v for k, v in tensors.items() if "lora_A" in k).shape[0])
    alpha = metadata.get("transformer.lora_alpha", rank)
    assert (config.r, config.lora_alpha) == (rank, alpha), f"diffusers reads r={config.r}, alpha={config.lora_alpha}; trained with {rank}, {alpha}"
    print(f"ok: diffusers loads {len(tensors)} tensors, rank {rank}, alpha {alpha}")
    return tensors, rank, alpha


def write_case(pipeline, model, tensors, rank, alpha, out):
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        os.symlink(model.resolve(), out / "model")
    transformer = pipeline.transformer
    named = [(n, p) for n, p in transformer.named_parameters() if "lora_" in n]
    for _, p in named:
        p.requires_grad_(True)
    config = transformer.config
    generator = torch.Generator().manual_seed(11)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    size = (2, config.in_channels, config.sample_size, config.sample_size)
    x0, noise = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    index = torch.tensor([200, 800])
    embeds = torch.randn(2, 93, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(2, config.pooled_projection_dim, generator=generator)
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * x0 + sigma * noise
    velocity = transformer(hidden_states=noisy, timestep=scheduler.timesteps[index], encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]
    loss = ((velocity * -sigma + noisy - x0) ** 2).reshape(2, -1).mean(1).mean()
    loss.backward()
    key = lambda n: "transformer." + n.replace(".trained", "")
    # This case is about reading a LoRA: a large epsilon keeps Adam from blowing up the rounding of gradients near zero.
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.999], "epsilon": 1e-3, "weight_decay": 1e-4}
    expected = {"velocity.0.0": velocity, "loss.0.0": loss.reshape(1)}
    expected.update({f"grad.0.{key(n)}": p.grad if p.grad is not None else torch.zeros_like(p) for n, p in named})
    parameters = [p for _, p in named]
    expected = {k: v.detach().clone().contiguous() for k, v in expected.items()}
    expected["grad_norm.0"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).detach().reshape(1)
    torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=1e-4).step()
    expected.update({f"lora.0.{key(n)}": p.detach().clone().contiguous() for n, p in named})
    inputs = {"lora." + k: v.float().contiguous() for k, v in tensors.items()}
    inputs |= {"x0.0.0": x0, "noise.0.0": noise, "sigma_index.0.0": index, "prompt_embeds.0.0": embeds, "pooled.0.0": pooled}
    save_file(inputs, out / "inputs.safetensors")
    save_file(expected, out / "expected.safetensors")
    targets = sorted({re.sub(r"^transformer\.transformer_blocks\.\d+\.", "", k.split(".lora_")[0]) for k in tensors})
    case = {
        "kind": "train",
        "tolerance": TOLERANCE,
        "weighting_scheme": "logit_normal",
        "precondition_outputs": True,
        "lora": {"rank": rank, "alpha": alpha, "target_modules": targets},
        "optimizer": optimizer,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1,
        "optimizer_steps": 1,
    }
    (out / "case.json").write_text(json.dumps(case, indent=1))
    print(f"ok: wrote {len(expected)} expected tensors to {out}")


def diffusers_deltas(tensors, rank, alpha):
    """Delta W by module path, as peft adds it."""
    modules = sorted({k.removeprefix("transformer.").split(".lora_")[0] for k in tensors})
    return {m: alpha / rank * tensors[f"transformer.{m}.lora_B.weight"].double() @ tensors[f"transformer.{m}.lora_A.weight"].double() for m in modules}


def comfy_deltas(path):
    """Delta W by kohya module name, as ComfyUI adds it (comfy/weight_adapter/lora.py: alpha / down.shape[0] * up @ down)."""
    tensors = load_file(path)
    deltas = {}
    for name in sorted({k.split(".")[0] for k in tensors}):
        up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
        deltas[name] = float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
    return deltas


def expected_comfy(deltas):
    """Fuses q, k, v as the original checkpoint does; untargeted parts are zero."""
    single = {"attn.to_out.0": "x_block_attn_proj", "attn.to_add_out": "context_block_attn_proj", "attn2.to_out.0": "x_block_attn2_proj",
              "ff.net.0.proj": "x_block_mlp_fc1", "ff.net.2": "x_block_mlp_fc2", "ff_context.net.0.proj": "context_block_mlp_fc1",
              "ff_context.net.2": "context_block_mlp_fc2", "norm1.linear": "x_block_adaLN_modulation_1", "norm1_context.linear": "context_block_adaLN_modulation_1"}
    fused = {"attn.to_q": ("x_block_attn_qkv", 0), "attn.to_k": ("x_block_attn_qkv", 1), "attn.to_v": ("x_block_attn_qkv", 2),
             "attn.add_q_proj": ("context_block_attn_qkv", 0), "attn.add_k_proj": ("context_block_attn_qkv", 1), "attn.add_v_proj": ("context_block_attn_qkv", 2),
             "attn2.to_q": ("x_block_attn2_qkv", 0), "attn2.to_k": ("x_block_attn2_qkv", 1), "attn2.to_v": ("x_block_attn2_qkv", 2)}
    result = {}
    for path, delta in deltas.items():
        block, module = re.match(r"transformer_blocks\.(\d+)\.(.*)", path).groups()
        prefix = f"lora_unet_joint_blocks_{block}_"
        if module in single:
            result[prefix + single[module]] = delta
        else:
            name, third = fused[module]
            whole = result.setdefault(prefix + name, torch.zeros(3 * delta.shape[0], delta.shape[1], dtype=torch.float64))
            whole[third * delta.shape[0]:(third + 1) * delta.shape[0]] = delta
    return result


def check_kohya(lora, deltas):
    files = [p for p in lora.glob("*.safetensors") if p.name != "pytorch_lora_weights.safetensors"]
    assert len(files) == 1, f"one kohya file expected in {lora}: {files}"
    got, want = comfy_deltas(files[0]), expected_comfy(deltas)
    assert set(got) == set(want), f"modules differ: {sorted(set(got) ^ set(want))[:5]}"
    for name, delta in want.items():
        error = (got[name] - delta).norm() / delta.norm().clamp(min=1e-30)
        assert error < 1e-6, f"{name}: relative error {error:.2e}"
    print(f"ok: the kohya file gives the same {len(want)} weight changes")


def main():
    model, lora, case = map(pathlib.Path, sys.argv[1:4])
    pipeline = load(model, lora)
    tensors, rank, alpha = check_keys(pipeline, lora)
    check_kohya(lora, diffusers_deltas(tensors, rank, alpha))
    write_case(pipeline, model, tensors, rank, alpha, case)


main()
