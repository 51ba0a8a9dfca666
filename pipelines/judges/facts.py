"""What a prompt says of a picture, as GenEval's evaluation_metadata.jsonl states it (Ghosh et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.errors import GazeError, nearest

from ..places import RELATIONS
from .pictures import Asked, read_prompts

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTING = "counting"
EXAMPLE = '{"prompt": "two red cups", "tag": "counting", "include": [{"class": "cup", "count": 2, "color": "red"}]}'

Facts = dict[str, Any]


def facts_of(prompt: str, entry: Mapping[str, Any]) -> Facts:
    """The facts of a prompt: "skill", "include" and "exclude", lists of objects {"class", "count"}, those of "include"
    with "color" and "position" where stated. entry: a line of a prompts file, or what a data folder says of a picture.

    The entry is GenEval's: "include", maybe "exclude" (there must be fewer than so many) and "tag"; the position is a
    relation of RELATIONS and the number of an earlier object. Or it is of a world drawn here, with "facts" that have
    "objects" and "relation". Raises GazeError where the facts are missing or not like that.
    """
    stated = entry.get("facts", entry)
    if not isinstance(stated, Mapping) or not any(isinstance(stated.get(key), list) for key in ("include", "objects")):
        raise GazeError(f"nothing says what a picture of {prompt!r:.200} must show", f"lines such as {EXAMPLE}")
    try:
        stated = _of_a_scene(stated) if "objects" in stated else stated
    except (TypeError, ValueError, KeyError):
        raise GazeError(
            f"the facts of {prompt!r:.200} are not those of a drawn scene", f"lines such as {EXAMPLE}"
        ) from None
    include = [_object(each, number, prompt) for number, each in enumerate(stated["include"])]
    exclude = [_object(each, 0, prompt) for each in stated.get("exclude") or []]
    if not include + exclude:
        raise GazeError(f"the facts of {prompt!r:.200} name no object", EXAMPLE)
    return {"skill": str(stated.get("tag") or "all"), "include": include, "exclude": exclude}


def facts_for(asked: Sequence[Asked], file: str | None = None) -> dict[str, Facts]:
    """The facts of each text that is asked for: of its own line, or of the same prompt's in a file of prompts. Raises
    GazeError: one has none, or two lines say different ones."""
    told = [] if file is None else read_prompts(file)
    entries = {name: each.more for each in told for name in (each.prompt, each.text)}
    found: dict[str, Facts] = {}
    for each in asked:
        facts = facts_of(each.text, entries.get(each.text, each.more))
        if found.setdefault(each.text, facts) != facts:
            problem = f"two lines say different facts of {each.text!r:.200}"
            raise GazeError(problem, "one line for each prompt; tag, include and exclude are its facts")
    return found


def names_of(facts: Facts) -> list[str]:
    """What the facts name, each once."""
    return [*dict.fromkeys(each["class"] for each in [*facts["include"], *facts["exclude"]])]


def colours_of(facts: Facts) -> list[str]:
    """The colours that the facts name."""
    return [each["color"] for each in facts["include"] if "color" in each]


def _of_a_scene(scene: Mapping[str, Any]) -> Facts:
    """Facts of a drawn world: a relation is that of the first thing to the second, and a count that is said is exact.
    Sizes and backgrounds, which a detector does not tell, are left out."""
    keys = {"class": ("shape", "kind"), "count": ("count",), "color": ("colour",)}
    include = [
        {new: thing[old] for new, olds in keys.items() for old in olds if old in thing} for thing in scene["objects"]
    ]
    if scene.get("relation"):
        first, second, *others = include
        include = [second, {**first, "position": [scene["relation"], 0]}, *others]
    exclude = [{"class": each["class"], "count": each["count"] + 1} for each in include if each["count"] > 1]
    return {"tag": scene.get("skill"), "include": include, "exclude": exclude}


def _object(each: Any, before: int, prompt: str) -> Facts:
    """An object of the facts, checked; there are `before` others before it."""

    def check(right: bool, problem: str, hint: str = EXAMPLE) -> None:
        if not right:
            raise GazeError(f"the facts of {prompt!r:.200}: {problem}", hint)

    check(isinstance(each, Mapping), f"{each!r:.100} is no object")
    name, count = each.get("class"), each.get("count")
    check(isinstance(name, str) and bool(name.strip()), f"the class of an object is {name!r:.100}")
    check(type(count) is int and count > 0, f"the count of {name} is {count!r:.100}", "a whole number, at least 1")
    known = {"class": name, "count": count}
    if each.get("color") is not None:
        check(isinstance(each["color"], str), f"the color of {name} is {each['color']!r:.100}", "a word, such as red")
        known["color"] = each["color"]
    if each.get("position") is not None:
        position = each["position"]
        check(
            isinstance(position, Sequence) and len(position) == 2 and type(position[1]) is int,
            f"the position of {name} is {position!r:.100}",
            '["left of", 0], which is left of the first object',
        )
        relation, target = position
        check(relation in RELATIONS, f"{name} lies {relation!r:.100} another", nearest(str(relation), RELATIONS))
        check(0 <= target < before, f"{name} lies {relation} object {target}, but only {before} come before it")
        known["position"] = [relation, target]
    return known
