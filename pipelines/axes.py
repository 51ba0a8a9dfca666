"""What `gaze grid` varies: "steps=10,20" -> an axis, axes -> the settings of every cell.

An axis's values stand between commas, or between semicolons where there is one outside quotes, as in
scheduler=euler;ddim:eta=1,steps_offset=1. A value in double quotes may hold both; two quotes in it stand for one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from diffusion.errors import GazeError, nearest

from .options import interval_of, size_of

MOST_CELLS = 1000
Settings = dict[str, Any]
_PIECES = re.compile(r'"(?:[^"]|"")*"|[^",;]+|[",;]')


@dataclass(frozen=True)
class Axis:
    """name: of AXES. values: as they were written, which is how they are labelled."""

    name: str
    values: Sequence[str]

    def label(self, value: str) -> str:
        return value if self.name in ("prompt", "replace") else f"{self.name} {value}"


def _one(name: str, kind: Callable[[str], Any] = str) -> Callable[[str], Settings]:
    return lambda value: {name: kind(value)}


def _size(value: str) -> Settings:
    return dict(zip(("width", "height"), size_of(value), strict=True))


# By name, what a value sets. "replace" is not here: what it sets depends on the prompt.
AXES: dict[str, Callable[[str], Settings]] = {
    "apg": _one("projected_guidance", {"on": True, "off": False}.__getitem__),
    "cfg": _one("guidance_scale", float),
    "guidance-interval": _one("guidance_interval", interval_of),
    "guidance-rescale": _one("guidance_rescale", float),
    "negative-prompt": _one("negative_prompt"),
    "prompt": _one("prompt"),
    "scheduler": _one("scheduler"),
    "seed": _one("seed", int),
    "size": _size,
    "spacing": _one("spacing"),
    "strength": _one("strength", float),
    "steps": _one("num_inference_steps", int),
    "weighting": _one("weighting"),
}
KINDS = {"apg": "on or off", "cfg": "a number", "guidance-rescale": "a number from 0 to 1", "strength": "a number"}
KINDS |= dict.fromkeys(("seed", "steps"), "a whole number")
ALIASES = {"guidance-scale": "cfg", "num-inference-steps": "steps"}


def read_axis(text: str) -> Axis:
    """An axis of "name=value,value". Raises GazeError for an unknown name and for a value that it cannot have."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("_", "-")
    name = ALIASES.get(name, name)
    if name not in AXES and name != "replace":
        raise GazeError(f"{name!r} is nothing that a grid can vary", nearest(name, [*AXES, "replace"]))
    if not equals:
        raise GazeError(f"{name} has no values", f"{name}=VALUE,VALUE")
    axis = Axis(name, split(values))
    for value in axis.values if name != "replace" else ():
        _change(axis, value)
    return axis


def split(text: str) -> list[str]:
    """The values of an axis, spaces around them left out. Raises GazeError for a quote that is not closed."""
    pieces = _PIECES.findall(text)
    if '"' in pieces:
        raise GazeError(f"the values {text!r:.200} hold a quote that is not closed", 'VALUE,"VALUE, QUOTED"')
    separator = ";" if ";" in pieces else ","
    values = [""]
    for piece in pieces:
        if piece == separator:
            values.append("")
        else:
            values[-1] += piece[1:-1].replace('""', '"') if piece[0] == '"' else piece
    return [value.strip() for value in values]


def cells(settings: Settings, axes: Sequence[Axis]) -> list[Settings]:
    """The settings of every cell: the first axis varies slowest. Raises GazeError for too many, and for a word to be
    replaced that the prompt does not hold."""
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise GazeError(f"two axes vary {name}", "one axis with all its values")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_CELLS:
        raise GazeError(f"the grid has {count} cells", f"at most {MOST_CELLS}")
    made = []
    for values in itertools.product(*(axis.values for axis in axes)):
        cell = dict(settings)
        # A prompt comes before what is replaced in it.
        for axis, value in sorted(zip(axes, values, strict=True), key=lambda pair: pair[0].name == "replace"):
            cell |= _replaced(axis, value, cell) if axis.name == "replace" else _change(axis, value)
        made.append(cell)
    return made


def describe(axes: Sequence[Axis]) -> list[str]:
    """What distinguishes each cell, in their order."""
    labels = ([axis.label(value) for value in axis.values] for axis in axes)
    return [", ".join(parts) for parts in itertools.product(*labels)]


def _change(axis: Axis, value: str) -> Settings:
    try:
        return AXES[axis.name](value)
    except typer.BadParameter as error:
        raise GazeError(f"{axis.name}: {error.message}") from error
    except (ValueError, KeyError) as error:
        raise GazeError(f"{axis.name} cannot be {value!r:.100}", KINDS[axis.name]) from error


def _replaced(axis: Axis, value: str, cell: Settings) -> Settings:
    """The prompt with the axis's first value replaced by this one."""
    word, prompt = axis.values[0], cell.get("prompt", "")
    if not word or word not in prompt:
        raise GazeError(f"the prompt {prompt!r:.100} does not hold {word!r:.100}, which is to be replaced",
                        "replace=WORD,OTHER with a word of the prompt")  # fmt: skip
    return {"prompt": prompt.replace(word, value)}
