"""Values that a caller gives, checked one by one. Each raises GazeError with the value's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from diffusion.errors import GazeError
from diffusion.guidance import Guidance

LONGEST = 2**14  # pixels of a side; more is a mistake, or meant to fill the memory
MOST = 10_000  # pictures of a call


def picture_size(
    trained: int | tuple[int, int] | None, factor: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels: asked for, else those the model was trained at, which are given as latents.

    Raises GazeError when neither is known, and for a side that the factor does not divide.
    """
    own = trained if isinstance(trained, tuple) else (trained, trained)
    sides = []
    for name, asked, latent in zip(("height", "width"), (height, width), own, strict=True):
        side = asked if asked is not None or latent is None else latent * factor
        if side is None:
            raise GazeError(f"this model does not say its picture size, and no {name} was given", f"{name}=512")
        if whole(name, side, 1, LONGEST) % factor:
            near = sorted({max(side // factor, 1) * factor, (side // factor + 1) * factor})
            raise GazeError(f"{name} is {side}; this model makes multiples of {factor}", " or ".join(map(str, near)))
        sides.append(side)
    return sides[0], sides[1]


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def whole(name: str, value: Any, least: int, most: int = 2**63) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        limit = "" if most == 2**63 else f" and at most {most}"
        raise GazeError(f"{name} is {value!r}", f"a whole number, at least {least}{limit}")
    return int(value)


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        off = "; guidance_scale 1 turns guidance off" if name == "guidance_scale" else ""
        raise GazeError(f"{name} is {value!r}", f"a number{off}")
    return float(value)


def two(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise GazeError(f"{name} is {value!r}", "two numbers, such as (512, 768)")
    return value


def interval(value: Any) -> tuple[float, float]:
    ends = [None, None] if value is None else value if isinstance(value, list | tuple) else []
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float | None) for end in ends):
        raise GazeError(f"guidance_interval is {value!r}", "two noise levels, the lower first, such as (0.2, 5)")
    low, high = (last if end is None else float(end) for end, last in zip(ends, Guidance.interval, strict=True))
    return low, high


def texts(name: str, value: Any) -> list[Any]:
    given = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not given or not all(isinstance(text, str) for text in given):
        raise GazeError(f"{name} is {value!r}", "a text or a list of texts")
    return given
