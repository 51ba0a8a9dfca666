"""What a judge says of one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image


class Verdict(NamedTuple):
    """score: of one picture, higher is better. said: JSON values for the report: what was found, asked, answered."""

    score: float
    said: dict[str, Any]


# Prompts, and as many pictures in RGB -> a verdict on each.
Judge = Callable[[Sequence[str], Sequence[Image.Image]], list[Verdict]]
