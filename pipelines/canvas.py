"""A picture to start from, and the mask of what is painted anew: what image to image and inpainting add to a run.

Shapes: B pictures of one call, 1 where all share one; C channels, H W picture or latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.samplers import Denoise, Step

from .checks import picture_size
from .images import WHITE, open_picture, to_rgb, to_tensor

BLACK = (0, 0, 0)
STRENGTH = 0.8  # diffusers' default; with a mask it is 1


@dataclass(frozen=True, eq=False)
class Canvas:
    """pixels_BCHW: the picture in [-1, 1], B = 1. mask_BCHW: of one channel, 1 where it is painted anew and 0 where it
    stays; None: everywhere. strength: how far it is left. noted: the settings that make it again."""

    pixels_BCHW: Tensor
    mask_BCHW: Tensor | None
    strength: float
    noted: dict[str, Any] = field(default_factory=dict)

    def masked_BCHW(self) -> Tensor:
        """The picture, grey where it is painted anew."""
        assert self.mask_BCHW is not None
        return self.pixels_BCHW * (1 - self.mask_BCHW)


def canvas(image: Any, mask: Any, strength: Any, height: int | None, width: int | None, factor: int) -> Canvas | None:
    """What the three settings of a request ask for; None for none. Pictures are PIL's or files of them.

    The picture is brought to height and width, by default to its own rounded down to what the factor divides, with
    Lanczos' filter, and so is the mask, which is then white from half on; what is transparent in it counts as black.
    Raises GazeError for a file that is no picture, a mask of another size than the picture, and a strength that is not
    above 0 and at most 1.
    """
    if image is None:
        for name, value in (("strength", strength), ("mask_image", mask)):
            if value is not None:
                raise GazeError(f"{name} was given, but no image to start from", "image=..., or --init IMAGE")
        return None
    picture, file = _opened("image", image)
    if strength is None:
        strength = STRENGTH if mask is None else 1.0
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise GazeError(f"strength is {strength!r}", "above 0 (almost the picture) to 1 (all noise)")
    height, width = picture_size((picture.height // factor, picture.width // factor), factor, height, width)
    size = (width, height)
    noted = {"image": file, "strength": float(strength)}
    mask_BCHW = None
    if mask is not None:
        painted, noted["mask_image"] = _opened("mask_image", mask, BLACK)
        if painted.size != picture.size:
            raise GazeError(
                f"the mask is {painted.width}x{painted.height} pixels, the picture {picture.width}x{picture.height}",
                "a mask of the picture's size, white where it is painted anew",
            )
        mask_BCHW = (to_tensor(_resized(painted.convert("L"), size))[:, :1] >= 0).float()
    return Canvas(to_tensor(_resized(picture, size)), mask_BCHW, float(strength), noted)


def _opened(name: str, picture: Any, background: tuple[int, int, int] = WHITE) -> tuple[Image.Image, str | None]:
    """A picture in RGB, what is transparent laid on the background, and the name of its file."""
    if isinstance(picture, str | Path):
        return open_picture(picture, background), str(picture)
    if not isinstance(picture, Image.Image):
        raise GazeError(f"{name} is {type(picture).__name__}", "a PIL picture, or the name of its file")
    return to_rgb(picture, background), getattr(picture, "filename", "") or None


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins, at noise level sigma, and in what else it differs from text to image.

    beside_BCHW: further channels of the network's input. known_BCHW: latents that stay where mask_BCHW is 0.
    seen_BCHW: what the network is shown at the first level, instead of x.
    """

    x_BCHW: Tensor
    sigma: float
    beside_BCHW: Tensor | None = None
    mask_BCHW: Tensor | None = None
    known_BCHW: Tensor | None = None
    seen_BCHW: Tensor | None = None

    def around(self, denoise: Denoise) -> Denoise:
        """The denoiser that knows what stays: there the clean picture is given, so that any method that takes means of
        clean pictures and x ends with it, along the straight way on which diffusers puts it back after every step."""
        known_BCHW, mask_BCHW = self.known_BCHW, self.mask_BCHW
        if known_BCHW is None or mask_BCHW is None:
            return denoise

        def inside(x_BCHW: Tensor, sigma: float) -> Tensor:
            if self.seen_BCHW is not None and sigma == self.sigma:
                x_BCHW = self.seen_BCHW
            return torch.lerp(known_BCHW, denoise(x_BCHW, sigma), mask_BCHW)

        return inside

    def end(self, step: Step) -> Step:
        """The last step of a run: a schedule may end above zero noise, but what stays has none."""
        if self.known_BCHW is None or self.mask_BCHW is None:
            return step
        known_BCHW = self.known_BCHW * math.hypot(1, step.sigma)  # as `Preview` decodes it
        return step._replace(x_BCHW=torch.lerp(known_BCHW, step.x_BCHW, self.mask_BCHW))


def start(
    canvas: Canvas,
    encode: Callable[[Tensor], Tensor],
    noise: Callable[[], Tensor],
    sigma: float,
    factor: float,
    beside: bool,
) -> Start:
    """The start of a run from a picture.

    encode: pixels -> a draw of their latents, one for each picture. noise: the start noise, of unit variance. factor:
    on it, for a start from noise alone. beside: the network takes the mask and the masked picture's latents as channels
    of its input (Rombach et al. 2022, section 4.5), and learned to keep what stays. Strength 1 with a mask starts from
    noise alone. All is drawn in diffusers' order, so that a seed gives diffusers' picture.
    """
    pixels_BCHW, mask_BCHW = canvas.pixels_BCHW, canvas.mask_BCHW
    if mask_BCHW is None:
        return Start(encode(pixels_BCHW) + sigma * noise(), sigma)
    fresh = canvas.strength == 1
    known_BCHW = None if fresh and beside else encode(pixels_BCHW)
    noise_BCHW = noise()
    alone_BCHW = factor * noise_BCHW
    begun_BCHW = alone_BCHW if known_BCHW is None else known_BCHW + sigma * noise_BCHW
    mask_BCHW = F.interpolate(mask_BCHW, size=noise_BCHW.shape[-2:]).to(noise_BCHW)
    if beside:
        masked_BCHW = encode(canvas.masked_BCHW())
        beside_BCHW = torch.cat([mask_BCHW.expand(len(masked_BCHW), -1, -1, -1), masked_BCHW], dim=1)
        return Start(begun_BCHW, sigma, beside_BCHW)
    if fresh:
        begun_BCHW = torch.lerp(begun_BCHW, alone_BCHW, mask_BCHW)
    return Start(begun_BCHW, sigma, None, mask_BCHW, known_BCHW, alone_BCHW if fresh else None)
