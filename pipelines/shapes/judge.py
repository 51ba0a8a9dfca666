"""What a picture of the shapes world shows, and which facts of a caption it breaks. Exact for the scenes drawn here.

Shapes of arrays: H, W height and width in pixels, both SIDE; N = H * W; K colours; h, w those of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from ..facts import Facts, broken_by
from ..places import SIDE
from ..regions import FLOOR, box_of, connected, levels_of, regions
from .world import COLOURS, SHAPES, WHITE, Object, coverage

LEAST_OVERLAP = 0.6  # with the shape that fits best; below it is none of them
UNKNOWN = "unknown"
BETWEEN_SIZES = 21  # pixels of a side
LARGEST = 40  # the same, half more than a large object's; noise, or one colour everywhere, is no square
TRIED = range(3)  # pixels by which a box may reach further up than what is seen: the tip of a triangle fades first
WEIGHT = {"shape": 4, "colour": 2, "size": 1}  # of what differs, when objects are matched with what was asked for
FACTS = (*WEIGHT, "count", "position", "nothing else")

_WHITE_TO_COLOUR_K3 = np.array(list(COLOURS.values()), float) - WHITE
_LENGTHS_K = (_WHITE_TO_COLOUR_K3**2).sum(1)


@dataclass(frozen=True, eq=False)
class Seen(Object):
    """An object found in a picture. shape: UNKNOWN where none fits. mask_HW: its pixels, bool."""

    mask_HW: np.ndarray


def see(image: Image.Image) -> list[Seen]:
    """The objects of a picture, the largest first; one of another size than SIDE x SIDE is resized to that.

    A pixel is taken for a mixture of white and one colour, and belongs to an object where half of it or more is
    colour. An object is what is connected, by corners too, and of one colour; the shape is that of which the same box
    holds most like it (intersection over union), UNKNOWN where none is or where the box is larger than any object's.
    """
    kinds_HW = _kinds(levels_of(image))
    parts_HW = connected(kinds_HW)
    wholes, dirt = regions(kinds_HW > 0)
    found = [mask_HW for whole_HW in wholes for mask_HW in _of_one_colour(whole_HW, parts_HW)] + dirt
    return [_object(mask_HW, kinds_HW) for mask_HW in sorted(found, key=lambda mask_HW: -mask_HW.sum())]


def _of_one_colour(whole_HW: np.ndarray, parts_HW: np.ndarray) -> list[np.ndarray]:
    """The objects that touch each other there. What is smaller than an object is an odd edge of one."""
    numbers = np.flatnonzero(np.bincount(parts_HW[whole_HW]) >= FLOOR)
    return [parts_HW == number for number in numbers] if len(numbers) > 1 else [whole_HW]


def check(facts: Facts, seen: Sequence[Object]) -> list[str]:
    """Which of FACTS the objects break, as `broken_by` tells; an empty list when all of them hold."""
    broken = broken_by(facts, seen, WEIGHT)
    return [fact for fact in FACTS if fact in broken]


def _kinds(levels_HW3: np.ndarray) -> np.ndarray:
    """[H, W]: 0 where the picture is white, else 1 + the number of the colour."""
    from_white_N3 = levels_HW3.reshape(-1, 3) - WHITE
    along_NK = from_white_N3 @ _WHITE_TO_COLOUR_K3.T
    share_NK = np.clip(along_NK / _LENGTHS_K, 0, 1)
    distance_NK = share_NK * (share_NK * _LENGTHS_K - 2 * along_NK)  # squared, but for what is the same for all colours
    nearest_N = distance_NK.argmin(1)
    share_N = np.take_along_axis(share_NK, nearest_N[:, None], 1)[:, 0]
    return np.where(share_N < 0.5, 0, nearest_N + 1).reshape(SIDE, SIDE)


def _object(mask_HW: np.ndarray, kinds_HW: np.ndarray) -> Seen:
    left, top, right, bottom = box_of(mask_HW)
    tops = {max(0, top - up) for up in TRIED}
    overlap, shape, top_of_fit = max(
        (_overlap(mask_HW[start:bottom, left:right], shape), shape, start) for shape in SHAPES for start in tops
    )
    filled = _template(shape, bottom - top_of_fit, right - left).mean()
    fits = overlap >= LEAST_OVERLAP and max(right - left, bottom - top) <= LARGEST
    return Seen(
        shape if fits else UNKNOWN,
        [*COLOURS][np.bincount(kinds_HW[mask_HW]).argmax() - 1],
        "large" if (mask_HW.sum() / filled) ** 0.5 >= BETWEEN_SIZES else "small",
        (left, top, right, bottom),
        mask_HW,
    )


def _overlap(mask_hw: np.ndarray, shape: str) -> float:
    template_hw = _template(shape, *mask_hw.shape)
    return (mask_hw & template_hw).sum() / (mask_hw | template_hw).sum()


@cache
def _template(shape: str, height: int, width: int) -> np.ndarray:
    return coverage(shape, (0, 0, width, height))[:height, :width] >= 0.5
