"""Scenes, captions and masks of the shapes world, held against closed forms, a parser of captions and the rule."""

import hashlib
import math
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from diffusion.errors import GazeError
from pipelines.places import GAP, MARGIN, SIDE, centre
from pipelines.shapes.captions import SYNONYMS, caption, words
from pipelines.shapes.world import COLOURS, SHAPES, SIZES, SKILLS, coverage, draw, masks, scene

SEEN = [scene(0, index) for index in range(1200)]
HELD_OUT = [scene(0, index, "heldout") for index in range(600)]
ALL = [*SEEN, *HELD_OUT]
PLURALS = {"crosses": "cross", "pluses": "plus"} | {
    f"{noun}s": noun for noun in ("circle", "disc", "square", "triangle", "ring", "hoop")
}
NAMES = {said: name for name, synonyms in SYNONYMS.items() for said in synonyms}


def held_out(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 7 == 0


def parse(text):
    """What a caption says, by reading it."""
    between = "to the left of|to the right of|left of|right of|above|over|below|under|and|with"
    first, relation, second = re.fullmatch(rf"(.+?)(?: ({between}) (.+))?", text).groups()
    relation = NAMES.get(relation, relation)
    return [thing(part) for part in (first, second) if part], None if relation in (None, "and") else relation


def thing(text):
    found = {"count": 1}
    *adjectives, noun = text.split()
    if adjectives[0] == "a":
        del adjectives[0]
    else:
        found["count"] = int(NAMES[adjectives.pop(0)])
        noun = PLURALS[noun]
    found["shape"] = NAMES.get(noun, noun)
    for word in (NAMES.get(word, word) for word in adjectives):
        found["colour" if word in COLOURS else "size"] = word
    return found


@pytest.mark.parametrize(
    "shape, share", [("circle", math.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 5 / 9)]
)
@pytest.mark.parametrize("side", [15, 27])
def test_the_area_of_a_shape_is_that_of_geometry(shape, share, side):
    assert coverage(shape, (20, 30, 20 + side, 30 + side)).sum() == pytest.approx(share * side**2, rel=0.02)


def test_a_ring_is_a_circle_with_a_hole_of_half_its_width():
    ring, circle = (coverage(shape, (8, 8, 40, 40)) for shape in ("ring", "circle"))
    assert ring.sum() == pytest.approx(math.pi * (16**2 - 8**2), rel=0.01)
    assert np.array_equal(circle - ring, coverage("circle", (16, 16, 32, 32)))


def test_pictures_are_the_colours_inside_and_white_outside():
    for each in ALL[:60]:
        levels_HW3, covered_HW = np.asarray(draw(each)).astype(int), np.zeros((SIDE, SIDE))
        for thing, mask_HW in zip(each.objects, masks(each), strict=True):
            inside_HW = coverage(thing.shape, thing.box)
            assert (levels_HW3[inside_HW == 1] == COLOURS[thing.colour]).all()
            assert np.array_equal(mask_HW, inside_HW >= 0.5)
            covered_HW += inside_HW
        assert covered_HW.max() <= 1
        assert (levels_HW3[covered_HW == 0] == 255).all()


def test_a_larger_picture_shows_the_same():
    each = SEEN[5]
    levels_HWhw3 = np.asarray(draw(each, 2 * SIDE)).astype(float).reshape(SIDE, 2, SIDE, 2, 3)
    assert np.abs(levels_HWhw3.mean((1, 3)) - np.asarray(draw(each))).mean() < 1


def test_objects_lie_inside_and_apart_and_have_their_size():
    for each in ALL:
        for (left, top, right, bottom), size in ((found.box, found.size) for found in each.objects):
            assert min(left, top) >= MARGIN
            assert max(right, bottom) <= SIDE - MARGIN
            assert right - left == bottom - top
            assert right - left in SIZES[size]
        for one, other in combinations((found.box for found in each.objects), 2):
            gaps = [max(one[i], other[i]) - min(one[i + 2], other[i + 2]) for i in (0, 1)]
            assert max(gaps) >= GAP


def test_the_facts_are_true_of_the_objects():
    directions = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for each in ALL:
        asked = [thing for thing in each.facts["objects"] for _ in range(thing["count"])]
        for thing, found in zip(asked, each.objects, strict=True):
            stated = {key: value for key, value in thing.items() if key != "count"}
            assert stated == {key: getattr(found, key) for key in stated}
        if each.facts["relation"]:
            (x, y), (u, v) = (centre(found.box) for found in each.objects)
            across, down = directions[each.facts["relation"]]
            assert (x - u) * across + (y - v) * down >= abs((x - u) * down) + abs((y - v) * across) + 6


def test_equal_objects_are_equal():
    for each in ALL[2 :: len(SKILLS)]:
        assert len({(found.shape, found.colour, found.size) for found in each.objects}) == 1
        assert 2 <= len(each.objects) <= 4


def test_captions_say_the_facts_and_no_more():
    for each in ALL:
        assert parse(caption(each)) == (each.facts["objects"], each.facts["relation"])


def test_skills_are_what_they_are_called():
    for index, each in enumerate(ALL):
        facts = each.facts
        things, keys = facts["objects"], [set(thing) - {"shape", "count"} for thing in facts["objects"]]
        assert facts["skill"] == SKILLS[index % len(SKILLS)]
        assert len({thing["shape"] for thing in things}) == len(things)
        assert (facts["relation"] is not None) == (facts["skill"] == "position")
        assert {
            "single object": len(things) == 1 and "size" in keys[0],
            "two objects": keys == [set(), set()],
            "counting": len(things) == 1 and things[0]["count"] > 1 and "size" not in keys[0],
            "colours": keys == [{"colour"}],
            "position": keys == [{"colour"}] * 2,
            "colour binding": keys == [{"colour"}] * 2 and things[0].get("colour") != things[1].get("colour"),
        }[facts["skill"]]


def test_words_know_the_objects_that_they_describe():
    for each in ALL[:300]:
        said = words(each)
        assert " ".join(word.text for word in said) == caption(each)
        described = set()
        for word in said:
            name = PLURALS.get(word.text, word.text)
            for found in (each.objects[number] for number in word.objects):
                known = (found.shape, found.colour, found.size, str(len(each.objects)))
                assert NAMES.get(name, name) in known
            described |= set(word.objects)
            if word.text in ("a", "and", "with", "to", "the", "left", "right", "of", "above", "over", "below", "under"):
                assert word.objects == ()
            else:
                assert word.objects
        assert described == set(range(len(each.objects)))


def test_nothing_held_out_is_in_a_seen_scene():
    for each in SEEN:
        kinds = Counter((found.shape, found.colour, found.size) for found in each.objects)
        assert not any(held_out(f"{colour} {shape}") for shape, colour, _ in kinds)
        assert not any(held_out(f"{count} {shape}") for (shape, *_), count in kinds.items() if count > 1)
        assert not any(held_out(f"{a[0]} and {b[0]}") for a, b in combinations(sorted(kinds), 2))


def test_a_held_out_caption_says_what_was_held_out():
    for each in HELD_OUT:
        things, _ = parse(caption(each))
        said = [f"{thing['colour']} {thing['shape']}" for thing in things if "colour" in thing]
        said += [f"{thing['count']} {thing['shape']}" for thing in things if thing["count"] > 1]
        said += [" and ".join(sorted(thing["shape"] for thing in things))] if len(things) == 2 else []
        assert any(map(held_out, said))


def test_what_is_held_out_is_a_few_of_each_kind():
    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if held_out(f"{colour} {shape}")]
    assert pairs == ["green circle", "blue triangle", "blue cross", "purple cross", "cyan ring", "black square"]
    both = [" and ".join(two) for two in combinations(sorted(SHAPES), 2) if held_out(" and ".join(two))]
    assert both == ["circle and cross", "circle and triangle", "ring and triangle"]
    counts = [f"{count} {shape}" for count in (2, 3, 4) for shape in SHAPES if held_out(f"{count} {shape}")]
    assert counts == ["3 cross", "4 circle"]


def test_every_word_of_a_held_out_caption_is_seen_often():
    seen = Counter(word for each in SEEN for word in caption(each).split())
    assert {word for each in HELD_OUT for word in caption(each).split()} <= set(seen)
    assert len(seen) < 60
    assert min(seen.values()) >= 5  # of 1,200


def test_scenes_are_a_function_of_seed_index_and_split():
    assert scene(3, 17) == scene(3, 17)
    boxes = {scene(*place).objects[0].box for place in ((3, 17), (4, 17), (3, 23), (3, 17, "heldout"))}
    assert len(boxes) == 4
    # What is trained on and what is reported must stay the same pictures.
    assert [caption(each) for each in SEEN[:6]] == [
        "a little triangle",
        "a cross with a square",
        "three triangles",
        "a green ring",
        "a red square right of a violet hoop",
        "a yellow hoop with a red disc",
    ]
    assert [each.box for each in SEEN[4].objects] == [(43, 22, 58, 37), (7, 16, 34, 43)]


def test_an_unknown_split_is_named():
    with pytest.raises(GazeError, match=r"unknown split 'held'\n.*did you mean 'heldout'"):
        scene(0, 0, "held")
