"""Tensors <-> PIL pictures.

Shapes: B batch, C channels (3), H W height and width in pixels.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.errors import GazeError

WHITE = (255, 255, 255)
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
