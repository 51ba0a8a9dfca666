"""From a picture's file to the pixels that a network sees (docs/data.md has the contract)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from diffusion.errors import GazeError, nearest
from pipelines.images import WHITE, open_picture, to_tensor

Size = tuple[int, int]  # height and width in pixels


def decode(
    file: bytes | Path,
    size: Size,
    crop_at: tuple[float, float] = (0.5, 0.5),
    flipped: bool = False,
    background: tuple[int, int, int] = WHITE,
) -> tuple[Tensor, Size, tuple[int, int]]:
    """A picture upright, opaque, resized with Lanczos until it just covers `size`, cropped, and mirrored if `flipped`.

    file: its path or its content. crop_at: the shares of what is cut away that lie above, and to the left before
    mirroring; 0.5 cuts the same on both sides. background: under transparent pictures.
    Returns pixels_CHW in [-1, 1], the upright picture's size before resizing, and where in it the sample begins, see
    `crop_of`.
    Raises GazeError when it does not decode.
    """
    picture = open_picture(file, background)
    original = picture.height, picture.width
    crop = crop_of(original, size, crop_at, flipped)
    # Only what is kept is computed: the rest of a picture of one row of pixels would fit no memory.
    sample = picture.resize(size[::-1], Image.Resampling.LANCZOS, part_of(original, size, crop, flipped))
    return to_tensor(ImageOps.mirror(sample) if flipped else sample)[0], original, crop


def crop_of(original: Size, size: Size, crop_at: tuple[float, float], flipped: bool) -> tuple[int, int]:
    """Top and left of the sample in the picture, as it is after resizing and mirroring (SDXL: Podell et al. 2023,
    section 2.2). original: size of the upright picture. Others as for `decode`."""
    rows, columns = _covering(original, size)
    top, left = round(crop_at[0] * (rows - size[0])), round(crop_at[1] * (columns - size[1]))
    return top, columns - size[1] - left if flipped else left


def part_of(original: Size, size: Size, crop: tuple[int, int], flipped: bool) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a sample in its picture before resizing and mirroring, in pixels of the picture.
    crop: as `crop_of` says it for the others."""
    rows, columns = _covering(original, size)
    top, left = crop[0], columns - size[1] - crop[1] if flipped else crop[1]
    down, right = original[0] / rows, original[1] / columns  # pixels of the file in one of the resized picture
    end, bottom = min((left + size[1]) * right, original[1]), min((top + size[0]) * down, original[0])
    return left * right, top * down, end, bottom


def _covering(original: Size, size: Size) -> Size:
    """The smallest size of the picture's shape, up to rounding, that covers `size`."""
    if size[0] * original[1] >= size[1] * original[0]:
        return size[0], max(size[1], round(original[1] * size[0] / original[0]))
    return max(size[0], round(original[0] * size[1] / original[1])), size[1]


def probe(content: bytes) -> Size:
    """The size of the upright picture, after decoding all of it. Raises GazeError with the reason why it does not."""
    picture = open_picture(content)
    return picture.height, picture.width


def colour(name: str) -> tuple[int, int, int]:
    """RGB in 0 to 255 of a colour's name or #rrggbb. Raises GazeError with the nearest name."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        close, _, _ = nearest(name, ImageColor.colormap).partition("choices")
        raise GazeError(f"data.background: {name!r} is no colour", f"{close}a name such as white, or #rrggbb") from None
    return red, green, blue
