"""Which facts of a caption do the objects of a picture break? For every world of drawn scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any, Protocol

from .places import Box, ahead

Facts = dict[str, Any]  # of a caption, with "skill" and what `broken_by` reads


class Placed(Protocol):
    """An object that lies somewhere. Its other attributes are what can be said of it."""

    @property
    def box(self) -> Box: ...


def broken_by(facts: Facts, seen: Sequence[Placed], weight: Mapping[str, int]) -> set[str]:
    """The facts that are not true of the objects: keys of weight, "count", "position" and "nothing else".

    facts: {"objects": [{"count", and keys of weight where stated}], "relation": of RELATIONS, or None}. weight: of what
    differs, when objects are matched with what was asked for.
    Each thing asked for is matched with the object most like it. "count": one too few, or one more that is just like
    what was asked for. "nothing else": there is another object. "position": those of the first thing do not all lie
    where the relation says of those of the second, further in its direction than to the side, nor do as many objects
    that are as like what was asked for.
    """
    owners = [number for number, thing in enumerate(facts["objects"]) for _ in range(thing["count"])]
    asked = [facts["objects"][number] for number in owners]
    wrong = {(i, j): _differing(thing, each, weight) for i, thing in enumerate(asked) for j, each in enumerate(seen)}
    matched: dict[int, int] = {}
    for i, j in sorted(wrong, key=lambda pair: sum(weight[key] for key in wrong[pair])):
        if i not in matched and j not in matched.values():
            matched[i] = j
    broken = {key for pair in matched.items() for key in wrong[pair]}
    if len(matched) < len(asked):
        broken.add("count")
    for j in set(range(len(seen))) - set(matched.values()):
        broken.add("nothing else" if all(wrong[i, j] for i in range(len(asked))) else "count")
    if facts["relation"] and len(matched) == len(asked):
        found = [[(i, j) for i, j in matched.items() if owners[i] == number] for number in (0, 1)]
        alike = [
            [each.box for k, each in enumerate(seen) if any(wrong[i, k] == wrong[i, j] for i, j in pairs)]
            for pairs in found
        ]
        choices = [combinations(boxes, len(pairs)) for boxes, pairs in zip(alike, found, strict=True)]
        if not any(_all_ahead(facts["relation"], *chosen) for chosen in product(*choices)):
            broken.add("position")
    return broken


def _differing(thing: Mapping[str, Any], each: Placed, weight: Mapping[str, int]) -> list[str]:
    """What is stated of a thing and not true of an object."""
    return [key for key in weight if key in thing and getattr(each, key) != thing[key]]


def _all_ahead(relation: str, first: Sequence[Box], second: Sequence[Box]) -> bool:
    return all(ahead(relation, one, other) > 0 for one in first for other in second)
