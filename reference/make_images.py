"""Pictures and what Pillow and the reference's transforms make of them.

Writes into tests/golden/images the pictures, expected.json (digest of the upright RGB bytes, transforms) and expected.safetensors
(u8 [R,R,3] after resize, flip and crop). The versions that made them are in expected.json.

    pip install -r requirements.txt && python make_images.py

Photographs: "astronaut" (NASA, public domain), "chelsea" (Stefan van der Walt, CC0), "coffee" (Pikolo Espresso Bar, Rachel
Michetti, CC0), "rocket" (SpaceX, CC0), all as scikit-image ships them, reduced.
"""

import hashlib
import json
import os
import random
import struct
import zlib

import numpy as np
import PIL
import skimage
from PIL import Image, ImageOps, PngImagePlugin, features
from safetensors.numpy import save_file

ENDINGS = (".jpg", ".png", ".webp", ".bmp", ".gif", ".tif")
HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "golden", "images")
PHOTOS = os.path.join(os.path.dirname(skimage.__file__), "data")


def photo(name, size):
    return Image.open(os.path.join(PHOTOS, name)).convert("RGB").resize(size, Image.LANCZOS)


def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e


def xmp(orientation):
    return (f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
            f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>').encode()


def png16(path, array):
    """A 16-bit PNG (Pillow writes grey ones only)."""
    h, w, c = array.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    head = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    open(path, "wb").write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def resampled(source, name, sampling, size):
    """Reads the same coded blocks as another layout: a valid file with sampling factors that Pillow cannot write."""
    data = bytearray(open(os.path.join(HERE, source), "rb").read())
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", size[1], size[0])
    data[at + 11] = sampling
    open(os.path.join(HERE, name), "wb").write(data)


def in_text(exif_bytes):
    """EXIF as ImageMagick keeps it in a text chunk: name, length and hexadecimal digits."""
    digits = exif_bytes.hex()
    lines = [digits[i:i + 72] for i in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(exif_bytes):8}", *lines, ""])


def text_profiles(picture):
    text = in_text(exif(6).tobytes())
    for name, packed in (("profile-in-text.png", False), ("profile-in-packed-text.png", True)):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", text, zip=packed)
        picture.save(os.path.join(HERE, name), pnginfo=info)
    info = PngImagePlugin.PngInfo()
    info.add(b"tEXt", b"Raw profile type exif\0" + text.encode("latin-1"), after_idat=True)
    picture.save(os.path.join(HERE, "profile-in-text-at-the-end.png"), pnginfo=info)


def without_tables(source, name):
    """Drops the Huffman tables, as motion JPEG does: the standard's are meant."""
    data = open(os.path.join(HERE, source), "rb").read()
    at, out = 2, data[:2]
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
        out += b"" if data[at + 1] == 0xC4 else data[at:end]
        at = end
    open(os.path.join(HERE, name), "wb").write(out + data[at:])


def bmp(name, size, bits, palette, rows, compression=0, masks=b""):
    """A BMP file of a kind that Pillow cannot write."""
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in rows) if compression in (0, 3) else b"".join(rows)
    offset = 54 + len(masks) + len(palette)
    head = struct.pack("<2sIHHI", b"BM", offset + len(body), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(body), 2835, 2835, len(palette) // 4, 0)
    open(os.path.join(HERE, name), "wb").write(head + info + masks + palette + body)


def other_formats(cat, cup, woman):
    """BMP, GIF and TIFF; of animations and documents the first picture counts. What is in refused/ would get other bytes than Pillow's."""
    os.makedirs(os.path.join(HERE, "refused"), exist_ok=True)
    save = lambda im, name, **kw: im.save(os.path.join(HERE, name), **kw)
    small = cat.resize((37, 25))
    save(small, "rgb.bmp")
    save(small.quantize(60), "palette.bmp")
    save(small.convert("L"), "grey.bmp")
    save(small.convert("1"), "one-bit.bmp")
    alpha = small.copy(); alpha.putalpha(Image.linear_gradient("L").resize(small.size))
    save(alpha, "alpha.bmp")
    rng = np.random.default_rng(3)
    bmp("refused/555.bmp", (13, 9), 16, b"", [rng.integers(0, 1 << 15, 13, dtype="<u2").tobytes() for _ in range(9)])
    bmp("refused/565.bmp", (13, 9), 16, b"", [rng.integers(0, 1 << 16, 13, dtype="<u2").tobytes() for _ in range(9)], 3, struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    bmp("top-down.bmp", (13, -9), 24, b"", [rng.integers(0, 256, 39, dtype="u1").tobytes() for _ in range(9)])
    grey = b"".join(bytes([i, i // 2, 255 - i, 0]) for i in range(256))
    bmp("rle8.bmp", (12, 4), 8, grey, [bytes([12, 9 * (r + 1), 0, 0]) for r in range(3)] + [bytes([0, 5, 1, 2, 3, 4, 5, 0, 7, 200, 0, 1])], 1)
    save(small.quantize(50), "palette.gif")
    transparent = small.quantize(20)
    save(transparent, "transparent.gif", transparency=4)
    frames = [im.resize((41, 27)).quantize(30) for im in (cat, cup, woman)]
    frames[0].save(os.path.join(HERE, "animation.gif"), save_all=True, append_images=frames[1:], duration=80, loop=0)
    for name, compression in (("raw", "raw"), ("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("packbits", "packbits")):
        save(small, f"{name}.tif", compression=compression)
    save(small.convert("L"), "grey.tif", compression="tiff_lzw")
    save(alpha, "alpha.tif", compression="tiff_lzw")
    save(small.convert("1"), "one-bit.tif")
    save(small.quantize(40), "refused/palette.tif")
    save(small.convert("CMYK"), "refused/cmyk.tif")
    save(small.rotate(90, expand=True), "orientation-6.tif", tiffinfo={274: 6})
    pages = [im.resize((30, 20)) for im in (cup, cat)]
    pages[0].save(os.path.join(HERE, "two-pages.tif"), save_all=True, append_images=pages[1:], compression="tiff_lzw")
    save(small, "refused/jpeg.tif", compression="jpeg", quality=90)


def pictures():
    save = lambda im, name, **kw: im.save(os.path.join(HERE, name), **kw)
    cat, cup, woman, rocket = photo("chelsea.png", (150, 99)), photo("coffee.png", (121, 81)), photo("astronaut.png", (101, 103)), photo("rocket.jpg", (160, 107))
    for o in range(1, 9):
        save(cat.resize((61, 40)), f"orientation-{o}.jpg", quality=90, exif=exif(o))
    save(cat, "progressive-420.jpg", quality=85, progressive=True, exif=exif(6))
    save(cup, "baseline-422.jpg", quality=92, subsampling=1, exif=exif(3))
    save(woman, "progressive-444.jpg", quality=97, subsampling=0, progressive=True)
    save(rocket, "restart-420.jpg", quality=75, restart_marker_blocks=5, optimize=True)
    save(rocket, "low-quality.jpg", quality=4)
    save(woman, "xmp.jpg", quality=80, xmp=xmp(8))
    save(woman.resize((96, 64)), "baseline-422.blocks.jpg", quality=90, subsampling=1)
    save(woman.resize((96, 64)), "baseline-420.blocks.jpg", quality=90, subsampling=2)
    resampled("baseline-422.blocks.jpg", "baseline-440.jpg", 0x12, (45, 123))
    resampled("baseline-420.blocks.jpg", "baseline-411.jpg", 0x41, (187, 29))
    resampled("baseline-420.blocks.jpg", "baseline-1x4.jpg", 0x14, (44, 127))
    for blocks in ("baseline-422.blocks.jpg", "baseline-420.blocks.jpg"):
        os.remove(os.path.join(HERE, blocks))
    save(woman.convert("L"), "grey.jpg", quality=88)
    save(woman.convert("L"), "grey-progressive.jpg", quality=88, progressive=True)
    save(cup.convert("CMYK"), "cmyk.jpg", quality=90)
    save(cup.resize((2, 37)), "narrow.jpg", quality=95)
    save(cup.resize((5, 4)), "tiny.jpg", quality=95)
    save(cup.resize((1, 1)), "one.jpg", quality=95)
    save(rocket.resize((40, 300)), "tall.jpg", quality=80)
    save(rocket.resize((300, 40)), "wide.png")
    save(cup, "lossy.webp", quality=80)
    save(woman.resize((99, 61)), "lossy-odd.webp", quality=50, exif=exif(5))
    save(cat.resize((75, 50)), "lossless.webp", lossless=True, exif=exif(7))
    alpha = cup.resize((60, 40)); alpha.putalpha(Image.linear_gradient("L").resize((60, 40)))
    save(alpha, "alpha.png")
    save(alpha, "alpha-lossy.webp", quality=70)
    save(alpha, "alpha-lossless.webp", lossless=True, exact=True)
    save(alpha.convert("LA"), "grey-alpha.png")
    save(cat.resize((50, 33)).quantize(64), "palette.png", exif=exif(2))
    save(cat.resize((50, 33)).quantize(5), "palette-4bit.png")
    p = cat.resize((50, 33)).quantize(32); p.info["transparency"] = 3
    save(p, "palette-transparent.png", transparency=3)
    save(cup.resize((45, 31)).convert("1"), "one-bit.png")
    save(cup.resize((45, 31)), "transparent-colour.png", transparency=(10, 20, 30))
    wide = np.asarray(cup.resize((40, 30))).astype(np.uint16) * 257 + np.arange(40, dtype=np.uint16)[None, :, None] * 5
    png16(os.path.join(HERE, "rgb-16bit.png"), wide)
    png16(os.path.join(HERE, "rgba-16bit.png"), np.concatenate([wide, wide[..., :1]], -1))
    png16(os.path.join(HERE, "grey-alpha-16bit.png"), wide[..., :2])
    text_profiles(cat.resize((31, 20)))
    save(cup.resize((63, 42)), "with-tables.jpg", quality=85)
    without_tables("with-tables.jpg", "standard-tables.jpg")
    os.remove(os.path.join(HERE, "with-tables.jpg"))
    other_formats(cat, cup, woman)


def resized(w, h, R):
    return (R, int(R * h / w)) if w <= h else (int(R * w / h), R)


def main():
    for f in os.listdir(HERE):
        if f.endswith(ENDINGS):
            os.remove(os.path.join(HERE, f))
    pictures()
    rng = random.Random(1)
    cases, tensors = {}, {}
    for name in sorted(f for f in os.listdir(HERE) if f.endswith(ENDINGS)):
        im = ImageOps.exif_transpose(Image.open(os.path.join(HERE, name))).convert("RGB")
        case = {"size": im.size, "sha256": hashlib.sha256(im.tobytes()).hexdigest(), "transforms": []}
        for R in (24, 64):
            w, h = resized(*im.size, R)
            if max(w, h) > 40 * R:
                continue
            top, left, flip = rng.randint(0, h - R), rng.randint(0, w - R), rng.random() < 0.5
            small = im.resize((w, h), Image.BILINEAR)
            if flip:
                small = ImageOps.mirror(small)
            key = f"{name}.{R}"
            case["transforms"].append({"resolution": R, "flip": flip, "top": top, "left": left, "tensor": key})
            tensors[key] = np.asarray(small.crop((left, top, left + R, top + R))).copy()
            # The centre crop: torchvision's CenterCrop.
            case.setdefault("center", []).append([R, int(round((h - R) / 2.0)), int(round((w - R) / 2.0))])
        cases[name] = case
    versions = {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo"), "webp": features.version("webp"), "scikit-image": skimage.__version__}
    json.dump({"versions": versions, "pictures": cases}, open(os.path.join(HERE, "expected.json"), "w"), indent=1)
    save_file(tensors, os.path.join(HERE, "expected.safetensors"))
    for f in os.listdir(HERE):
        os.chmod(os.path.join(HERE, f), 0o644)


main()
