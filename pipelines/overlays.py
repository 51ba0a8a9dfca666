"""Maps as pictures: a ramp of colours in even steps, and a map laid over the picture that it belongs to."""

# Shapes: H W height and width, N colours.

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

OPACITY = 0.75  # of the colours over the picture, which is grey under them
DARK, BRIGHT = 0.14, 0.96  # OKLab's lightness of nothing and of the most
VIOLET, YELLOW = 285.0, 465.0  # hue in degrees, from the dark end through red to the bright one
# OKLab -> cubic roots of the cones' answers -> linear sRGB (Ottosson 2020, "A perceptual color space for image
# processing")
LAB_TO_CONES = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@functools.cache
def ramp() -> NDArray[np.uint8]:
    """256 colours, N x 3: from dark violet through red to light yellow. Each is as much lighter than the one before as
    everywhere, so equal steps of a map look equal, also in grey and to the colour-blind."""
    share_N = np.linspace(0, 1, 256)
    lightness_N = DARK + (BRIGHT - DARK) * share_N
    hue_N = np.radians(VIOLET + (YELLOW - VIOLET) * share_N)
    chroma_N = 0.06 + 0.16 * np.sin(np.pi * share_N)
    rgb_N3 = _linear(lightness_N, chroma_N, hue_N)
    for _ in range(200):  # colours that a screen cannot show become paler, not lighter
        outside_N = ((rgb_N3 < 0) | (rgb_N3 > 1)).any(axis=1)
        chroma_N = np.where(outside_N, chroma_N * 0.98, chroma_N)
        rgb_N3 = _linear(lightness_N, chroma_N, hue_N)
    rgb_N3 = rgb_N3.clip(0, 1)
    encoded_N3 = np.where(rgb_N3 <= 0.0031308, 12.92 * rgb_N3, 1.055 * rgb_N3 ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return (255 * encoded_N3).round().astype(np.uint8)


def _linear(lightness_N: NDArray, chroma_N: NDArray, hue_N: NDArray) -> NDArray:
    """Linear sRGB, N x 3, of OKLab's lightness, chroma and hue."""
    lab_N3 = np.stack([lightness_N, chroma_N * np.cos(hue_N), chroma_N * np.sin(hue_N)], axis=1)
    return (lab_N3 @ LAB_TO_CONES.T) ** 3 @ CONES_TO_RGB.T


def levels(map_HW: Tensor) -> NDArray[np.uint8]:
    """A map in 256 levels, H x W, of which 255 is its own most; a map of zeros stays 0."""
    most = map_HW.max().clamp(min=1e-12)
    return (map_HW / most * 255).round().byte().numpy()


def overlay(image: Image.Image, map_HW: Tensor, pixel: tuple[int, int] | None = None) -> Image.Image:
    """The picture in grey under the colours of a map of its size. pixel: (x, y) of one to mark."""
    colours = Image.fromarray(ramp()[levels(map_HW)])
    drawn = Image.blend(image.convert("L").convert("RGB"), colours, OPACITY)
    if pixel is not None:
        (x, y), radius = pixel, max(2, image.width // 40)
        ring = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(drawn).ellipse(ring, outline=(255, 255, 255), width=max(1, radius // 3))
    return drawn


def legend(size: tuple[int, int]) -> Image.Image:
    """The ramp from left (nothing) to right (the most) across the middle of a picture of this size, on white."""
    width, height = size
    bar = Image.fromarray(ramp()[None]).resize((width, max(1, height // 5)), Image.Resampling.NEAREST)
    drawn = Image.new("RGB", size, (255, 255, 255))
    drawn.paste(bar, (0, (height - bar.height) // 2))
    return drawn
