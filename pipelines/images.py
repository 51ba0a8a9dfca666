"""Tensors <-> PIL pictures.

Shapes: B batch, C channels (3), H W height and width in pixels.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from diffusion.errors import GazeError

WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # Pillow knows more; some of them run other programs
TOO_MANY_PIXELS = 64_000_000  # a file of some kilobytes can claim to be larger than any memory
DEEP = (np.arange(65536) / 257).round().astype(np.uint8)  # the 8-bit level of each 16-bit one
TURNS = {  # what makes a picture upright, by its orientation (EXIF 2.3, table 6)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(file: str | Path | bytes, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A picture of a file, or of a file's content, as `to_rgb` makes it: the first where there are several.

    Raises GazeError when there is none, one that is cut short, or one of 64 million pixels or more, which is seen from
    its header.
    """
    name, source = ("the file", io.BytesIO(file)) if isinstance(file, bytes) else (str(file), file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; and our own limit of size is lower than Pillow's
            with Image.open(source, formats=FORMATS) as opened:
                if opened.width * opened.height >= TOO_MANY_PIXELS:
                    limit = f"{TOO_MANY_PIXELS / 1e6:.0f} million"
                    raise ValueError(f"{opened.width} x {opened.height} pixels are too many; the limit is {limit}")
                return to_rgb(opened, background)
    except Exception as error:  # Pillow's readers let almost any error through
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is none, or of another format" if unknown else str(error) or type(error).__name__
        raise GazeError(f"{name} cannot be read as a picture: {reason}", f"a {', '.join(FORMATS)} file") from error


def to_pil(pixels_BCHW: Tensor) -> list[Image.Image]:
    """RGB pictures of pixels in [-1, 1]; values beyond are clamped. One picture per row of the batch."""
    levels_BCHW = (pixels_BCHW.detach().float().add(1).mul(127.5)).clamp(0, 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(levels_HWC.numpy()) for levels_HWC in levels_BCHW.permute(0, 2, 3, 1).contiguous()]


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any decoded picture as 8-bit RGB without metadata: turned upright by its EXIF orientation, transparency laid on
    `background`, 16-bit grey scaled to 8 bits (PIL's own conversion clips it to white)."""
    image = _upright(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        top = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", top.size, (*background, 255)), top)
    rgb = image.convert("RGB")
    rgb.info = {}  # an orientation that stayed would turn the picture again
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """Metadata that cannot be read turns nothing."""
    image.load()  # in some formats metadata follows the pixels
    try:
        method = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as open_picture
        method = None
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    levels_HW = np.asarray(image).clip(0, 65535)
    grey = Image.fromarray(DEEP[levels_HW])
    if "transparency" in image.info:  # one level of the 65536 is clear
        grey.putalpha(Image.fromarray(levels_HW != image.info["transparency"]).convert("L"))
    return grey


def to_tensor(images: Image.Image | Sequence[Image.Image], background: tuple[int, int, int] = WHITE) -> Tensor:
    """Pictures of one size as pixels_BCHW in [-1, 1], float32. Inverse of `to_pil`; a single picture gives B = 1."""
    if isinstance(images, Image.Image):
        images = [images]
    levels_BHWC = np.stack([np.asarray(to_rgb(image, background)) for image in images])
    return torch.from_numpy(levels_BHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
