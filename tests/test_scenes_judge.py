"""The judge of scenes of emoji: right on true scenes, however disturbed, and exact about what is wrong with others."""

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.judge import blurred, compressed, noisy
from benchmarks.scene_judge import breaks, is_right
from pipelines.places import SPLITS
from pipelines.scenes.judge import UNKNOWN, Shown, check, see, smoothed, templates
from pipelines.scenes.world import BACKGROUNDS, Object, Scene, draw, scene
from tests.made_things import GLYPHS

KINDS = [*GLYPHS]
KNOWN = templates(GLYPHS)
SCENES = [scene(KINDS, 7, index // 2, SPLITS[index % 2]) for index in range(36)]


def at(kind, left, top, side=20):
    return Object(kind, (left, top, left + side, top + side))


def facts(*things, relation=None, background=None):
    objects = [{"kind": kind, "count": count} for kind, count in things]
    return {"skill": "any", "objects": objects, "relation": relation, "background": background}


def drawn(*objects, background="white"):
    return draw(Scene("", {}, background, objects), GLYPHS)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("disturb", [list, noisy, blurred, compressed])
def test_true_scenes_are_seen_and_right(disturb, size):
    images = disturb([draw(each, GLYPHS, size) for each in SCENES[:18]])
    for each, image in zip(SCENES, images, strict=False):
        assert is_right(each, see(image, KNOWN)), each


def test_exactly_the_broken_fact_is_named():
    tried = set()
    for each in SCENES[:18]:
        for fact, other in breaks(each, KINDS, Random(each.name)):
            assert check(each.facts, see(draw(other, GLYPHS), KNOWN)) == [fact], (each.facts, other)
            tried.add(fact)
    assert tried == {"kind", "count", "position", "background", "nothing else"}


def test_a_match_is_where_the_squared_error_is_least():
    """By laying every template at every place over the picture, in a loop."""
    picture = drawn(at("dog", 20, 30), background="blue")
    levels_HW3 = smoothed(np.asarray(picture, float), (0, 1))
    errors = {}
    for kind in KINDS:
        for side in (18, 20, 22):
            for left in range(17, 24):
                there = np.asarray(drawn(at(kind, left, 30, side), background="blue"), float)
                errors[kind, left, side] = ((smoothed(there, (0, 1)) - levels_HW3) ** 2).sum()
    kind, left, side = min(errors, key=errors.get)
    assert see(picture, KNOWN) == Shown("blue", [at(kind, left, 30, side)]) == Shown("blue", [at("dog", 20, 30)])


def test_what_is_no_known_thing_is_unknown():
    picture = drawn(at("dog", 6, 6))
    ImageDraw.Draw(picture).line((40, 20, 56, 56), fill=(0, 0, 0), width=4)
    shown = see(picture, KNOWN)
    assert [each.kind for each in shown.objects] == ["dog", UNKNOWN]
    assert check(facts(("dog", 1)), shown) == ["nothing else"]
    assert check(facts(("dog", 1), ("cat", 1)), shown) == ["kind"]


@pytest.mark.parametrize("colour", BACKGROUNDS)
def test_an_empty_picture_is_its_background(colour):
    levels = BACKGROUNDS[colour]
    assert see(Image.new("RGB", (64, 64), levels), KNOWN) == Shown(colour, [])
    shade = tuple(max(0, level - 15) for level in levels)
    assert see(Image.new("RGB", (50, 90), shade), KNOWN) == Shown(colour, [])


def test_a_background_that_is_none_of_the_colours_is_unknown():
    assert see(Image.new("RGB", (64, 64), (20, 20, 20)), KNOWN) == Shown(UNKNOWN, [])


def test_noise_is_not_taken_for_things():
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert {each.kind for each in see(Image.fromarray(noise_HW3), KNOWN).objects} <= {UNKNOWN}


def test_things_that_touch_are_told_apart():
    shown = see(drawn(at("dog", 10, 20), at("cat", 30, 20)), KNOWN)
    assert sorted(each.kind for each in shown.objects) == ["cat", "dog"]


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_picture_of_any_kind_is_what_it_shows(mode):
    """A palette has no levels between two, so it cannot be resized as it is."""
    picture = draw(SCENES[0], GLYPHS, 256).convert(mode)
    assert see(picture, KNOWN) == see(picture.convert("RGB"), KNOWN)


DOG, CAT, HIGH_DOG = at("dog", 4, 30), at("cat", 40, 30), at("dog", 4, 4)


@pytest.mark.parametrize(
    "stated, seen, broken",
    [
        (facts(("dog", 1), ("cat", 1)), [DOG, CAT], []),
        (facts(("dog", 1), ("cat", 1)), [DOG], ["count"]),
        (facts(("dog", 1), ("cat", 1)), [DOG, CAT, HIGH_DOG], ["count"]),
        (facts(("dog", 1)), [DOG, CAT], ["nothing else"]),
        (facts(("dog", 2)), [DOG, HIGH_DOG], []),
        (facts(("dog", 2)), [DOG, CAT], ["kind"]),
        (facts(("dog", 1), ("cat", 1), relation="left of"), [DOG, CAT], []),
        (facts(("dog", 1), ("cat", 1), relation="right of"), [DOG, CAT], ["position"]),
        (facts(("dog", 1), ("cat", 1), relation="right of"), [DOG], ["count"]),
        (facts(("dog", 2), ("cat", 1), relation="left of"), [DOG, CAT, at("dog", 4, 2)], []),
        (facts(("dog", 2), ("cat", 1), relation="left of"), [DOG, CAT, at("dog", 40, 2)], ["position"]),
        # Two of three dogs lie where they should, so only their number is wrong.
        (facts(("dog", 2), ("cat", 1), relation="left of"), [DOG, CAT, HIGH_DOG, at("dog", 40, 4)], ["count"]),
        (facts(("dog", 1), background="white"), [DOG], []),
        (facts(("dog", 1), background="blue"), [DOG], ["background"]),
    ],
)
def test_facts_are_checked_one_by_one(stated, seen, broken):
    assert check(stated, Shown("white", seen)) == broken
    assert check(stated, Shown("white", seen[::-1])) == broken
