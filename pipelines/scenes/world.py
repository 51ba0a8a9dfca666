"""Scenes of two or three emoji on one colour: drawn at random, but each a function of (kinds, seed, index, split).

The emoji never touch. Six skills take turns. Some combinations are held out: no seen scene contains one, every held-out
prompt states one. Lengths are in pixels of a picture of SIDE x SIDE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np
from PIL import Image

from diffusion.errors import GazeError

from ..facts import Facts
from ..places import CLEAR, RELATIONS, SIDE, Box, ahead, apart, box_at_random, check_split, is_held_out

WHITE = "white"
BACKGROUNDS = {
    WHITE: (255, 255, 255),
    "blue": (120, 175, 245),
    "green": (140, 210, 140),
    "yellow": (250, 230, 130),
    "pink": (250, 175, 205),
    "grey": (185, 185, 185),
    "purple": (190, 160, 235),
}
SIDES = {2: range(22, 27), 3: range(18, 22)}  # of an emoji's box, by how many there are
TRIES = 10_000  # to find facts of a split; some ten suffice where there are many kinds
SKILLS = ("two objects", "three objects", "counting", "position", "background", "all at once")


@dataclass(frozen=True)
class Object:
    """kind: the name of a thing."""

    kind: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """name: split, seed and index. background: of BACKGROUNDS. objects: in the order of the facts.

    facts: what the caption says, {"skill", "objects": [{"kind", "count"}], "relation": of RELATIONS, those of the first
    kind to those of the second, or None, "background": None where it is not said, and then white}.
    """

    name: str
    facts: Facts
    background: str
    objects: tuple[Object, ...]


def scene(kinds: Sequence[str], seed: int, index: int, split: str = "seen") -> Scene:
    """Scene number `index`, of skill SKILLS[index % 6]. kinds: names. GazeError: no such split, and too few kinds."""
    check_split(split)
    name = f"{split}/{seed}/{index}"
    random = Random(f"emoji/{name}")
    for _ in range(TRIES if len(kinds) >= 3 else 0):
        facts = _facts(random, SKILLS[index % len(SKILLS)], kinds)
        if any(map(is_held_out, combinations_of(facts))) == (split == "heldout"):
            return Scene(name, facts, facts["background"] or WHITE, _objects(random, facts))
    raise GazeError(f"{len(kinds)} things are too few for scenes of the split {split!r}", "some 20 or more")


def combinations_of(facts: Facts) -> Iterator[str]:
    """Kind with kind in the alphabet's order, count with kind, and kind with a background other than white."""
    for thing in facts["objects"]:
        if thing["count"] > 1:
            yield f"{thing['count']} {thing['kind']}"
        if facts["background"] not in (None, WHITE):
            yield f"{thing['kind']} on {facts['background']}"
    yield from (" and ".join(pair) for pair in combinations(sorted(thing["kind"] for thing in facts["objects"]), 2))


def _facts(random: Random, skill: str, kinds: Sequence[str]) -> Facts:
    """What a caption of this skill may say, held out or not."""
    counts = {
        "three objects": random.choice([(1, 1, 1), (2, 1), (1, 2)]),
        "counting": random.choice([(2,), (3,)]),
        "all at once": random.choice([(1, 1), (2, 1), (1, 2)]),
    }.get(skill, (1, 1))
    relation, background = random.choice([*RELATIONS]), random.choice([*BACKGROUNDS])
    return {
        "skill": skill,
        "objects": [
            {"kind": kind, "count": count}
            for kind, count in zip(random.sample(kinds, len(counts)), counts, strict=True)
        ],
        "relation": relation if skill in ("position", "all at once") else None,
        "background": background if skill in ("background", "all at once") else None,
    }


def _objects(random: Random, facts: Facts) -> tuple[Object, ...]:
    """Objects of which the facts are true; those of one kind are equally large."""
    total = sum(thing["count"] for thing in facts["objects"])
    sides = {thing["kind"]: random.choice(SIDES[total]) for thing in facts["objects"]}
    kinds = [thing["kind"] for thing in facts["objects"] for _ in range(thing["count"])]
    while True:
        boxes = [box_at_random(random, sides[kind]) for kind in kinds]
        objects = tuple(map(Object, kinds, boxes))
        if all(apart(*pair) for pair in combinations(boxes, 2)) and (
            facts["relation"] is None or _related(objects, facts)
        ):
            return objects


def _related(objects: Sequence[Object], facts: Facts) -> bool:
    first, second = ([each.box for each in objects if each.kind == thing["kind"]] for thing in facts["objects"])
    return all(ahead(facts["relation"], one, other) >= CLEAR for one in first for other in second)


def draw(scene: Scene, glyphs: Mapping[str, Image.Image], size: int = SIDE) -> Image.Image:
    """The scene as an RGB picture of size x size pixels. glyphs: by kind, RGBA and square."""
    canvas = Image.new("RGBA", (size, size), BACKGROUNDS[scene.background])
    for glyph, left, top in _placed(scene, glyphs, size):
        canvas.alpha_composite(glyph, (left, top))
    return canvas.convert("RGB")


def masks(scene: Scene, glyphs: Mapping[str, Image.Image], size: int = SIDE) -> np.ndarray:
    """The pixels of which each object covers at least half: masks_OHW of bool, in the order of `scene.objects`."""
    masks_OHW = np.zeros((len(scene.objects), size, size), bool)
    for mask_HW, (glyph, left, top) in zip(masks_OHW, _placed(scene, glyphs, size), strict=True):
        mask_HW[top : top + glyph.height, left : left + glyph.width] = np.asarray(glyph)[:, :, 3] >= 128
    return masks_OHW


def _placed(scene: Scene, glyphs: Mapping[str, Image.Image], size: int) -> Iterator[tuple[Image.Image, int, int]]:
    """Each object's glyph at its size, and its left and top edge, in pixels of a picture of `size`."""
    for each in scene.objects:
        left, top, right, _ = (round(end * size / SIDE) for end in each.box)
        yield scaled(glyphs[each.kind], right - left), left, top


def scaled(glyph: Image.Image, side: int) -> Image.Image:
    return glyph.resize((side, side), Image.Resampling.LANCZOS)
