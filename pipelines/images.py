"""Tensors <-> PIL pictures, contact sheets, and the settings inside a PNG.

Shapes: B batch, C channels (3), H W height and width in pixels.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from diffusion.errors import GazeError

WHITE = (255, 255, 255)
SETTINGS_KEY = "gaze"  # keyword of the PNG's text chunk
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow knows more; some of them run other programs
MOST_PIXELS = 64_000_000  # a file of some kilobytes can claim to be larger than any memory


def open_picture(file: str | Path, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A picture of a file as `to_rgb` makes it. Raises GazeError when there is none, or one of too many pixels."""
    try:
        with warnings.catch_warnings(), Image.open(file, formats=FORMATS) as opened:
            warnings.simplefilter("ignore")  # of odd metadata; and our own limit of size is lower than Pillow's
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(
                    f"{opened.width} x {opened.height} pixels are more than {MOST_PIXELS / 1e6:.0f} million"
                )
            return to_rgb(opened, background)
    except Exception as error:  # Pillow's readers let almost any error through
        raise GazeError(f"{file} cannot be read as a picture: {error}", f"a {', '.join(FORMATS)} file") from error


def to_pil(pixels_BCHW: Tensor) -> list[Image.Image]:
    """RGB pictures of pixels in [-1, 1]; values beyond are clamped. One picture per row of the batch."""
    levels_BCHW = (pixels_BCHW.detach().float().add(1).mul(127.5)).clamp(0, 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(levels_HWC.numpy()) for levels_HWC in levels_BCHW.permute(0, 2, 3, 1).contiguous()]


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any decoded picture as 8-bit RGB: turned upright by its EXIF orientation, transparency laid on `background`,
    16-bit grey scaled to 8 bits (PIL's own conversion clips it to white)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels_HW = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray((levels_HW / 257).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    top = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", top.size, (*background, 255)), top).convert("RGB")


def to_tensor(images: Image.Image | Sequence[Image.Image], background: tuple[int, int, int] = WHITE) -> Tensor:
    """Pictures of one size as pixels_BCHW in [-1, 1], float32. Inverse of `to_pil`; a single picture gives B = 1."""
    if isinstance(images, Image.Image):
        images = [images]
    levels_BHWC = np.stack([np.asarray(to_rgb(image, background)) for image in images])
    return torch.from_numpy(levels_BHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """A contact sheet, row by row on white, pictures enlarged by `scale`; labels stand below, broken into lines."""
    if not images or columns < 1:
        raise GazeError(
            f"a sheet of {len(images)} pictures in {columns} columns cannot be drawn", "at least one of each"
        )
    if labels is not None and len(labels) != len(images):
        raise GazeError(f"{len(labels)} labels for {len(images)} pictures", "one label per picture")
    columns, gap = min(columns, len(images)), 6
    width = max(image.width for image in images) * scale
    height = max(image.height for image in images) * scale
    font = ImageFont.load_default(size=max(10, width // 11))
    blocks = [_break_lines(label, width, font) for label in labels or [""] * len(images)]
    line_height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12
    label_height = line_height * max(len(block) for block in blocks)
    rows = -(-len(images) // columns)
    cell_width, cell_height = width + gap, height + label_height + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), WHITE)
    draw = ImageDraw.Draw(sheet)
    for index, (image, block) in enumerate(zip(images, blocks, strict=True)):
        left, top = gap + index % columns * cell_width, gap + index // columns * cell_height
        size = (image.width * scale, image.height * scale)
        sheet.paste(to_rgb(image).resize(size, Image.Resampling.BICUBIC) if scale > 1 else to_rgb(image), (left, top))
        for row, line in enumerate(block):
            draw.text((left, top + height + row * line_height), line, fill=(60, 60, 60), font=font)
    return sheet


def _break_lines(text: str, width: float, font: Any) -> list[str]:
    """Words of `text` in lines at most `width` pixels wide; longer words are broken. Shows unprintable letters as ?."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines[1:]


def save_png(image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG with `settings` (JSON values) inside; the file is there whole or not at all.

    The settings are ASCII JSON, so every string comes back as it was, NUL and single surrogates included; only two
    surrogates that form a pair come back as the character they encode. NaN and infinity are refused.
    Raises GazeError when the folder cannot be written or the settings are not JSON.
    """
    path = Path(path)
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        try:
            info.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise GazeError(f"the settings of {path} cannot be written as JSON: {error}") from error
    aside = path.with_name(f".{uuid4().hex}.tmp")
    try:
        image.save(aside, format="PNG", pnginfo=info)
        os.replace(aside, path)
    except OSError as error:
        raise GazeError(f"{path} cannot be written: {error.strerror or error}", "another file with -o") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put inside. Raises GazeError for anything that is not such a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = str(image.info.get(SETTINGS_KEY, ""))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise GazeError(f"{path} cannot be read as a PNG: {error}", "a picture written by gaze generate") from error
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GazeError(f"{path} has no gaze settings inside", "a picture written by gaze generate") from error
    if not isinstance(settings, dict):
        raise GazeError(f"the gaze settings inside {path} are not an object", "a picture written by gaze generate")
    return settings
