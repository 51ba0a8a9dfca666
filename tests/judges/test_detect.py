"""The judge by GenEval's protocol: its rules against a restatement of the published ones, its prompts, and what it
makes of transformers' detectors and classifiers, small random ones."""

import json
import math
from random import Random

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

from diffusion.errors import GazeError
from pipelines.evaluation import wilson
from pipelines.judges.colours import PHRASES, open_colours
from pipelines.judges.detect import Found, Rules, broken, detect_judge, objects, relations, summary
from pipelines.judges.detectors import open_detector
from pipelines.judges.everyday import NAMES, SKILLS, everyday, exam, plural
from pipelines.judges.facts import COLOURS, facts_for, facts_of, names_of
from pipelines.judges.pictures import Asked
from pipelines.judges.verdict import Verdict
from pipelines.places import RELATIONS
from pipelines.shapes.world import scene
from tests.judges import asked_models, small_judges

DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def box_at(x, y, width=10.0, height=10.0):
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def holds(relation, one, other, margin):
    """GenEval's rule, one relation at a time: the way from one centre to the other in its direction, less the margin,
    is more than half of the whole way."""
    along = DIRECTIONS[relation]
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in (one, other)]
    way = [a - b for a, b in zip(*centres, strict=True)]
    sizes = [(right - left, bottom - top) for left, top, right, bottom in (one, other)]
    room = sum(abs(d) * (a + b) for d, a, b in zip(along, *sizes, strict=True))
    return sum(d * w for d, w in zip(along, way, strict=True)) - margin * room > math.dist(*centres) / 2


def by_the_book(facts, found, colour_of, margin):
    """Is the picture right? GenEval's rules, as published."""
    matched = []
    for asked in facts["include"]:
        best = found.get(asked["class"], [])[: asked["count"]]
        right = len(best) == asked["count"]
        if right and "color" in asked:
            right = all(colour_of(each.box) == asked["color"] for each in best)
        if right and "position" in asked:
            relation, target = asked["position"]
            others = matched[target]
            right = others is not None and all(holds(relation, a.box, b.box, margin) for a in best for b in others)
        matched.append(best if right else None)
    few = all(len(found.get(asked["class"], [])) < asked["count"] for asked in facts["exclude"])
    return few and None not in matched


def test_relations_are_those_published():
    random = Random(0)
    seen = set()
    for _ in range(2000):
        one, other = (
            box_at(*(random.uniform(0, 60) for _ in range(2)), *(random.uniform(1, 40) for _ in range(2)))
            for _ in range(2)
        )
        margin = random.choice([0.0, 0.1, 0.3])
        expected = [relation for relation in RELATIONS if holds(relation, one, other, margin)]
        assert relations(one, other, margin) == expected
        seen.add(tuple(expected))
    assert {len(each) for each in seen} == {0, 1, 2}
    assert len(seen) == 9


@pytest.mark.parametrize(
    "one, seen",
    [
        (box_at(0, 50), ["left of"]),
        (box_at(100, 50), ["right of"]),
        (box_at(50, 0), ["above"]),
        (box_at(50, 100), ["below"]),
        (box_at(0, 0), ["left of", "above"]),
        (box_at(50, 50), []),
        (box_at(48.1, 50), []),  # within the margin, 0.1 * (10 + 10)
        (box_at(46.1, 50), []),  # of 3.9 pixels 1.9 are left
        (box_at(45.9, 50), ["left of"]),  # of 4.1 pixels 2.1
    ],
)
def test_where_a_box_lies(one, seen):
    assert relations(one, box_at(50, 50)) == seen


def found_at_random(random, names):
    """Some objects of each name, each of a colour that its box tells."""
    return {
        name: [
            Found(box_at(random.uniform(0, 64), random.uniform(0, 64), 8, 8), random.random())
            for _ in range(random.choice([0, 1, 1, 1, 2, 3, 5]))
        ]
        for name in names
    }


def colour_by_place(box):
    return "red" if int(box[0]) % 3 else "blue"


def test_rules_are_those_published():
    random = Random(1)
    rights = 0
    for _ in range(4000):
        include = []
        for number in range(random.choice([1, 1, 2, 2, 3])):
            include.append({"class": random.choice("abc"), "count": random.choice([1, 1, 1, 2, 3])})
            if random.random() < 0.3:
                include[-1]["color"] = random.choice(["red", "blue"])
            if number and random.random() < 0.6:
                include[-1]["position"] = [random.choice([*RELATIONS]), random.randrange(number)]
        exclude = [{"class": random.choice("abc"), "count": random.choice([2, 3, 4])}] if random.random() < 0.4 else []
        facts = {"skill": "any", "include": include, "exclude": exclude}
        found = found_at_random(random, "abc")
        wrong = broken(facts, found, lambda _, boxes: [colour_by_place(box) for box in boxes])
        assert (not wrong) == by_the_book(facts, found, colour_by_place, 0.1), (facts, found)
        rights += not wrong
    assert 400 < rights < 3600


DOG, CAT = Found(box_at(10, 30), 0.9), Found(box_at(50, 30), 0.8)


@pytest.mark.parametrize(
    "include, exclude, found, wrong",
    [
        ([{"class": "dog", "count": 1}], [], {"dog": [DOG]}, []),
        ([{"class": "dog", "count": 1}], [], {"cat": [CAT]}, [("missing", "dog", 0)]),
        ([{"class": "dog", "count": 3}], [], {"dog": [DOG, CAT]}, [("missing", "dog", 2)]),
        ([{"class": "dog", "count": 1}], [{"class": "dog", "count": 2}], {"dog": [DOG, CAT]}, [("too many", "dog", 2)]),
        ([{"class": "dog", "count": 1, "color": "red"}], [], {"dog": [DOG]}, []),
        ([{"class": "dog", "count": 1, "color": "blue"}], [], {"dog": [DOG]}, [("colour", "dog", ["red"])]),
        ([{"class": "dog", "count": 2, "color": "red"}], [], {"dog": [DOG, CAT]}, [("colour", "dog", ["red", "blue"])]),
        (
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            {"dog": [DOG], "cat": [CAT]},
            [],
        ),
        (
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
            [],
            {"dog": [DOG], "cat": [CAT]},
            [("position", "dog", ["left of"])],
        ),
        (
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            {"dog": [DOG]},
            [("missing", "cat", 0), ("position", "dog", [])],
        ),
        # Only the best box of each counts: the second dog lies right of the cat.
        (
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            {"dog": [DOG, Found(box_at(90, 30), 0.7)], "cat": [CAT]},
            [],
        ),
    ],
)
def test_what_is_broken_is_named(include, exclude, found, wrong):
    facts = {"skill": "any", "include": include, "exclude": exclude}
    named = broken(facts, found, lambda _, boxes: ["red" if box == DOG.box else "blue" for box in boxes])
    assert [(each["fact"], each["name"], each["seen"]) for each in named] == wrong


def test_what_counts_as_found():
    low, good, again, best = (Found(box_at(x, 30), score) for x, score in ((60, 0.3), (10, 0.5), (11, 0.4), (40, 0.9)))
    assert objects([low, good, again, best], 0.3) == [best, good]  # `again` overlaps 9 / 11 with a better one
    assert objects([low, good, again, best], 0.3, Rules(max_overlap=1)) == [best, good, again]
    assert objects([low, good, again, best], 0.2, Rules(max_overlap=0)) == [best, good, low]
    assert objects([low, good, again, best], 0.0, Rules(most=3)) == [best, good]
    assert objects([good, good], 0.0, Rules(max_overlap=1)) == [good, good]
    point = Found((5.0, 5.0, 5.0, 5.0), 0.9)
    assert objects([point, point], 0.0) == [point, point]


# Prompts

FIRST = ["a picture of a spoon", "an image that shows three owls", "a picture of a dog below a basket"]


def test_prompts_are_a_function_of_seed_and_index():
    assert [everyday(index)["prompt"] for index in (0, 2, 4)] == FIRST
    assert everyday(7) == everyday(7)
    assert everyday(7, seed=1) != everyday(7)
    assert [each.more["tag"] for each in exam(12)] == [*SKILLS, *SKILLS]
    singles = [everyday(6 * index)["include"][0]["class"] for index in range(len(NAMES))]
    assert sorted(singles) == sorted(NAMES)
    with pytest.raises(GazeError, match="5 prompts are too few for 6 skills"):
        exam(5)


def drawn(facts, random):
    """What a perfect detector finds in a perfect picture, and a function that tells the colours."""
    found, colours = {}, {}
    for number, asked in enumerate(facts["include"]):
        right, down = DIRECTIONS[asked["position"][0]] if "position" in asked else (0, 100 * number)
        boxes = [box_at(500 + 200 * right + 30 * i, 500 + 200 * down) for i in range(asked["count"])]
        found[asked["class"]] = [Found(box, random.uniform(0.5, 1)) for box in boxes]
        colours |= {box: asked.get("color", "white") for box in boxes}
    return found, lambda _, boxes: [colours[box] for box in boxes]


def test_a_perfect_picture_is_right_and_a_wrong_one_is_not():
    random = Random(2)
    for index in range(120):
        entry = everyday(index)
        facts = facts_of(entry["prompt"], entry)
        found, colours = drawn(facts, random)
        assert broken(facts, found, colours) == [], entry
        name = facts["include"][-1]["class"]
        assert "missing" in [each["fact"] for each in broken(facts, {**found, name: found[name][:-1]}, colours)]
        if facts["skill"] == "counting":
            more = {name: [*found[name], Found(box_at(900, 900), 0.9)]}
            assert [each["fact"] for each in broken(facts, more, colours)] == ["too many"]
        if facts["skill"] in ("colors", "color_attr"):
            pale = [each["fact"] for each in broken(facts, found, lambda _, boxes: ["grey"] * len(boxes))]
            assert pale == ["colour"] * len(facts["include"])
        if facts["skill"] == "position":
            first, second = names_of(facts)
            exchanged = {first: found[second], second: found[first]}
            assert [each["fact"] for each in broken(facts, exchanged, colours)] == ["position"]


def test_a_prompt_says_its_facts():
    for index in range(300):
        entry = everyday(index)
        prompt = entry["prompt"]
        for asked in entry["include"]:
            noun = asked["class"] if asked["count"] == 1 else plural(asked["class"])
            colour = f"{asked['color']} " if "color" in asked else ""
            assert f" {colour}{noun}" in prompt
            assert asked.get("color", "red") in COLOURS
        assert (entry["tag"] == "position") == any(relation in prompt for relation in RELATIONS)
        if entry["tag"] == "position":
            one = entry["include"][1]
            assert prompt.index(f" {one['class']}") < prompt.index(one["position"][0])
            assert f"{one['position'][0]} a" in prompt


def test_plurals():
    assert [plural(noun) for noun in ("cup", "bus", "strawberry", "key", "computer mouse", "wine glass", "sheep")] == [
        *("cups", "buses", "strawberries", "keys", "computer mice", "wine glasses", "sheep")
    ]


# Facts


def test_facts_of_a_prompts_file_and_of_a_drawn_scene():
    line = {"tag": "colors", "prompt": "x", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    assert facts_of("x", line) == {"skill": "colors", "include": line["include"], "exclude": []}
    drawn_scene = scene(0, 4)
    facts = facts_of("x", {"facts": drawn_scene.facts})
    first, second = drawn_scene.facts["objects"]
    assert facts["skill"] == "position"
    assert [each["class"] for each in facts["include"]] == [second["shape"], first["shape"]]
    assert facts["include"][1]["position"] == [drawn_scene.facts["relation"], 0]
    assert facts["include"][0]["color"] == second["colour"]
    emoji = {
        "objects": [{"kind": "red apple", "count": 2}],
        "relation": None,
        "background": "pink",
        "skill": "counting",
    }
    assert facts_of("x", {"facts": emoji}) == {
        "skill": "counting",
        "include": [{"class": "red apple", "count": 2}],
        "exclude": [{"class": "red apple", "count": 3}],
    }


def test_lines_that_contradict_each_other_are_named():
    cup, two = ({"include": [{"class": "cup", "count": count}]} for count in (1, 2))
    assert facts_for([Asked("a cup", cup), Asked("a (cup:1.2)", cup)]) == {"a cup": facts_of("a cup", cup)}
    with pytest.raises(GazeError, match="two lines say different facts of 'a cup'"):
        facts_for([Asked("a cup", cup), Asked("a cup", two)])
    own = exam(2000)  # some of them more than once
    assert len(facts_for(own)) < 2000


@pytest.mark.parametrize(
    "entry, says",
    [
        ({}, "nothing says what a picture of 'x' must show"),
        ({"include": []}, "name no object"),
        ({"facts": 3}, "nothing says what a picture of 'x' must show"),
        ({"facts": {"objects": [3]}}, "are not those of a drawn scene"),
        ({"facts": {"objects": [{"shape": "ring", "count": "2"}]}}, "are not those of a drawn scene"),
        (
            {"facts": {"objects": [{"shape": "ring", "count": 1}], "relation": "above"}},
            "are not those of a drawn scene",
        ),
        ({"include": ["cup"]}, "'cup' is no object"),
        ({"include": [{"count": 1}]}, "the class of an object is None"),
        ({"include": [{"class": "cup", "count": 0}]}, "the count of cup is 0"),
        ({"include": [{"class": "cup", "count": True}]}, "the count of cup is True"),
        ({"include": [{"class": "cup", "count": 1, "color": 3}]}, "the color of cup is 3"),
        ({"include": [{"class": "cup", "count": 1, "position": "above"}]}, "the position of cup is 'above'"),
        ({"include": [{"class": "cup", "count": 1, "position": ["abov", 0]}]}, "did you mean 'above'"),
        ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "object 0, but only 0 come before it"),
        ({"include": [{"class": "cup", "count": 1}], "exclude": [{"class": "cup"}]}, "the count of cup is None"),
    ],
)
def test_bad_facts_are_named(entry, says):
    with pytest.raises(GazeError, match=says):
        facts_of("x", entry)


# The judge


PICTURE = Image.new("RGB", (48, 32), "white")
COUNTED = {"skill": "counting", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]}
PLAIN = {"skill": "single_object", "include": [{"class": "dog", "count": 1}], "exclude": []}


def test_the_judge_looks_for_all_names_and_counts_by_its_own_threshold():
    asked = []

    def find(_, names):
        asked.append(names)
        return {"cat": [Found(box_at(30, 9), 0.5), Found(box_at(9, 9), 0.95)], "dog": [Found(box_at(9, 9), 0.5)]}

    facts = {"one cat": COUNTED, "a dog": PLAIN}
    verdicts = detect_judge(find, None, facts, Rules(counting_threshold=0.9))(["one cat", "a dog"], [PICTURE] * 2)
    assert [each.score for each in verdicts] == [1.0, 1.0]
    assert verdicts[0].said == {"skill": "counting", "broken": [], "found": {"cat": [[4.0, 4.0, 14.0, 14.0, 0.95]]}}
    assert [len(verdicts[1].said["found"][name]) for name in ("cat", "dog")] == [2, 1]
    assert asked == [["cat", "dog"]] * 2
    (few,) = detect_judge(find, None, facts, only_asked=True)(["one cat"], [PICTURE])
    assert few.said["broken"] == [{"fact": "too many", "name": "cat", "seen": 2}]
    assert asked[2:] == [["cat"]]


def test_a_judge_that_does_not_fit_is_an_error():
    coloured = {
        "a red cat": {"skill": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "exclude": []}
    }
    with pytest.raises(GazeError, match="'a red cat' names a colour, and nothing judges colours"):
        detect_judge(lambda *_: {}, None, coloured)
    with pytest.raises(GazeError, match="nothing says what a picture of 'a cow' must show"):
        detect_judge(lambda *_: {}, None, {"a dog": PLAIN})(["a cow"], [PICTURE])


def test_the_interval_holds_where_skills_have_not_equally_many_pictures():
    """The mean of 10 and of 200 is known as a share of 38 is, not of 210."""
    random, held, kinds = Random(5), 0, {"one": 10, "other": 200}
    for _ in range(300):
        verdicts = [
            Verdict(0.0, {"skill": skill, "broken": [] if random.random() < 0.7 else [{"fact": "missing"}]})
            for skill, n in kinds.items()
            for _ in range(n)
        ]
        found = summary(verdicts)
        held += found["low"] <= 0.7 <= found["high"]
    assert found["n"] == 210
    assert (found["low"], found["high"]) == pytest.approx(wilson(38.095238 * found["score"], 38.095238))
    assert 0.91 < held / 300 < 0.99


# Models


@pytest.fixture(scope="module")
def picture():
    random = Random(3)
    levels = bytes(random.randrange(256) for _ in range(40 * 30 * 3))
    return Image.frombytes("RGB", (40, 30), levels)


@pytest.mark.parametrize("second", [False, True], ids=["owlvit", "owlv2"])
def test_each_box_of_owl_goes_to_the_name_that_fits_best(tmp_path, picture, second):
    folder, names = asked_models.owl(tmp_path, second), ["cat", "red dog", "cup"]
    found = open_detector(folder, threshold=0.5)(picture, names)
    model, processor = opened(folder, AutoModelForZeroShotObjectDetection)
    inputs = processor(text=[[f"a photo of a {name}" for name in names]], images=picture, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    wide, high = (40, 40) if second else (40, 30)  # OWLv2 sees a square, the picture at its upper left
    expected = []
    for logits_N, box in zip(outputs.logits[0].tolist(), outputs.pred_boxes[0].tolist(), strict=True):
        expected += [
            (1 / (1 + math.exp(-max(logits_N))), names[logits_N.index(max(logits_N))], corners(box, wide, high))
        ]
    same([row for row in expected if row[0] > 0.5], found)
    assert 0 < sum(map(len, found.values())) < 16


def corners(box, wide, high):
    x, y, width, height = box
    return [wide * (x - width / 2), high * (y - height / 2), wide * (x + width / 2), high * (y + height / 2)]


def same(expected, found):
    """expected: score, name and box of each. found: as a detector gives it."""
    flat = [(each.score, name, each.box) for name, of in found.items() for each in of]
    assert len(flat) == len(expected)
    by_name = (sorted(rows, key=lambda row: row[1]) for rows in (flat, expected))  # otherwise as they came
    for (score, name, box), (their_score, their_name, their_box) in zip(*by_name, strict=True):
        assert name == their_name
        assert score == pytest.approx(their_score, abs=1e-5)
        assert box == pytest.approx(their_box, abs=1e-3)


def test_what_grounding_dino_finds_is_a_mean_over_the_tokens_of_a_name(tmp_path, picture):
    folder, names = asked_models.grounding_dino(tmp_path), ["red cat", "hot dog", "dog", "cup"]
    found = open_detector(folder, threshold=0.1)(picture, names)
    model, processor = opened(folder, AutoModelForZeroShotObjectDetection)
    inputs = processor(text="red cat. hot dog. dog. cup.", images=picture, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    places = {"red cat": [1, 2], "hot dog": [4, 5], "dog": [7], "cup": [9, 10, 11]}  # cup is read as c ##u ##p
    assert inputs["input_ids"].shape[1] == 14
    expected = []
    for logits_T, box in zip(outputs.logits[0].tolist(), outputs.pred_boxes[0].tolist(), strict=True):
        means = {
            name: sum(1 / (1 + math.exp(-logits_T[place])) for place in of) / len(of) for name, of in places.items()
        }
        name = max(means, key=lambda each: means[each])
        expected += [(means[name], name, corners(box, 40, 30))] if means[name] > 0.1 else []
    same(expected, found)
    assert len(expected) > 5, expected
    with pytest.raises(GazeError, match="17 names are more than the 32 tokens that this detector reads at once"):
        open_detector(folder)(picture, ["dog"] * 17)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stored, "model_max_length": 32}))
    with pytest.raises(GazeError, match="17 names are more than the 32 tokens"):  # and none of them is cut off
        open_detector(folder)(picture, ["dog"] * 17)


def opened(folder, auto):
    return auto.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")


def test_the_colour_is_that_of_the_nearest_mean_of_three_phrases(tmp_path, picture):
    folder, colours = small_judges.clip(tmp_path), ["red", "blue", "green", "black"]
    boxes = [(0, 0, 20, 30), (12.4, 3.6, 35.2, 28), (-5, -5, 60, 60), (39.9, 10, 39.95, 10.01)]
    whole = [(0, 0, 20, 30), (12, 4, 35, 28), (0, 0, 40, 30), (39, 10, 40, 11)]
    model, processor = opened(folder, AutoModel)
    phrases = [phrase.format(colour=colour, name="cat") for colour in colours for phrase in PHRASES]
    inputs = processor(
        text=phrases, images=[picture.crop(box) for box in whole], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**inputs)
    means = [sum(outputs.text_embeds[3 * number : 3 * number + 3].double()) for number in range(len(colours))]
    near = [[float(embed.double() @ mean / mean.norm()) for mean in means] for embed in outputs.image_embeds]
    named = open_colours(folder, colours)(picture, boxes, "cat")
    assert named == [colours[each.index(max(each))] for each in near]
    with pytest.raises(GazeError, match="is ViltModel, and a model that embeds texts and pictures"):
        open_colours(asked_models.vilt(tmp_path / "vilt"), colours)


def test_colours_by_a_siglip_whose_tokenizer_knows_no_length(tmp_path, picture):
    """It was trained with texts that are filled up to the length that it reads."""
    folder, colours = small_judges.siglip(tmp_path), ["red", "blue", "green", "black"]
    expected = open_colours(folder, colours)(picture, [(0, 0, 20, 30), (20, 10, 40, 30)], "red cat")
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    del stored["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    assert open_colours(folder, colours)(picture, [(0, 0, 20, 30), (20, 10, 40, 30)], "red cat") == expected


def test_a_model_of_another_kind_is_an_error(tmp_path):
    with pytest.raises(GazeError, match="is a CLIPModel, and a detector that is given names"):
        open_detector(small_judges.clip(tmp_path))


def test_owlv2_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.judges.detectors.find_spec", lambda name: None)
    with pytest.raises(GazeError, match="pip install scipy"):
        open_detector(asked_models.owl(tmp_path, second=True))
