"""Emoji of three sets with their names, from npm packages into one archive, and rendered with transparency.

    python pictures.py NODE_MODULES subjects.json.xz
"""

import concurrent.futures
import io
import json
import lzma
import pathlib
import random
import sys

import numpy as np
from PIL import Image, ImageDraw

SETS = {"noto": "@iconify-json/noto", "twemoji": "@iconify-json/twemoji", "flat": "@iconify-json/fluent-emoji-flat"}
# Groups of emojibase: animals and nature, food, travel, activities, objects; of the smileys a few subgroups only, as they are alike.
GROUPS = {3, 4, 5, 6, 7}
SMILEYS = {0, 2, 8, 11, 12, 13, 14}
ALIKE = ("o’clock", "-thirty", "oncoming", "moon", "globe showing", "card index", "hourglass not", "speaker", "heart with", "mail", "two-hump")
# Most words of a name by group, and what is drawn although its group has too few.
WORDS = {0: 2, 3: 2, 4: 2, 5: 1, 6: 1}
KEPT = {"crown", "top hat", "graduation cap", "guitar", "teddy bear", "glasses", "camera", "key", "candle", "fire engine"}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "hexagon", "ring", "cross", "crescent")


def slug(label):
    """The name that iconify gives to the emoji called `label`."""
    for old, new in {"’": "", "“": "", "”": "", ".": "", ":": "", ",": "", "!": "", "(": "", ")": "", "& ": "", "ñ": "n", "é": "e"}.items():
        label = label.replace(old, new)
    return label.lower().replace(" ", "-")


def wanted(emoji):
    known = emoji.get("group") in GROUPS or (emoji.get("group") == 0 and emoji.get("subgroup") in SMILEYS)
    return known and not any(part in emoji["label"] for part in ALIKE)


def pack(node_modules, path):
    """Writes the subjects that all three sets draw: label, tags, group and one SVG for each set."""
    icons = {name: json.loads((node_modules / package / "icons.json").read_text()) for name, package in SETS.items()}
    subjects = []
    for emoji in json.loads((node_modules / "emojibase-data/en/data.json").read_text()):
        if not wanted(emoji):
            continue
        drawings = {}
        for name, icon in icons.items():
            drawing = icon["icons"].get(slug(emoji["label"]))
            if drawing:
                box = [drawing.get(key, icon.get(key, 0)) for key in ("left", "top", "width", "height")]
                drawings[name] = {"box": box, "body": drawing["body"]}
        if len(drawings) == len(SETS):
            subjects.append({"label": emoji["label"].lower(), "tags": [tag.lower() for tag in emoji.get("tags", [])], "group": emoji["group"], "svg": drawings})
    path.write_bytes(lzma.compress(json.dumps(subjects).encode(), preset=9))
    print(f"{len(subjects)} subjects, {path.stat().st_size / 1e6:.1f} MB")


def load(path, count=None):
    """So many subjects, always the same; without a number those of short names."""
    subjects = json.loads(lzma.decompress(pathlib.Path(path).read_bytes()))
    if count is not None:
        return random.Random(0).sample(subjects, count)
    return [subject for subject in subjects if subject["label"] in KEPT or len(subject["label"].split()) <= WORDS.get(subject["group"], 0)]


def render(drawing, size):
    """An SVG as [size, size, 4] uint8, centred, with a margin of a thirtieth."""
    import resvg_py

    left, top, width, height = drawing["box"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{left} {top} {width} {height}" width="{2 * size}" height="{2 * size}">{drawing["body"]}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
    inner = size - 2 * (size // 30)
    factor = inner / max(image.size)
    image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas)


def shape(name, size):
    """A white shape as [size, size, 4] uint8."""
    big = 4 * size
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    centre, radius = big / 2, 0.45 * big

    def polygon(corners, inner=1.0, turn=-90.0):
        angles = np.radians(turn + np.arange(corners) * 360 / corners)
        lengths = radius * np.where(np.arange(corners) % 2, inner, 1.0)
        draw.polygon([(centre + r * np.cos(a), centre + r * np.sin(a)) for a, r in zip(angles, lengths)], fill=255)

    box = (centre - radius, centre - radius, centre + radius, centre + radius)
    if name in ("circle", "ring", "crescent"):
        draw.ellipse(box, fill=255)
        if name == "ring":
            draw.ellipse([v + d * radius * 0.45 for v, d in zip(box, (1, 1, -1, -1))], fill=0)
        if name == "crescent":
            draw.ellipse([v + d * radius for v, d in zip(box, (0.6, -0.1, 0.4, -0.1))], fill=0)
    elif name == "square":
        draw.rectangle([v + d * radius * 0.12 for v, d in zip(box, (1, 1, -1, -1))], fill=255)
    elif name == "triangle":
        polygon(3)
    elif name == "star":
        polygon(10, inner=0.42)
    elif name == "diamond":
        polygon(4, inner=0.7)
    elif name == "hexagon":
        polygon(6)
    elif name == "cross":
        third = radius / 3
        draw.rectangle((centre - third, box[1], centre + third, box[3]), fill=255)
        draw.rectangle((box[0], centre - third, box[2], centre + third), fill=255)
    else:
        t = np.linspace(0, 2 * np.pi, 200)
        xs, ys = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        draw.polygon([(centre + x * radius / 17, centre - (y + 2) * radius / 17) for x, y in zip(xs, ys)], fill=255)
    alpha = np.asarray(image.resize((size, size), Image.LANCZOS))
    return np.dstack([np.full((size, size, 3), 255, np.uint8), alpha])


def _render(job):
    return render(*job)


def render_all(subjects, size, workers):
    """All pictures [n, size, size, 4] uint8: each subject in each set, the shapes, and one empty picture at the end."""
    jobs = [(subject["svg"][name], size) for subject in subjects for name in SETS]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        rendered = list(pool.map(_render, jobs, chunksize=16))
    return np.stack([*rendered, *(shape(name, size) for name in SHAPES), np.zeros((size, size, 4), np.uint8)])


if __name__ == "__main__":
    pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
