"""Draws the quickstart's dataset: pictures of one character, each with its own caption, and held-out combinations.

    python make_dataset.py [BUCKET_DIR]

Writes datasets/robi/ (38 pictures to train on) and datasets/robi-held-out/ (16 combinations that training never sees),
each with a metadata.jsonl. Needs Pillow. The drawing is deterministic; the committed files were made by this script.
"""

import itertools
import json
import pathlib
import random
import sys

from PIL import Image, ImageDraw

SIZE = 256
COLOURS = {
    "red": (220, 50, 47),
    "blue": (38, 110, 220),
    "green": (60, 160, 60),
    "yellow": (245, 195, 40),
    "purple": (130, 70, 190),
    "orange": (240, 130, 30),
}
HATS = ["an antenna", "a top hat", "a crown"]
POSES = ["arms up", "arms down", "waving"]
DARK = (30, 30, 40)


def arm(draw, side, raised, colour):
    """One arm; `side` is -1 (left in the picture) or 1."""
    shoulder = (128 + side * 66, 176)
    hand = (128 + side * 106, 112) if raised else (128 + side * 104, 228)
    draw.line((shoulder, hand), fill=colour, width=22)
    draw.ellipse((hand[0] - 15, hand[1] - 15, hand[0] + 15, hand[1] + 15), fill=colour)


def robi(colour, hat, pose):
    """Robi the robot, 256 x 256, on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(image)
    light = COLOURS[colour]
    dark = tuple(int(v * 0.7) for v in light)
    arm(draw, -1, pose == "arms up", dark)
    arm(draw, 1, pose != "arms down", dark)
    draw.rounded_rectangle((62, 152, 194, 242), 24, fill=dark)
    draw.rounded_rectangle((52, 66, 204, 172), 34, fill=light)
    draw.rounded_rectangle((70, 86, 186, 152), 20, fill=(245, 248, 250))
    for x in (100, 156):
        draw.ellipse((x - 12, 100, x + 12, 124), fill=DARK)
    draw.arc((104, 112, 152, 144), 20, 160, fill=DARK, width=6)
    draw.ellipse((108, 182, 148, 222), fill=(250, 250, 250))
    if hat == "a top hat":
        draw.rectangle((78, 54, 178, 68), fill=(25, 25, 30))
        draw.rectangle((96, 4, 160, 56), fill=(25, 25, 30))
        draw.rectangle((96, 42, 160, 54), fill=(200, 40, 40))
    elif hat == "a crown":
        draw.polygon([(78, 68), (78, 14), (104, 42), (128, 8), (152, 42), (178, 14), (178, 68)], fill=(250, 200, 40), outline=(190, 140, 20))
    else:
        draw.line((128, 68, 128, 30), fill=dark, width=8)
        draw.ellipse((114, 6, 142, 34), fill=(220, 50, 47))
    return image


def write(folder, combinations):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for i, (colour, hat, pose) in enumerate(combinations):
            name = f"robi_{i:02d}.png"
            robi(colour, hat, pose).save(folder / name, optimize=True)
            metadata.write(json.dumps({"file_name": name, "caption": f"robi the robot, {colour}, {pose}, with {hat}"}) + "\n")


def main():
    bucket = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "bucket")
    combinations = list(itertools.product(COLOURS, HATS, POSES))
    random.Random(5).shuffle(combinations)
    write(bucket / "datasets/robi", combinations[:38])
    write(bucket / "datasets/robi-held-out", combinations[38:])


main()
