"""Makes single-file/: models in Stability AI's own file layout, whose tensors diffusers itself converts back to those of the folders they were made of.

    pip install -r requirements.txt && python make_single_file.py single-file
"""

import pathlib
import sys

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
MICRO = HERE.parent / "fixtures" / "micro-sd3"
SD35 = HERE / "cases" / "train-sd35-nonsquare" / "model"
STREAMS = {"x": ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"), "context": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")}
EMBEDDERS = {"time_text_embed.timestep_embedder": "t_embedder", "time_text_embed.text_embedder": "y_embedder"}


def transformer(folder):
    """Tensors as in `sd3_medium.safetensors`; names as in Stability AI's sd3.5 repository, `mmditx.py`."""
    own = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    new = {"pos_embed": own["pos_embed.pos_embed"]}
    blocks = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("transformer_blocks."))

    def swapped(name):
        scale, shift = own[name].chunk(2, dim=0)
        return torch.cat([shift, scale], dim=0)

    for end in ("weight", "bias"):
        new[f"x_embedder.proj.{end}"] = own[f"pos_embed.proj.{end}"]
        new[f"context_embedder.{end}"] = own[f"context_embedder.{end}"]
        new[f"final_layer.linear.{end}"] = own[f"proj_out.{end}"]
        new[f"final_layer.adaLN_modulation.1.{end}"] = swapped(f"norm_out.linear.{end}")
        for today, old in EMBEDDERS.items():
            new[f"{old}.mlp.0.{end}"], new[f"{old}.mlp.2.{end}"] = own[f"{today}.linear_1.{end}"], own[f"{today}.linear_2.{end}"]
        for block in range(blocks):
            here, last = f"transformer_blocks.{block}.", block + 1 == blocks
            for stream, (q, k, v, out, norm_q, norm_k) in STREAMS.items():
                there = f"joint_blocks.{block}.{stream}_block."
                for attention in ("attn", "attn2") if stream == "x" else ("attn",):
                    if f"{here}{attention}.{q}.{end}" not in own:
                        continue
                    new[f"{there}{attention}.qkv.{end}"] = torch.cat([own[f"{here}{attention}.{part}.{end}"] for part in (q, k, v)], dim=0)
                    if f"{here}{attention}.{out}.{end}" in own:
                        new[f"{there}{attention}.proj.{end}"] = own[f"{here}{attention}.{out}.{end}"]
                    for today, old in ((norm_q, "ln_q"), (norm_k, "ln_k")):
                        if f"{here}{attention}.{today}.{end}" in own:
                            new[f"{there}{attention}.{old}.{end}"] = own[f"{here}{attention}.{today}.{end}"]
                norm = "norm1" if stream == "x" else "norm1_context"
                name = f"{here}{norm}.linear.{end}"
                new[f"{there}adaLN_modulation.1.{end}"] = swapped(name) if stream == "context" and last else own[name]
                ff = "ff" if stream == "x" else "ff_context"
                if f"{here}{ff}.net.2.{end}" in own:
                    new[f"{there}mlp.fc1.{end}"], new[f"{there}mlp.fc2.{end}"] = own[f"{here}{ff}.net.0.proj.{end}"], own[f"{here}{ff}.net.2.{end}"]
    back = convert_sd3_transformer_checkpoint_to_diffusers({f"model.diffusion_model.{name}": tensor for name, tensor in new.items()})
    compare(own, back)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in new.items()}


def vae(folder, levels=4):
    """Tensors as in Stability AI's autoencoder (`first_stage_model.`): matrices of the attention are convolutions of one pixel."""
    own = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    new = {}
    for name, tensor in own.items():
        old = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for i in range(levels):
            old = old.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.").replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
            j = levels - 1 - i
            old = old.replace(f"up_blocks.{i}.resnets.", f"up.{j}.block.").replace(f"up_blocks.{i}.upsamplers.0.", f"up.{j}.upsample.")
        old = old.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
        if "mid_block.attentions.0." in old:
            old = old.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm").replace("to_out.0", "proj_out")
            old = old.replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        new[f"first_stage_model.{old}"] = tensor
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    compare(own, convert_ldm_vae_checkpoint(dict(new), kinds))
    return new


def encoders(folder):
    new = {}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        own = load_file(folder / part / "model.safetensors")
        if name == "clip_l":
            # Such files have none; diffusers puts the identity in its place.
            del own["text_projection.weight"]
        prefix = f"text_encoders.{name}.transformer."
        these = {f"{prefix}{key}": tensor for key, tensor in own.items()}
        compare(own, convert_sd3_t5_checkpoint_to_diffusers(these) if name == "t5xxl" else convert_ldm_clip_checkpoint(these, prefix))
        new |= these
    return new


def compare(own, back):
    assert sorted(own) == sorted(back), sorted(set(own) ^ set(back))
    for name, tensor in own.items():
        assert tensor.dtype == back[name].dtype and tensor.shape == back[name].shape and (tensor == back[name]).all(), name


def main(out):
    out = pathlib.Path(out)
    out.mkdir(exist_ok=True)
    for name, tensors in (("sd3_micro_incl_all", transformer(MICRO) | vae(MICRO) | encoders(MICRO)), ("sd3.5_micro", transformer(SD35))):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
