"""One measurement of PyTorch (diffusers and peft) in a process of its own: builds full-size SD3-Medium parts with random weights, prints "ready" on
standard output, waits for a line on standard input, measures, and prints one JSON line per figure. Called by `compare.py`.

The micro-step is what the article's training loop does: noise, interpolation, forward, the flow matching loss, backward; gradients accumulate.
"""
import json
import os
import statistics
import sys
import time
import traceback

import torch

TEXT_TOKENS = 154
GIB = 2.0**30
SD3_MEDIUM = dict(
    sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
    caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192,
)
SD3_VAE = dict(
    in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False,
    scaling_factor=1.5305, shift_factor=0.0609,
)
T5_XXL = dict(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
    relative_attention_max_distance=128, tie_word_embeddings=False,
)


def report(**figures):
    print(json.dumps(figures), flush=True)


def process_gib():
    """Device memory of this process as the driver counts it, the CUDA context included; None where the driver does not report it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
        mine = [p.usedGpuMemory for p in running if p.pid == os.getpid() and p.usedGpuMemory]
        return round(mine[0] / GIB, 3) if mine else None
    except Exception:
        return None


def measure(step, seconds=1.5, warm_up=2, least=5):
    """Median time of `step` in ms over back-to-back calls (device events between them), and the spread as (tenth, ninetieth) percentile."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    once = time.perf_counter() - begun
    times = max(least, min(100, int(seconds / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    each = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    memory = dict(
        allocated_gib=round(torch.cuda.max_memory_allocated() / GIB, 3), reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 3), process_gib=process_gib()
    )
    return dict(ms=round(statistics.median(each), 3), ms_p10=round(each[len(each) // 10], 3), ms_p90=round(each[len(each) * 9 // 10], 3), steps=times, **memory)


def device():
    return torch.device(os.environ.get("PEER_DEVICE", "cuda"))


def smaller(config, **small):
    """The full configuration, or with PEER_SMALL=1 one small enough to try this script without a GPU."""
    return {**config, **small} if os.environ.get("PEER_SMALL") else config


def transformer(checkpointing, lora_dtype, rank=4):
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device():
        model = SD3Transformer2DModel(**smaller(SD3_MEDIUM, num_layers=2))
    torch.set_default_dtype(torch.float32)
    model.to(device(), torch.bfloat16).requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    model.to(device())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(lora_dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    return model


def inputs(pixels, batch):
    torch.manual_seed(1)
    side = pixels // 8
    like = dict(device=device(), dtype=torch.bfloat16)
    return torch.randn(batch, 16, side, side, **like), torch.randn(batch, TEXT_TOKENS, 4096, **like), torch.randn(batch, 2048, **like)


def micro_step(model, latents, text, pooled, autocast):
    batch = latents.shape[0]

    def step(encode=None):
        x = latents if encode is None else encode()
        noise = torch.randn_like(x)
        sigma = torch.sigmoid(torch.randn(batch, device=x.device))
        s = sigma.to(x.dtype).view(-1, 1, 1, 1)
        noisy = (1 - s) * x + s * noise
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            predicted = model(hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]
        loss = torch.mean((predicted.float() - (noise - x).float()) ** 2)
        loss.backward()
        return loss

    return step


def graph_of(step):
    """`step` captured as one CUDA graph: what PyTorch could do at best if nobody's launches cost anything."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def training(wait, pixels, batch, mode="eager", checkpointing=False, article=False, sdpa=None, graph=False):
    lora_dtype = torch.float32 if article else torch.bfloat16
    about = dict(what="step", engine="pytorch", pixels=pixels, batch=batch, mode=mode, checkpointing=checkpointing, article=article, sdpa=sdpa or "default")
    compiled = mode != "eager"
    if not compiled:
        wait()
    if sdpa == "cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    model = transformer(checkpointing, lora_dtype)
    if mode == "regional":
        torch._dynamo.config.recompile_limit = 64
        model._repeated_blocks = ["JointTransformerBlock"]  # diffusers 0.42 names none for this model
        model.compile_repeated_blocks(dynamic=False)
    elif compiled:
        model.compile(mode=None if mode == "compile" else mode, dynamic=False)
    latents, text, pooled = inputs(pixels, batch)
    one = micro_step(model, latents, text, pooled, autocast=article)
    step = one
    if article:
        from diffusers import AutoencoderKL

        with device():
            vae = AutoencoderKL(**SD3_VAE).requires_grad_(False).eval()
        pictures = torch.rand(batch, 3, pixels, pixels, device=device()) * 2 - 1

        def encode():
            with torch.no_grad():
                sampled = vae.encode(pictures).latent_dist.sample()
            return ((sampled - SD3_VAE["shift_factor"]) * SD3_VAE["scaling_factor"]).to(torch.bfloat16)

        step = lambda: one(encode)  # noqa: E731
    if mode == "reduce-overhead":
        plain = step

        def step():
            torch.compiler.cudagraph_mark_step_begin()
            return plain()

    begun = time.perf_counter()
    if compiled:
        loss = step()
        step()
        about["compile_s"] = round(time.perf_counter() - begun, 1)
        wait()
    loss = step()
    assert torch.isfinite(loss), loss
    loss = None
    if device().type == "cpu":
        return report(**about)
    report(**about, **measure(step))
    if graph:
        model.zero_grad(set_to_none=False)
        report(**{**about, "mode": mode + "+graph"}, **measure(graph_of(step)))


def optimizer(wait, rank=4):
    wait()
    sys.path.insert(0, os.environ.get("BITSANDBYTES", ""))
    parameters = [p for p in transformer(False, torch.float32, rank).parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.randn_like(p)
    makers = dict(adamw=lambda: torch.optim.AdamW(parameters, lr=1e-4), adamw_fused=lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True))

    def eight():
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)

    makers["adamw8bit"] = eight
    for name, make in makers.items():
        try:
            made = make()

            def step(made=made):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                made.step()

            report(what="optimizer", engine="pytorch", mode=name, parameters=sum(p.numel() for p in parameters), **measure(step, seconds=0.5))
        except Exception as error:
            report(what="optimizer", engine="pytorch", mode=name, error=repr(error)[:300])


def vae(wait):
    wait()
    from diffusers import AutoencoderKL

    with device():
        made = AutoencoderKL(**SD3_VAE).requires_grad_(False).eval()
    for dtype, tf32, layout, batches in (
        (torch.bfloat16, True, torch.contiguous_format, (1, 4, 8)),
        (torch.bfloat16, True, torch.channels_last, (1, 4, 8)),
        (torch.float32, False, torch.contiguous_format, (1, 4)),
        (torch.float32, True, torch.contiguous_format, (4,)),
    ):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        model = made.to(dtype=dtype, memory_format=layout)
        for batch in batches:
            torch.cuda.empty_cache()
            pictures = (torch.rand(batch, 3, 512, 512, device=device()) * 2 - 1).to(dtype).contiguous(memory_format=layout)
            with torch.no_grad():
                got = measure(lambda: model.encode(pictures).latent_dist.mean, seconds=0.5)
            report(
                what="vae_encode", engine="pytorch", pixels=512, batch=batch, dtype=str(dtype).removeprefix("torch."), tf32=tf32,
                layout=str(layout).removeprefix("torch."), per_s=round(1000 * batch / got["ms"], 1), **got,
            )
    model = made.to(dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    latent = torch.randn(1, 16, 64, 64, device=device(), dtype=torch.bfloat16)
    with torch.no_grad():
        report(what="vae_decode", engine="pytorch", pixels=512, batch=1, dtype="bfloat16", **measure(lambda: model.decode(latent).sample, seconds=0.3))


def t5(wait):
    wait()
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**smaller(T5_XXL, num_layers=2, num_decoder_layers=2)))
    model = model.to(torch.bfloat16).to_empty(device=device()).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    for batch in (1, 8, 32, 64, 128):
        tokens = torch.randint(0, 32128, (batch, 77), device=device())
        with torch.no_grad():
            got = measure(lambda: model(tokens)[0], seconds=0.5)
        report(what="t5_encode", engine="pytorch", tokens=77, batch=batch, dtype="bfloat16", per_s=round(1000 * batch / got["ms"], 1), **got)


def main():
    request = json.loads(sys.argv[1])
    waited = []

    def wait():
        if not waited:
            print("ready", flush=True)
            sys.stdin.readline()
            waited.append(True)

    if request["what"] == "step":
        import diffusers  # noqa: F401
        import peft  # noqa: F401
    elif request["what"] == "t5":
        import transformers  # noqa: F401
    try:
        {"step": training, "optimizer": optimizer, "vae": vae, "t5": t5}[request.pop("what")](wait, **request)
    except Exception as error:
        traceback.print_exc()
        wait()
        report(what="failed", request=json.loads(sys.argv[1]), error=repr(error)[:500])


main()
