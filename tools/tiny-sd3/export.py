"""Writes trained weights as a folder in diffusers' layout (f16).

    python export.py WEIGHTS_DIR TOKENIZERS MODEL_DIR RECIPE
"""

import json
import pathlib
import shutil
import sys

import networks

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def main(weights, tokenizers, out, recipe):
    out, recipe = pathlib.Path(out), networks.RECIPES[recipe]
    model = networks.Model(recipe, networks.Tokens(tokenizers, recipe))
    model.restore(weights)
    for part in networks.PARTS:
        getattr(model, part).half().save_pretrained(out / part)
    networks.FlowMatchEulerDiscreteScheduler(shift=networks.SHIFT).save_pretrained(out / "scheduler")
    for name in TOKENIZERS:
        shutil.copytree(pathlib.Path(tokenizers) / name, out / name, dirs_exist_ok=True)
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
    print(f"{sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
