"""Prompts about everyday objects with their facts, by GenEval's protocol: six skills in turn, each prompt a function of
(seed, index)."""

from __future__ import annotations

from random import Random
from typing import Any

from ..places import RELATIONS
from ..skills import enough
from .facts import COLOURS, COUNTING
from .pictures import Asked

SKILLS = ("single_object", "two_object", COUNTING, "colors", "position", "color_attr")  # named as GenEval's tags
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPENINGS = ("a picture of", "a photograph of", "an image that shows")
SIDES = {"left of": "to the left of", "right of": "to the right of"}
IRREGULAR = {
    "person": "people",
    "mouse": "mice",
    "knife": "knives",
    "sheep": "sheep",
    "scissors": "scissors",
    "skis": "skis",
}
WORDS = (
    "apple armchair backpack ball banana basket bear bed bell bench bicycle bird boat book bottle bowl bridge broom "
    "bucket bus butterfly cake camera candle car carrot cat chair clock coat cow crab cup dog donkey door drum duck "
    "elephant envelope flower fork frog giraffe guitar hammer hat horse house kettle key kite ladder lamp laptop lemon "
    "lion mirror mushroom owl parrot pear penguin piano pillow plate pumpkin rabbit ship shoe shovel snail sofa spoon "
    "strawberry suitcase table teapot tent tractor train tree trumpet turtle umbrella vase violin watch wheel zebra"
)
NAMES = WORDS.split()


def everyday(index: int, seed: int = 0) -> dict[str, Any]:
    """Prompt number `index` and its facts, as a line of GenEval's evaluation_metadata.jsonl; its skill is
    SKILLS[index % 6]. As many prompts about a single object as there are names have each name once."""
    random = Random(f"everyday/{seed}/{index}")
    skill = SKILLS[index % len(SKILLS)]
    one, other = ({"class": name, "count": 1} for name in random.sample(NAMES, 2))
    opening, colours = random.choice(OPENINGS), random.sample(COLOURS, 2)
    relation, count = random.choice([*RELATIONS]), random.choice([*NUMBERS])
    if skill == "single_object":
        one["class"] = Random(f"everyday/{seed}").sample(NAMES, len(NAMES))[index // len(SKILLS) % len(NAMES)]
    if skill == COUNTING:
        one["count"] = count
    if skill in ("colors", "color_attr"):
        one["color"], other["color"] = colours
    things = [one, other] if skill in ("two_object", "position", "color_attr") else [one]
    between = SIDES.get(relation, relation) if skill == "position" else "and"
    return {
        "tag": skill,
        "prompt": f"{opening} {f' {between} '.join(_said(thing) for thing in things)}",
        "include": [other, {**one, "position": [relation, 0]}] if skill == "position" else things,
        "exclude": [{**one, "count": count + 1}] if skill == COUNTING else [],
    }


def exam(n: int = 300) -> list[Asked]:
    """The first n prompts of seed 0, with their facts. GazeError: fewer than there are skills."""
    entries = [everyday(index) for index in range(enough(n, SKILLS))]
    return [Asked(entry["prompt"], entry) for entry in entries]


def plural(noun: str) -> str:
    """Of an English noun, such as those of NAMES and of COCO's classes."""
    *before, last = noun.split(" ")
    if last in IRREGULAR:
        return " ".join([*before, IRREGULAR[last]])
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _said(thing: dict[str, Any]) -> str:
    words = " ".join([*filter(None, [thing.get("color"), thing["class"]])])
    if thing["count"] > 1:
        return f"{NUMBERS[thing['count']]} {plural(words)}"
    return with_article(words)
