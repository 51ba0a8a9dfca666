"""GenEval's protocol (Ghosh et al. 2023): a picture is right when what a detector finds in it agrees with all facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from diffusion.errors import GazeError

from ..skills import Judged, sum_up
from .facts import COUNTING, Facts, colours_of, names_of
from .verdict import Judge, Verdict

FACTS = ("missing", "colour", "position", "too many")

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class Found(NamedTuple):
    """score: the detector's, 0 to 1."""

    box: Box
    score: float


class Rules(NamedTuple):
    """What counts as found, and when it lies beside another.

    threshold: only boxes of a higher score count; counting_threshold: the same for the skill "counting". max_overlap:
    a box is another object than a better one of its name up to this intersection over union; 1 takes all. most: objects
    of a name. margin: see `relations`.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.3
    max_overlap: float = 0.7
    most: int = 16
    margin: float = 0.1


DEFAULT = Rules()

# A picture, names -> what is found of each name that there is something of. A box has one name, that which fits best.
Find = Callable[[Image.Image, Sequence[str]], Mapping[str, Sequence[Found]]]
# A picture, boxes, the name of what they hold -> the colour of each.
NameColours = Callable[[Image.Image, Sequence[Box], str], list[str]]


def detect_judge(
    find: Find,
    colours: NameColours | None,
    facts: Mapping[str, Facts],
    rules: Rules = DEFAULT,
    only_asked: bool = False,
) -> Judge:
    """A judge that gives 1 to a picture that agrees with all facts of its prompt, else 0.

    facts: of each prompt (see `facts_of`). colours: None where no fact names one. only_asked: looks for what the
    picture's own prompt names; otherwise for all that any prompt names, as GenEval does: a box counts for the name that
    fits it best, so that a cat is no dog.
    It says skill, broken (see `broken`) and found: [left, top, right, bottom, score] of each object, by name.
    Raises GazeError: a fact names a colour and nothing judges colours; a prompt has no facts; the models' own.
    """
    coloured = next((prompt for prompt, each in facts.items() if colours_of(each)), None)
    if coloured is not None and colours is None:
        raise GazeError(f"{coloured!r:.200} names a colour, and nothing judges colours", "--colours MODEL, a CLIP")
    everything = sorted({name for each in facts.values() for name in names_of(each)})

    def judge(prompt: str, picture: Image.Image) -> Verdict:
        if prompt not in facts:
            raise GazeError(f"nothing says what a picture of {prompt!r:.200} must show", "a prompts file with facts")
        asked = facts[prompt]
        boxes = find(picture, names_of(asked) if only_asked else everything)
        threshold = rules.counting_threshold if asked["skill"] == COUNTING else rules.threshold
        found = {name: objects(each, threshold, rules) for name, each in boxes.items()}
        wrong = broken(asked, found, lambda name, of: colours(picture, of, name) if colours else [], rules.margin)
        told = {
            name: [[*(round(end, 1) for end in each.box), round(each.score, 4)] for each in of]
            for name, of in found.items()
            if of
        }
        return Verdict(float(not wrong), {"skill": asked["skill"], "broken": wrong, "found": told})

    return lambda prompts, pictures: [judge(*each) for each in zip(prompts, pictures, strict=True)]


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """score, low, high, n, right, skills and broken, as `sum_up` gives them for the worlds drawn here: the score is the
    mean of the skills', as GenEval's is."""
    judged = [
        Judged(each.said["skill"], "", [*dict.fromkeys(wrong["fact"] for wrong in each.said["broken"])], [])
        for each in verdicts
    ]
    report = sum_up(judged, [*dict.fromkeys(each.skill for each in judged)], FACTS)
    return {key: value for key, value in report.items() if key != "misses"}


def objects(found: Sequence[Found], threshold: float, rules: Rules = DEFAULT) -> list[Found]:
    """What counts of what is found of a name, best first: above the threshold, and no better object again."""
    best = sorted((each for each in found if each.score > threshold), key=lambda each: -each.score)[: rules.most]
    kept: list[Found] = []
    for each in best:
        if all(overlap(each.box, other.box) <= rules.max_overlap for other in kept):
            kept.append(each)
    return kept


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 where they have no area."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union > 0 else 0.0


def broken(
    facts: Facts,
    found: Mapping[str, Sequence[Found]],
    colours: Callable[[str, Sequence[Box]], list[str]],
    margin: float = DEFAULT.margin,
) -> list[dict[str, Any]]:
    """The facts that are not true of what is found, objects best first. Each is a dict: fact, one of FACTS; name; seen,
    what is so instead: how many, which colours, which relations.

    Of a name as many objects as its facts count are looked at, the best ones; with fewer, it is missing. All of them
    must have the colour, and each must lie in the relation to each of the other's, which must have broken no fact
    itself. Too many: as many as the facts exclude.
    """
    wrong: list[dict[str, Any]] = []
    groups: list[Sequence[Found] | None] = []  # of each of the facts; None where one is broken
    for asked in facts["include"]:
        group = found.get(asked["class"], ())[: asked["count"]]
        fault = _fault(asked, group, groups, colours, margin)
        wrong += [{"fact": fault[0], "name": asked["class"], "seen": fault[1]}] if fault else []
        groups.append(None if fault else group)
    for asked in facts["exclude"]:
        seen = len(found.get(asked["class"], ()))
        wrong += [{"fact": "too many", "name": asked["class"], "seen": seen}] if seen >= asked["count"] else []
    return wrong


def _fault(
    asked: Facts,
    group: Sequence[Found],
    groups: Sequence[Sequence[Found] | None],
    colours: Callable[[str, Sequence[Box]], list[str]],
    margin: float,
) -> tuple[str, Any] | None:
    """The first of one name's facts that is not true, and what is so instead."""
    if len(group) < asked["count"]:
        return "missing", len(group)
    if "color" in asked:
        named = colours(asked["class"], [each.box for each in group])
        if named.count(asked["color"]) < asked["count"]:
            return "colour", named
    if "position" in asked:
        relation, target = asked["position"]
        others = groups[target]
        if others is None:
            return "position", []
        seen = [relations(one.box, other.box, margin) for one in group for other in others]
        return next((("position", each) for each in seen if relation not in each), None)
    return None


def relations(one: Box, other: Box, margin: float = DEFAULT.margin) -> list[str]:
    """Where one box lies, seen from another: up to two of RELATIONS.

    The offset of the centres is reduced in each direction by `margin` times the sum of both sides, but not beyond 0. A
    relation holds where what is left in its direction is more than half of the centres' distance.
    """
    offsets = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sides = [one[i + 2] - one[i] + other[i + 2] - other[i] for i in (0, 1)]
    half = math.hypot(*offsets) / 2
    reduced = [max(abs(offset) - margin * side, 0.0) for offset, side in zip(offsets, sides, strict=True)]
    right, down = map(math.copysign, reduced, offsets)
    left = {"left of": -right, "right of": right, "above": -down, "below": down}
    return [relation for relation, length in left.items() if length > half]
