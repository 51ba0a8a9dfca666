"""Where the objects of a drawn scene lie, for every world of such scenes, in pixels of a picture of SIDE x SIDE.

A box is left, top, right and bottom, the last two exclusive.
"""

from __future__ import annotations

import hashlib
from random import Random

from diffusion.errors import GazeError, nearest

SIDE = 64
MARGIN, GAP = 2, 5  # the least there is between an object's box and the border, and between two boxes
CLEAR = 6  # by so much an object above another is further up than it is to the side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first is
SPLITS = ("seen", "heldout")
ONE_IN = 7  # combinations are held out

Box = tuple[int, int, int, int]


def centre(box: Box) -> tuple[float, float]:
    left, top, right, bottom = box
    return (left + right) / 2, (top + bottom) / 2


def ahead(relation: str, first: Box, second: Box) -> float:
    """By how much the first box's centre lies further in the relation's direction than it lies to the side of it."""
    (x, y), (other_x, other_y) = centre(first), centre(second)
    right, down = RELATIONS[relation]
    along = (x - other_x) * right + (y - other_y) * down
    aside = (x - other_x) * down + (y - other_y) * right
    return along - abs(aside)


def box_at_random(random: Random, side: int) -> Box:
    left, top = (random.randint(MARGIN, SIDE - MARGIN - side) for _ in range(2))
    return left, top, left + side, top + side


def apart(one: Box, other: Box) -> bool:
    return any(a[end] + GAP <= b[start] for a, b in ((one, other), (other, one)) for start, end in ((0, 2), (1, 3)))


def is_held_out(combination: str) -> bool:
    """The held-out rule of combinations: one in seven by hash of "red circle", "circle and square" or "2 circle"."""
    return int(hashlib.sha256(combination.encode()).hexdigest(), 16) % ONE_IN == 0


def check_split(split: str) -> None:
    """Raises GazeError where there is no such split."""
    if split not in SPLITS:
        raise GazeError(f"unknown split {split!r}", nearest(split, SPLITS))
