"""The autoencoder: L1 and gradient differences, a weak KL term, and latents that survive being halved in size."""

import math
import time

import torch
import torch.nn.functional as F

import scenes

KL = 5e-4
HALVED = 0.25
RATE = 2e-3


def gradient_difference(y, x):
    """Mean absolute difference of horizontal and vertical differences."""
    return sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))


def reconstruction(y, x):
    return (y - x).abs().mean() + gradient_difference(y, x) + gradient_difference(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))


def vary(x):
    """Mirrors half of the pictures and exchanges the colour channels of a third."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.3, x[:, torch.randperm(3, device=x.device)], x)


def train(model, stock, batches, end, log):
    """Trains `model.vae` until the time `end`, then sets its scale and shift."""
    vae, device = model.vae, stock.device
    fast = device.type == "cuda"
    if fast:
        vae.to(memory_format=torch.channels_last)
    # Compiling the two, and the decoder for two sizes, takes longer than it saves in a few minutes.
    encoder, decoder = vae.encoder, vae.decoder
    optimiser = torch.optim.AdamW(vae.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    step, started, told, sums = 0, None, time.time(), torch.zeros(3, device=device)
    count = 0
    while True:
        if step == 20:
            started = time.time()
        now = time.time()
        if now >= end:
            break
        share = (now - started) / (end - started) if started else 0.0
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6
        x = vary(scenes.compose(stock, next(batches)[0]))
        if fast:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            mean, spread = encoder(x).float().chunk(2, 1)
            spread = spread.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * spread) * torch.randn_like(mean)
            y = decoder(latents)
            halved = decoder(F.avg_pool2d(latents, 2))
        loss = reconstruction(y.float(), x) + HALVED * reconstruction(halved.float(), F.avg_pool2d(x, 2))
        kl = 0.5 * (mean.pow(2) + spread.exp() - 1 - spread).mean()
        optimiser.zero_grad()
        (loss + KL * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            sums += torch.stack([loss, kl, ((y.float() - x) ** 2).mean() / 4])
        step, count = step + 1, count + 1
        if step % 20 == 0 and time.time() - told > 8:
            mean_loss, mean_kl, error = (sums / count).tolist()
            log(f"vae {step}: loss {mean_loss:.4f}, kl {mean_kl:.3f}, psnr {-10 * math.log10(error):.2f} dB")
            told, count = time.time(), 0
            sums.zero_()
    vae.eval().requires_grad_(False)
    measure(vae, stock, batches, log)


@torch.no_grad()
def measure(vae, stock, batches, log):
    """Sets the latents' scale and shift to those of a thousand scenes or more."""
    means, errors = [], []
    while sum(map(len, means)) < 1024:
        x = scenes.compose(stock, next(batches)[0])
        posterior = vae.encode(x).latent_dist
        means.append(posterior.mean)
        errors.append(((vae.decode(posterior.mean).sample.clamp(-1, 1) - x) ** 2).mean((1, 2, 3)) / 4)
    latents, errors = torch.cat(means), torch.cat(errors)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
    spread = latents.std((0, 2, 3))
    log(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f} ({spread.min():.2f} to {spread.max():.2f} by channel), psnr {(-10 * errors.log10()).mean():.2f} dB")
