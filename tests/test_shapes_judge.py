"""The judge of the shapes world: right on true scenes, however disturbed, and exact about what is wrong with others."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.judge import blurred, breaks, compressed, kinds, noisy
from pipelines.places import SPLITS
from pipelines.regions import connected
from pipelines.shapes.judge import UNKNOWN, check, see
from pipelines.shapes.world import COLOURS, SHAPES, Object, Scene, draw, masks, scene

SCENES = [scene(7, index // 2, SPLITS[index % 2]) for index in range(96)]
PICTURES = [draw(each) for each in SCENES]
CIRCLE = {"shape": "circle", "count": 1, "colour": "red"}
SQUARE = {"shape": "square", "count": 1, "colour": "blue"}


def drawn(*objects):
    return draw(Scene("", {}, objects))


def at(shape, colour, left, top, side=16):
    return Object(shape, colour, "small" if side < 21 else "large", (left, top, left + side, top + side))


def facts(*things, relation=None):
    return {"skill": "any", "objects": list(things), "relation": relation}


@pytest.mark.parametrize("disturb", [list, noisy, blurred, compressed])
def test_true_scenes_are_seen_and_right(disturb):
    for each, image in zip(SCENES, disturb(PICTURES), strict=True):
        seen = see(image)
        assert kinds(seen) == kinds(each.objects), each.name
        assert check(each.facts, seen) == [], each.name


@pytest.mark.parametrize("size", [32, 100, 128])
def test_pictures_of_another_size_are_seen_too(size):
    for each in SCENES[:24]:
        assert kinds(see(draw(each, size))) == kinds(each.objects)


def test_masks_and_boxes_are_those_of_the_scene():
    for each, picture in zip(SCENES[:36], PICTURES, strict=False):
        seen = see(picture)
        for mask_HW, found in zip(masks(each), each.objects, strict=True):
            best = max(seen, key=lambda other: (other.mask_HW & mask_HW).sum())
            assert (best.mask_HW ^ mask_HW).sum() <= 3  # colours are whole numbers, so half a pixel may be rounded
            assert np.abs(np.subtract(best.box, found.box)).max() <= 2  # the tip of a triangle is thin
            rows, columns = best.mask_HW.nonzero()
            assert best.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_exactly_the_broken_fact_is_named():
    tried = set()
    for each in SCENES[:36]:
        for fact, other in breaks(each, Random(each.name)):
            assert check(each.facts, see(draw(other))) == [fact], (each.facts, other.objects)
            tried.add(fact)
    assert tried == {"shape", "colour", "size", "count", "position", "nothing else"}


def test_connected_parts_are_scipys():
    random = np.random.default_rng(0)
    for kinds_HW in (random.integers(0, 3, (20, 31)), random.integers(0, 2, (64, 64)), np.ones((5, 4), int)):
        labels_HW = connected(kinds_HW)
        count = 0
        for kind in range(1, kinds_HW.max() + 1):
            expected_HW, found = ndimage.label(kinds_HW == kind, np.ones((3, 3)))
            count += found
            pairs = np.unique(np.stack([labels_HW, expected_HW])[:, kinds_HW == kind], axis=1)
            assert pairs.shape[1] == found
        assert set(np.unique(labels_HW)) - {0} == set(range(1, count + 1))
        assert ((labels_HW == 0) == (kinds_HW == 0)).all()


def test_nothing_is_seen_where_nothing_is():
    assert see(Image.new("RGB", (64, 64), "white")) == []
    assert see(Image.new("RGBA", (64, 64), (0, 0, 0, 0))) == []
    assert see(Image.new("RGB", (64, 64), (230, 200, 200))) == []  # paler than half of any colour


def test_a_full_picture_is_one_object_without_a_shape():
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (Image.new("RGB", (64, 64), "black"), Image.new("L", (3, 2), 20), Image.fromarray(noise_HW3)):
        (one,) = see(picture)
        assert (one.shape, one.size) == (UNKNOWN, "large")
        assert max(one.box) == 64
        assert check(facts({"shape": "square", "count": 1, "colour": one.colour}), [one]) == ["shape"]


def test_specks_do_not_count_but_strays_and_much_dirt_do():
    picture = drawn(at("circle", "red", 4, 4))
    pen = ImageDraw.Draw(picture)
    for left in (30, 40, 50):
        pen.rectangle((left, 50, left + 3, 53), fill=COLOURS["blue"])
    assert check(facts(CIRCLE), see(picture)) == []
    pen.rectangle((30, 20, 36, 26), fill=COLOURS["blue"])
    assert check(facts(CIRCLE), see(picture)) == ["nothing else"]
    picture = drawn(at("circle", "red", 4, 4))
    pen = ImageDraw.Draw(picture)
    for place in range(8):
        pen.rectangle((2 + 7 * place, 50, 5 + 7 * place, 53), fill=COLOURS["blue"])
    assert check(facts(CIRCLE), see(picture)) == ["nothing else"]


def test_what_is_no_shape_is_none():
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).line((4, 60, 60, 4), fill=COLOURS["green"], width=4)
    (found,) = see(picture)
    assert (found.shape, found.colour) == (UNKNOWN, "green")
    assert check(facts({"shape": "cross", "count": 1}), [found]) == ["shape"]


def test_objects_that_touch_are_told_apart_by_colour():
    picture = drawn(at("square", "red", 10, 20), at("square", "blue", 26, 20))
    assert kinds(see(picture)) == {("square", "red", "small"): 1, ("square", "blue", "small"): 1}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shades_of_a_colour_are_that_colour(shape, colour):
    levels = np.array(COLOURS[colour])
    for shade in (levels * 0.8, levels + 0.25 * (255 - levels)):
        levels_HW3 = np.full((64, 64, 3), 255.0)
        (mask_HW,) = masks(Scene("", {}, (at(shape, colour, 20, 24),)))
        levels_HW3[mask_HW] = shade
        (found,) = see(Image.fromarray(levels_HW3.astype(np.uint8)))
        assert (found.shape, found.colour) == (shape, colour)


A_CIRCLE, A_SQUARE = at("circle", "red", 4, 4), at("square", "blue", 30, 10)


@pytest.mark.parametrize(
    "stated, seen, broken",
    [
        (facts(CIRCLE), [A_CIRCLE], []),
        (facts(CIRCLE), [], ["count"]),
        (facts(CIRCLE), [A_CIRCLE, A_CIRCLE], ["count"]),
        (facts(CIRCLE), [A_CIRCLE, A_SQUARE], ["nothing else"]),
        (facts(CIRCLE), [A_SQUARE], ["shape", "colour"]),
        (facts({**CIRCLE, "size": "large"}), [A_CIRCLE], ["size"]),
        (facts({"shape": "circle", "count": 1}), [replace(A_CIRCLE, colour="green", size="large")], []),
        (facts({**CIRCLE, "count": 3}), [A_CIRCLE] * 3, []),
        (facts({**CIRCLE, "count": 3}), [A_CIRCLE] * 2, ["count"]),
        (facts({**CIRCLE, "count": 3}), [A_CIRCLE] * 4, ["count"]),
        (facts({**CIRCLE, "count": 2}), [A_CIRCLE, A_SQUARE], ["shape", "colour"]),
        (facts(CIRCLE, SQUARE), [A_SQUARE, A_CIRCLE], []),
        (facts(CIRCLE, SQUARE), [A_CIRCLE], ["count"]),
        (facts(CIRCLE, SQUARE), [replace(A_CIRCLE, colour="blue"), replace(A_SQUARE, colour="red")], ["colour"]),
        (facts(CIRCLE, SQUARE, relation="left of"), [A_SQUARE, A_CIRCLE], []),
        (facts(CIRCLE, SQUARE, relation="right of"), [A_SQUARE, A_CIRCLE], ["position"]),
        (facts(CIRCLE, SQUARE, relation="above"), [A_SQUARE, A_CIRCLE], ["position"]),
        (facts(CIRCLE, SQUARE, relation="above"), [A_CIRCLE], ["count"]),
        # One of two circles lies where it should, so only their number is wrong.
        (facts(CIRCLE, SQUARE, relation="above"), [A_CIRCLE, A_SQUARE, at("circle", "red", 28, -9)], ["count"]),
    ],
)
def test_facts_are_checked_one_by_one(stated, seen, broken):
    assert check(stated, seen) == broken
    assert check(stated, seen[::-1]) == broken
