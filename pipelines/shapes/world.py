"""Scenes of plain shapes on white: drawn at random, but each a function of (seed, index, split), with exact masks.

A scene has one to four objects that never touch. Six skills take turns, named as by GenEval (Ghosh et al. 2023).
Some combinations are held out: no seen scene contains one, every held-out prompt states one.

Shapes of arrays: H, W height and width in pixels. Lengths are in pixels of a picture of SIDE x SIDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ..facts import Facts
from ..places import CLEAR, RELATIONS, SIDE, Box, ahead, apart, box_at_random, check_split, is_held_out

SAMPLES = 8  # of a pixel's side, for smooth edges

WHITE = (255, 255, 255)
COLOURS = {
    "red": (225, 25, 35),
    "green": (30, 160, 50),
    "blue": (35, 70, 225),
    "yellow": (250, 210, 0),
    "purple": (150, 40, 190),
    "cyan": (0, 190, 215),
    "black": (20, 20, 20),
}
# Whether a point belongs to a shape whose box is -1 to 1 in both directions, y down.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: 2 * abs(x) <= 1 + y,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 1 / 3,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) <= 0.25,
}
SIZES = {"small": range(15, 18), "large": range(25, 28)}  # sides of the box
COUNTS = range(2, 5)
MOST_LARGE = 2  # objects; with more of them all are small
SKILLS = ("single object", "two objects", "counting", "colours", "position", "colour binding")


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """name: split, seed and index. objects: in the order of the facts.

    facts: what the caption says, {"skill", "objects": [{"shape", "count", and "colour", "size" where stated}],
    "relation": of RELATIONS, the first object to the second, or None}. What they leave open is free.
    """

    name: str
    facts: Facts
    objects: tuple[Object, ...]


def scene(seed: int, index: int, split: str = "seen") -> Scene:
    """Scene number `index`, of skill SKILLS[index % 6]. Raises GazeError: no such split."""
    check_split(split)
    name = f"{split}/{seed}/{index}"
    random = Random(f"scene/{name}")
    while True:
        facts = _facts(random, SKILLS[index % len(SKILLS)])
        objects = _objects(random, facts)
        wanted = combinations_of(facts["objects"]) if split == "heldout" else combinations_of(listed(objects))
        if any(map(is_held_out, wanted)) == (split == "heldout"):
            return Scene(name, facts, objects)


def combinations_of(things: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Colour with shape, count with shape, and shape with shape in the alphabet's order, of the objects of facts."""
    for thing in things:
        if "colour" in thing:
            yield f"{thing['colour']} {thing['shape']}"
        if thing["count"] > 1:
            yield f"{thing['count']} {thing['shape']}"
    yield from (" and ".join(pair) for pair in combinations(sorted(thing["shape"] for thing in things), 2))


def listed(objects: Sequence[Object]) -> list[dict[str, Any]]:
    """All that can be said of objects but where they are, as in facts."""
    kinds = dict.fromkeys((each.shape, each.colour, each.size) for each in objects)
    counts = [sum((each.shape, each.colour, each.size) == kind for each in objects) for kind in kinds]
    return [
        {"shape": shape, "count": count, "colour": colour, "size": size}
        for (shape, colour, size), count in zip(kinds, counts, strict=True)
    ]


def _facts(random: Random, skill: str) -> Facts:
    """What a caption of this skill may say, held out or not."""
    shapes, colours = random.sample([*SHAPES], 2), random.sample([*COLOURS], 2)
    size, relation, count = random.choice([*SIZES]), random.choice([*RELATIONS]), random.choice(COUNTS)
    first, second = (Facts(shape=shape, count=1) for shape in shapes)
    if skill in ("colours", "position", "colour binding") or (skill in ("single object", "counting") and _coin(random)):
        first["colour"], second["colour"] = colours
    if skill == "single object":
        first["size"] = size
    if skill == "counting":
        first["count"] = count
    alone = skill in ("single object", "counting", "colours")
    return {
        "skill": skill,
        "objects": [first] if alone else [first, second],
        "relation": relation if skill == "position" else None,
    }


def _objects(random: Random, facts: Facts) -> tuple[Object, ...]:
    """Objects of which the facts are true; those of one count are equal."""
    total = sum(thing["count"] for thing in facts["objects"])
    kinds = []
    for thing in facts["objects"]:
        colour, size = random.choice([*COLOURS]), random.choice([*SIZES])
        size = thing.get("size", size if total <= MOST_LARGE else "small")
        side = random.choice(SIZES[size])
        kinds += [(thing["shape"], thing.get("colour", colour), size, side)] * thing["count"]
    while True:
        boxes = [box_at_random(random, side) for *_, side in kinds]
        objects = tuple(Object(*kind[:3], box) for kind, box in zip(kinds, boxes, strict=True))
        free = all(apart(*pair) for pair in combinations(boxes, 2))
        if free and (facts["relation"] is None or ahead(facts["relation"], *boxes) >= CLEAR):
            return objects


def _coin(random: Random) -> bool:
    return random.random() < 0.5


def coverage(shape: str, box: Sequence[float], size: int = SIDE) -> np.ndarray:
    """How much of each pixel a shape covers, [H, W] in 0 to 1, in a picture of size x size pixels."""
    left, top, right, bottom = box
    columns, x = _points(left, right, size)
    rows, y = _points(top, bottom, size)
    inside = (abs(x) <= 1) & (abs(y[:, None]) <= 1) & SHAPES[shape](x[None], y[:, None])
    covered_HW = np.zeros((size, size))
    covered_HW[rows, columns] = inside.reshape(-1, SAMPLES, x.size // SAMPLES, SAMPLES).mean((1, 3))
    return covered_HW


def _points(low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels along a side that lie between low and high, and their samples, -1 at low and 1 at high."""
    first, last = math.floor(low * size / SIDE), math.ceil(high * size / SIDE)
    at = (np.arange(first * SAMPLES, last * SAMPLES) + 0.5) * (SIDE / (size * SAMPLES))
    return slice(first, last), (2 * at - low - high) / (high - low)


def draw(scene: Scene, size: int = SIDE) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    levels_HW3 = np.full((size, size, 3), 255.0)
    for each in scene.objects:
        levels_HW3 += coverage(each.shape, each.box, size)[..., None] * (np.array(COLOURS[each.colour]) - 255.0)
    return Image.fromarray(levels_HW3.round().astype(np.uint8))


def masks(scene: Scene, size: int = SIDE) -> np.ndarray:
    """The pixels of which each object covers at least half, bool [objects, H, W]."""
    return np.stack([coverage(each.shape, each.box, size) >= 0.5 for each in scene.objects])
