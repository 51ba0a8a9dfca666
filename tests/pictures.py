"""Pictures as strangers send them: PNGs of every kind written by hand, and folders with broken ones among them."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation: int) -> bytes:
    """A TIFF header with one tag (EXIF 2.3, section 4.6)."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def png(values_HWC: np.ndarray, depth: int, colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of samples 0 to 2^depth - 1 (PNG specification, section 5)."""
    height, width, _ = values_HWC.shape
    bits = (values_HWC.astype(np.int64)[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int, side: int = 16) -> Image.Image:
    """One that no other number has."""
    image = Image.new("RGB", (side, side), (number % 251, number // 251 % 256, 90))
    image.putpixel((number % side, 0), (255, 255, 255))
    return image


# Twelve ways to be odd. Whether they are refused: the first four, and the last, are.
ODD: dict[str, tuple[bool, Callable[[Image.Image], bytes]]] = {
    "truncated.png": (True, lambda image: saved(image, "PNG")[:-40]),
    "empty.png": (True, lambda image: b""),
    "html.jpg": (True, lambda image: b"<!DOCTYPE html><title>404</title>"),
    "bomb.png": (True, lambda image: saved(Image.new("1", (8000, 8000)), "PNG")),
    "exif.jpg": (False, lambda image: saved(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + b"\xff" * 20)),
    "cmyk.jpg": (False, lambda image: saved(image.convert("CMYK"), "JPEG")),
    "deep.png": (False, lambda image: png(np.full((16, 16, 1), 40_000), 16, GREY)),
    "palette.png": (
        False,
        lambda image: png(
            np.eye(16)[..., None], 8, PALETTE, chunk(b"PLTE", b"\xff\0\0\0\xff\0"), chunk(b"tRNS", b"\0\x80")
        ),
    ),
    "animated.gif": (False, lambda image: saved(image, "GIF", save_all=True, append_images=[picture(9)])),
    "tiny.png": (False, lambda image: saved(image.resize((1, 1)), "PNG")),
    "nul.png": (False, lambda image: saved(image, "PNG")),
    "silent.png": (True, lambda image: saved(image, "PNG")),
}
CAPTIONS = {"nul.png": "a\0b", "silent.png": None}


def odd_folder(folder: Path, count: int, odd: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Writes `count` captioned pictures, of which `odd` are so in twelve ways in turn, at random places. Returns the
    names of those that a reader must give, and of those that it must leave out, in order."""
    folder.mkdir(parents=True)
    places = dict(zip(sorted(random.Random(seed).sample(range(count), odd)), [*ODD] * odd, strict=False))
    bomb = ODD["bomb.png"][1](picture(0))
    good, bad, rows = [], [], []
    for number in range(count):
        kind = places.get(number, "")
        refused, make = ODD.get(kind, (False, lambda image: saved(image, "PNG")))
        name = f"{number:06d}{kind or '.png'}"
        (folder / name).write_bytes(bomb if kind == "bomb.png" else make(picture(number)))
        rows.append(json.dumps({"file_name": name, "text": CAPTIONS.get(kind, f"picture {number}")}) + "\n")
        (bad if refused else good).append(name)
    (folder / "metadata.jsonl").write_text("".join(rows))
    return good, bad
