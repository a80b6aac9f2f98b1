"""Time of one training step in PyTorch (diffusers + peft, f32, CPU), the same work as benches/step.rs.

step_pytorch.py --model DIR [--steps N] [--threads 2] [--against BINARY]: prints one JSON line. With --against (the compiled
bench), both are measured alternately, `--rounds` times, and the last line holds the ratio of the medians.
"""
import argparse, json, os, statistics, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--size", type=int, default=8)
parser.add_argument("--tokens", type=int, default=93)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--against")
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()

if args.against:
    shape = [f"--{k}={getattr(args, k)}".split("=") for k in ("model", "steps", "batch", "size", "tokens", "rank")]
    shape = [x for pair in shape for x in pair]
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    medians = {"finetune": [], "pytorch": []}
    for _ in range(args.rounds):
        for command in ([args.against, *shape], [sys.executable, __file__, *shape, "--threads", str(args.threads)]):
            line = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            print(json.dumps(line), flush=True)
            medians[line["engine"]].append(line["median_ms"])
    ours, theirs = (statistics.median(medians[k]) for k in ("finetune", "pytorch"))
    print(json.dumps({"finetune_ms": ours, "pytorch_ms": theirs, "pytorch_over_finetune": theirs / ours}))
    sys.exit()

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig

torch.set_num_threads(args.threads)
torch.manual_seed(1)
model = SD3Transformer2DModel.from_pretrained(os.path.join(args.model, "transformer"), torch_dtype=torch.float32)
model.requires_grad_(False)
targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj"]
model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets))
model.train()
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(params, 1e-4, weight_decay=1e-4)
scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
c = model.config
latents = (args.batch, c.in_channels, args.size, args.size)
prompt = torch.randn(args.batch, args.tokens, c.joint_attention_dim)
pooled = torch.randn(args.batch, c.pooled_projection_dim)
times = []
for step in range(args.steps):
    x0, noise = torch.randn(latents), torch.randn(latents)
    started = time.perf_counter()
    index = torch.tensor([(37 * step + 101 * b) % 1000 for b in range(args.batch)])
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    v = model(hidden_states=x_t, timestep=scheduler.timesteps[index], encoder_hidden_states=prompt, pooled_projections=pooled, return_dict=False)[0]
    loss = ((v * -sigma + x_t - x0) ** 2).reshape(args.batch, -1).mean(1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append((time.perf_counter() - started) * 1e3)
first = times[0]
times.sort()
print(json.dumps({"engine": "pytorch", "median_ms": times[len(times) // 2], "best_ms": times[0], "first_ms": first, "steps": len(times),
                  "loss": loss.item(), "threads": torch.get_num_threads(), "torch": torch.__version__}))
