"""A picture's file -> the pixels of a sample."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from diffusion.errors import GazeError
from pipelines.images import WHITE, open_picture, to_tensor

Size = tuple[int, int]  # height and width in pixels


def decode(
    file: bytes | Path,
    size: Size,
    crop_at: tuple[float, float] = (0.5, 0.5),
    flipped: bool = False,
    background: tuple[int, int, int] = WHITE,
) -> tuple[Tensor, Size, tuple[int, int]]:
    """pixels_CHW in [-1, 1], the upright picture's size, and where in it the sample begins, see `crop_of`."""
    picture = open_picture(io.BytesIO(file) if isinstance(file, bytes) else file, background)  # type: ignore[arg-type]
    original = picture.height, picture.width
    fitted = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS, centering=crop_at[::-1])
    if flipped:
        fitted = ImageOps.mirror(fitted)
    return to_tensor(fitted)[0], original, crop_of(original, size, crop_at, flipped)


def crop_of(original: Size, size: Size, crop_at: tuple[float, float], flipped: bool) -> tuple[int, int]:
    """Top and left of the sample in the picture as it is resized and mirrored (Podell et al. 2023, section 2.2).

    crop_at: the share of what is cut away that lies above, and to the left before mirroring.
    """
    scale = max(size[0] / original[0], size[1] / original[1])
    top, left = crop_at[0], 1 - crop_at[1] if flipped else crop_at[1]
    return round((original[0] * scale - size[0]) * top), round((original[1] * scale - size[1]) * left)


def colour(name: str) -> tuple[int, int, int]:
    """RGB in 0 to 255 of a colour's name or #rrggbb. Raises GazeError for another word."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        raise GazeError(f"data.background: {name!r} is no colour", "a name such as white, or #rrggbb") from None
    return red, green, blue
