"""The MMDiT and the three text encoders together, by flow matching as Stable Diffusion 3."""

import math
import time

import torch
import torch.nn.functional as F

import networks
import scenes

RATE = 1e-3


def noise_levels(count, device):
    """σ of logit-normal times, shifted as the scheduler shifts them."""
    u = torch.sigmoid(torch.randn(count, device=device))
    return networks.SHIFT * u / (1 + (networks.SHIFT - 1) * u)


@torch.no_grad()
def bank(vae, stock, batches, count):
    """Latents [count, 16, s, s] f16 of so many scenes or a few more, and the tokens of their captions."""
    parts = []
    while sum(len(part[0]) for part in parts) < count:
        rows, *tokens = next(batches)
        with torch.autocast(stock.device.type, torch.bfloat16, enabled=stock.device.type == "cuda"):
            posterior = vae.encode(scenes.compose(stock, rows)).latent_dist
        latents = (posterior.sample().float() - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append([latents.half(), *(numbers.to(stock.device) for numbers in tokens)])
    return [torch.cat(values) for values in zip(*parts)]


def train(model, known, batch, end, rate, last, keep, log):
    """Trains on the bank `known` until the time `end`: warm-up, then half of the time at `rate`, then falling to `last` of it.

    Ends with the moving average of the weights, of which a step keeps the share `keep`.
    """
    device = known[0].device
    fast = device.type == "cuda"
    trained = [model.transformer, model.text_encoder, model.text_encoder_2, model.text_encoder_3]
    for part in trained:
        part.train().requires_grad_(True)
    compiled = list(model.transformer.transformer_blocks) if fast else []
    for part in compiled:
        part.compile(dynamic=False)
    weights = [weight for part in trained for weight in part.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, count, started, told, total = 0, 0, None, time.time(), torch.zeros((), device=device)
    while True:
        if step == 20:
            started = time.time()
        now = time.time()
        if now >= end:
            break
        share = (now - started) / (end - started) if started else 0.0
        falling = 1.0 if share < 0.5 else last + (1 - last) * (0.5 + 0.5 * math.cos(math.pi * (2 * share - 1)))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 300) * falling
        chosen = torch.randint(len(known[0]), (batch,), device=device)
        x, *tokens = (values[chosen] for values in known)
        x, tokens = x.float(), [numbers.long() for numbers in tokens]
        sigma, noise = noise_levels(len(x), device), torch.randn_like(x)
        level = sigma.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            text, pooled = model.encode(*tokens)
            velocity = model.transformer(
                hidden_states=(1 - level) * x + level * noise, timestep=1000 * sigma, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False
            )[0]
        loss = F.mse_loss(velocity.float(), noise - x)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(keep, (1 + step) / (10 + step)))
        total += loss.detach()
        step, count = step + 1, count + 1
        if step % 20 == 0 and time.time() - told > 8:
            log(f"mmdit {step}: loss {total.item() / count:.4f}")
            told, count = time.time(), 0
            total.zero_()
    log(f"mmdit: {step} steps")
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    for part in trained:
        part.eval().requires_grad_(False)
    for part in compiled:
        part._compiled_call_impl = None
