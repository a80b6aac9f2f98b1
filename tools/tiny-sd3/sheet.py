"""A contact sheet by diffusers' own pipeline.

    python sheet.py MODEL_DIR sheet.png RECIPE [GUIDANCE]
"""

import sys

import torch
from PIL import Image, ImageDraw, ImageFont

import networks

PROMPTS = (
    "red apple, noto style", "cat face, flat style", "rocket, noto style", "crab, twemoji style", "house, flat style", "rose, noto style", "owl, flat style", "hamburger, twemoji style",
    "mushroom, noto style", "tiger face, noto style", "automobile, flat style", "guitar, twemoji style", "teddy bear, noto style", "snowman, flat style", "grinning face, noto style", "crown, twemoji style",
    "blue cat face, noto style", "green rocket, flat style", "purple elephant, noto style", "dog face with a top hat, noto style", "frog with a crown, flat style", "bear with a crown, twemoji style", "orange dolphin, flat style", "pink castle, noto style",
    "rocket, noto style, on a blue background", "red apple, flat style, on a yellow background", "fox, noto style, on a green and white striped background", "white line drawing of a rocket, on a blue background",
    "line drawing of owl", "red silhouette of cat", "sticker of panda, flat style, on a purple background", "pixel art of mushroom, noto style",
    "red circle left of blue square", "striped green star, on a yellow background", "red apple and banana, noto style", "cat above house, flat style",
    "sunflower, noto style, on a blue to purple gradient", "small turtle at the left, noto style", "butterfly, twemoji style, on a black background", "deciduous tree",
)  # fmt: skip
PLAIN = 16  # The first prompts ask for nothing but a subject and a style.


def draw(pipeline, prompts, recipe, guidance, seed=0, steps=28):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance, height=recipe.size, width=recipe.size, max_sequence_length=recipe.t5_length, generator=generator
    ).images


def contact_sheet(images, captions, columns):
    """The pictures with their captions below, two lines each."""
    width, height = images[0].size
    font = ImageFont.load_default(size=11)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + 34)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * (width + 8) + 4, i // columns * (height + 34) + 4
        sheet.paste(image, (x, y))
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            if pen.textlength(longer, font=font) > width + 4 and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        pen.text((x, y + height + 1), "\n".join(lines[:2]), fill="black", font=font, spacing=1)
    return sheet


def main(model, out, recipe, guidance="4"):
    pipeline = networks.StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32)
    recipe = networks.RECIPES[recipe]
    prompts = PROMPTS[:PLAIN] if recipe.plain else PROMPTS
    contact_sheet(draw(pipeline, prompts, recipe, float(guidance)), prompts, 8).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
