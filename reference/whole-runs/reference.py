"""The reference side of the comparison: diffusers + peft, the loop of diffusers' train_dreambooth_lora_sd3.py.

Differences from that script, each in the reference's favour or without effect on the result: latents and prompt embeddings
are computed once (the posterior is redrawn each step, as the script does), the LoRA is float32, captions belong to their
pictures (the published multi-prompt script pairs them wrongly once the data is shuffled).
"""

import json
import math
import pathlib

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file


def load_pipeline(model):
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        part.requires_grad_(False)
    return pipeline


def load_dataset(folder, resolution):
    """Pictures [N,3,R,R] in [-1,1] and captions, in the order of file names. Square pictures only: nothing is cropped."""
    folder = pathlib.Path(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: row["file_name"])
    pictures = []
    for row in rows:
        image = Image.open(folder / row["file_name"]).convert("RGB").resize((resolution, resolution), Image.BILINEAR)
        pictures.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures), [row["caption"] for row in rows]


@torch.no_grad()
def encode(pipeline, pictures, captions, max_sequence_length):
    posterior = pipeline.vae.encode(pictures).latent_dist
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=max_sequence_length)
    return posterior.mean, posterior.std, embeds, pooled


def to_latents(pipeline, z):
    config = pipeline.vae.config
    return (z - config.shift_factor) * config.scaling_factor


def flow_loss(pipeline, scheduler, latents, noise, index, embeds, pooled, scheme="logit_normal", precondition=True):
    sigma = scheduler.sigmas[index].float().view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    prediction = pipeline.transformer(hidden_states=noisy, timestep=scheduler.timesteps[index].float(), encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]
    target = latents if precondition else noise - latents
    prediction = prediction * -sigma + noisy if precondition else prediction
    weight = compute_loss_weighting_for_sd3(scheme, sigma)
    return (weight.float() * (prediction.float() - target.float()) ** 2).reshape(len(latents), -1).mean(1).mean()


@torch.no_grad()
def evaluation_loss(pipeline, mean, embeds, pooled, draws=8):
    """Plain velocity error on fixed noise and a stratified grid of timesteps; the same for every LoRA."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    generator = torch.Generator().manual_seed(20240710)
    latents = to_latents(pipeline, mean)
    total = 0.0
    for draw in range(draws):
        noise = torch.randn(latents.shape, generator=generator)
        index = torch.full((len(latents),), int((draw + 0.5) * 1000 / draws))
        total += flow_loss(pipeline, scheduler, latents, noise, index, embeds, pooled, precondition=False).item()
    return total / draws


def train(pipeline, data, out, *, seed, steps, batch, accumulation, learning_rate, rank, targets, schedule="linear", precondition=True, log=None):
    """Trains and writes out/pytorch_lora_weights.safetensors."""
    mean, std, embeds, pooled = data
    torch.manual_seed(seed)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    rate = get_scheduler(schedule, optimizer=optimizer, num_warmup_steps=0, num_training_steps=steps)
    step = 0
    for _ in range(math.ceil(steps / math.ceil(math.ceil(len(mean) / batch) / accumulation))):
        loader = torch.randperm(len(mean)).split(batch)
        for i, rows in enumerate(loader):
            latents = to_latents(pipeline, mean[rows] + std[rows] * torch.randn_like(mean[rows]))
            u = compute_density_for_timestep_sampling("logit_normal", len(rows), 0.0, 1.0, 1.29)
            index = (u * 1000).long().clamp(max=999)
            loss = flow_loss(pipeline, scheduler, latents, torch.randn_like(latents), index, embeds[rows], pooled[rows], precondition=precondition)
            (loss / accumulation).backward()
            if (i + 1) % accumulation == 0 or i + 1 == len(loader):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                step += 1
                if log and step % 50 == 0:
                    log(step, loss.item())
                if step >= steps:
                    break
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    state = {"transformer." + k: v.detach().contiguous() for k, v in get_peft_model_state_dict(pipeline.transformer).items()}
    save_file(state, out / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    pipeline.transformer.delete_adapters("default")
