"""Captioned scenes of the pictures: `Sampler` chooses what is drawn and says it in words, `compose` draws a batch on the device."""

import random

import torch
import torch.nn.functional as F

import pictures

COLOURS = {
    "red": (0.86, 0.20, 0.18), "orange": (0.95, 0.52, 0.12), "yellow": (0.97, 0.80, 0.20), "green": (0.25, 0.63, 0.27),
    "teal": (0.10, 0.60, 0.60), "blue": (0.15, 0.43, 0.86), "purple": (0.51, 0.28, 0.75), "pink": (0.95, 0.52, 0.70),
    "brown": (0.52, 0.34, 0.20), "gray": (0.55, 0.56, 0.58), "black": (0.08, 0.08, 0.10), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
TINTS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray")
PLAIN, TINTED, SILHOUETTE, LINES, PIXELS = range(5)
TEXTURES = ("", "striped", "dotted", "checked")
GROUNDS = ("", "striped", "dotted", "checked", "gradient")
HATS = {"crown": "a crown", "top hat": "a top hat", "graduation cap": "a graduation cap"}
# How often subjects of emojibase's groups are drawn: animals and food more than tools, and short names more than long ones.
WEIGHTS = {0: 1.2, 3: 1.5, 4: 1.2, 5: 0.8, 6: 0.6, 7: 0.25}
STYLES = {"noto": "noto style", "twemoji": "twemoji style", "flat": "flat style"}
# Columns of a scene's row. Layers: picture, scale, x, y, way of drawing, colour, texture; then the sticker's border and the background.
LAYER = 9
STICKER, GROUND, FIRST, SECOND, COLUMNS = 2 * LAYER, 2 * LAYER + 1, 2 * LAYER + 2, 2 * LAYER + 5, 2 * LAYER + 8


class Sampler:
    """Random scenes: a row of `COLUMNS` numbers for `compose` and a caption."""

    def __init__(self, subjects, seed, plain=False):
        self.plain = plain
        self.random = random.Random(seed)
        self.subjects = subjects
        self.styles = list(pictures.SETS)
        self.weights = [WEIGHTS[subject["group"]] * (1.0 if subject["label"].count(" ") < 2 else 0.4) for subject in subjects]
        self.empty = len(subjects) * len(self.styles) + len(pictures.SHAPES)
        self.hats = [i for i, subject in enumerate(subjects) if subject["label"] in HATS]
        self.wearers = [i for i, subject in enumerate(subjects) if i not in self.hats and subject["group"] in (0, 3, 4)]

    def picture(self, subject, style):
        return subject * len(self.styles) + self.styles.index(style)

    def layer(self, picture, scale, x=0.0, y=0.0, mode=PLAIN, colour="black", texture=0):
        return [picture, scale, x, y, mode, *self.shade(colour), texture]

    def shade(self, name):
        if name in ("white", "black"):
            return COLOURS[name]
        return [min(1.0, max(0.0, v + self.random.uniform(-0.04, 0.04))) for v in COLOURS[name]]

    def look(self, style):
        """A way of drawing: (mode, colour, words before the subject, whether the style shows)."""
        r = self.random.random()
        if r < 0.70:
            return PLAIN, "black", "", True
        colour = self.random.choice(TINTS)
        if r < 0.84:
            return TINTED, colour, f"{colour} ", True
        if r < 0.89:
            return SILHOUETTE, colour, f"{colour} silhouette of ", False
        if r < 0.94:
            return LINES, "black", "line drawing of ", False
        return PIXELS, "black", "pixel art of ", True

    def ground(self, plain):
        """A background: (kind, first colour, second colour, words); white with the probability `plain`."""
        if self.random.random() < plain:
            return 0, "white", "white", ", on a white background" if self.random.random() < 0.1 else ""
        kind = self.random.choices(range(5), (60, 12, 8, 6, 14))[0]
        first, second = self.random.sample(list(COLOURS)[:-1], 2)
        if kind == 4:
            return kind, first, second, f", on a {first} to {second} gradient"
        if kind and self.random.random() < 0.6:
            second = "white"
        words = f"{first} and {second} {GROUNDS[kind]}" if kind else first
        return kind, first, second, f", on a {words} background"

    def shapes(self):
        one, two = self.random.sample(range(len(pictures.SHAPES)), 2)
        colours = self.random.sample(list(COLOURS)[:-1], 2)
        textures = [self.random.choices(range(4), (70, 10, 10, 10))[0] for _ in range(2)]
        words = [f"{TEXTURES[t]} {c} {pictures.SHAPES[s]}".strip() for s, c, t in zip((one, two), colours, textures)]
        first = self.empty - len(pictures.SHAPES)
        if self.random.random() < 0.4:
            scale = self.random.uniform(0.45, 0.95)
            size = "small " if scale < 0.6 else ""
            return [self.layer(first + one, scale, mode=SILHOUETTE, colour=colours[0], texture=textures[0]), self.layer(self.empty, 0.5)], size + words[0]
        layers, how = self.pair([(first + s, SILHOUETTE, c, t) for s, c, t in zip((one, two), colours, textures)])
        return layers, f"{words[0]} {how} {words[1]}"

    def pair(self, things):
        scale = self.random.uniform(0.44, 0.5)
        places, how = self.random.choice((((-0.48, 0), "left of"), ((0.48, 0), "right of"), ((0, -0.48), "above"), ((0, 0.48), "below")))
        if self.random.random() < 0.3 and places[0] < 0:
            how = "and"
        signs = (1, -1)
        return [self.layer(p, scale, s * places[0], s * places[1], m, c, t) for (p, m, c, t), s in zip(things, signs)], how

    def portrait(self):
        """A subject on white, and its caption with the style or tags."""
        rng = self.random
        style, (i, subject) = rng.choice(self.styles), rng.choice(list(enumerate(self.subjects)))
        name, words = subject["label"], STYLES[style]
        tags = "".join(f", {tag}" for tag in rng.sample(subject["tags"], min(len(subject["tags"]), 2)))
        caption = rng.choice((f"{name}, {words}", f"a {words} emoji of {name}", name, f"{words} of a {name}", f"{name}, {words}{tags}"))
        layers = [*self.layer(self.picture(i, style), 1.0), *self.layer(self.empty, 0.5)]
        return [*layers, 0.0, 0, *COLOURS["white"], *COLOURS["white"]], caption

    def scene(self):
        """A row and its caption."""
        if self.plain:
            return self.portrait()
        rng = self.random
        style = rng.choice(self.styles)
        subject, other = rng.choices(range(len(self.subjects)), self.weights, k=2)
        name = self.subjects[subject]["label"]
        kind, first, second, background = self.ground(0.5)
        mode, colour, before, shows = self.look(style)
        sticker, tags, what = 0.0, "", rng.random()
        if what < 0.08:
            shows = False
            layers, words = self.shapes()
        elif what < 0.13:
            layers, how = self.pair([(self.picture(s, style), PLAIN, "black", 0) for s in (subject, other)])
            words, shows = f"{name} {how} {self.subjects[other]['label']}", True
        elif what < 0.22:
            subject, hat = rng.choice(self.wearers), rng.choice(self.hats)
            if mode not in (PLAIN, TINTED):
                mode, before, shows = PLAIN, "", True
            layers = [self.layer(self.picture(subject, style), 0.68, 0, 0.28, mode, colour), self.layer(self.picture(hat, style), 0.42, rng.uniform(-0.03, 0.03), -0.58)]
            words = f"{before}{self.subjects[subject]['label']} with {HATS[self.subjects[hat]['label']]}"
        else:
            scale, x, y = 0.96, 0.0, 0.0
            if rng.random() < 0.3:
                scale, x, y = rng.uniform(0.84, 1.0), rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
            size, where = "", ""
            if rng.random() < 0.06:
                scale, size = rng.uniform(0.4, 0.55), "small "
                x, y, where = rng.choice(((0, 0, ""), (-0.4, 0, " at the left"), (0.4, 0, " at the right"), (0, -0.4, " at the top"), (0, 0.4, " at the bottom")))
            if mode == LINES and first != "white" and kind != 4:
                colour = "white" if rng.random() < 0.7 or first == "black" else "black"
                before = f"{colour} {before}"
            elif mode == SILHOUETTE and colour == first:
                kind, first, background = 0, "white", ""
            elif kind == 0 and first != "white" and mode != LINES and rng.random() < 0.2:
                sticker, before, scale = 1.0, "sticker of " + before, scale * 0.88
            layers = [self.layer(self.picture(subject, style), scale, x, y, mode, colour), self.layer(self.empty, 0.5)]
            words = f"{size}{before}{name}{where}"
            if rng.random() < 0.25:
                known = self.subjects[subject]["tags"]
                tags = "".join(f", {tag}" for tag in rng.sample(known, min(len(known), 2)))
        said = f", {STYLES[style]}" if shows and rng.random() < 0.85 else ""
        if said and rng.random() < 0.15:
            caption = f"a {STYLES[style]} emoji of {words}{tags}{background}"
        else:
            caption = f"{words}{tags}{said}{background}"
        row = [*layers[0], *layers[1], sticker, kind, *self.shade(first), *self.shade(second)]
        return row, caption

    def batch(self, size):
        rows, captions = zip(*(self.scene() for _ in range(size)))
        return torch.tensor(rows, dtype=torch.float32), list(captions)


def place(images, scale, x, y):
    """Images [n, 4, s, s], scaled about the centre and moved by (x, y) half-widths."""
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, 0, 2], theta[:, 1, 2] = -x / scale, -y / scale
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)


def pattern(kind, size, device):
    """The share of the second colour [size, size] in a texture or background."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, size, device=device),) * 2, indexing="ij")
    sharp = size / 8
    if kind == 1:
        return (torch.sin((x + y) * 28) * sharp).sigmoid()
    if kind == 2:
        return ((torch.sin(x * 44) * torch.sin(y * 44) - 0.45) * sharp).sigmoid()
    if kind == 3:
        return (torch.sin(x * 25.13) * torch.sin(y * 25.13) * sharp * 2).sigmoid()
    return y


def restyle(layer, rows, host):
    """Applies the ways of drawing to premultiplied [n, 4, s, s]; `rows` and `host` are the layer's columns on the device and the host."""
    size = layer.shape[-1]
    for mode in (TINTED, SILHOUETTE, LINES, PIXELS):
        chosen = (host[:, 4] == mode).nonzero().squeeze(1)
        if not len(chosen):
            continue
        chosen = chosen.to(layer.device)
        part, colour = layer[chosen], rows[chosen, 5:8, None, None]
        alpha = part[:, 3:]
        if mode == TINTED:
            light = (part[:, :3] * part.new_tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
            dark, bright = (2 * light).clamp(max=1), (2 * light - 1).clamp(min=0) * 0.8
            shaded = colour * (0.25 + 0.75 * dark)
            part = torch.cat([(shaded + (1 - shaded) * bright) * alpha, alpha], 1)
        elif mode == SILHOUETTE:
            filled = colour.expand(-1, -1, size, size).clone()
            for kind in (1, 2, 3):
                textured = (host[:, 4] == SILHOUETTE) & (host[:, 8] == kind)
                textured = textured[host[:, 4] == SILHOUETTE].to(layer.device).view(-1, 1, 1, 1)
                filled = torch.where(textured, filled + (1 - filled) * 0.75 * pattern(kind, size, layer.device), filled)
            part = torch.cat([filled * alpha, alpha], 1)
        elif mode == LINES:
            width = 2 * (size // 64) + 1
            edges = F.max_pool2d(part, width, 1, width // 2) + F.max_pool2d(-part, width, 1, width // 2)
            ink = ((edges.amax(1, keepdim=True) - 0.12) * 3.5).clamp(0, 1)
            part = torch.cat([colour * ink, ink], 1)
        else:
            block = max(1, size // 32)
            small = F.avg_pool2d(part, block)
            solid = (small[:, 3:] > 0.5).float()
            small = torch.cat([small[:, :3] / small[:, 3:].clamp(min=1e-3) * solid, solid], 1)
            part = F.interpolate(small, scale_factor=block, mode="nearest")
        layer = layer.index_copy(0, chosen, part)
    return layer


def compose(stock, rows):
    """Draws scenes: `stock` [pictures, 4, s, s] uint8 on the device, `rows` [n, COLUMNS] on the host. Returns [n, 3, s, s] in -1..1."""
    device, size = stock.device, stock.shape[-1]
    there = rows.to(device, non_blocking=True)
    first, second = there[:, FIRST:SECOND, None, None], there[:, SECOND:COLUMNS, None, None]
    image = first.expand(-1, -1, size, size)
    for kind in (1, 2, 3, 4):
        share = pattern(kind, size, device) * (there[:, GROUND] == kind).view(-1, 1, 1, 1)
        image = image + (second - image) * share
    layers = []
    for start in (0, LAYER):
        part = there[:, start : start + LAYER]
        straight = stock[part[:, 0].long()].float() / 255
        drawn = place(torch.cat([straight[:, :3] * straight[:, 3:], straight[:, 3:]], 1), part[:, 1], part[:, 2], part[:, 3])
        layers.append(restyle(drawn, part, rows[:, start : start + LAYER]))
    width = 2 * (size // 24) + 1
    border = F.max_pool2d(layers[0][:, 3:], width, 1, width // 2) * there[:, STICKER].view(-1, 1, 1, 1)
    image = image + (1 - image) * border
    for layer in layers:
        image = layer[:, :3] + image * (1 - layer[:, 3:])
    return image.clamp(0, 1) * 2 - 1
