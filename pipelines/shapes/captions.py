"""What a caption says of a scene, in words that vary."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from .world import COLOURS, COUNTS, RELATIONS, SHAPES, SIZES, Scene

# The first of each is said about every other time.
SYNONYMS = {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "2": ("two", "2"),
    "3": ("three", "3"),
    "4": ("four", "4"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "and": ("and", "with"),
}


class Word(NamedTuple):
    """objects: numbers of those in the scene that the word describes; none for articles and what lies between."""

    text: str
    objects: tuple[int, ...]


def caption(scene: Scene) -> str:
    """One of the ways to say the scene's facts, a function of its name."""
    return " ".join(word.text for word in words(scene))


def words(scene: Scene) -> list[Word]:
    """The caption's words, in order."""
    random = Random(f"caption/{scene.name}")
    phrases, start = [], 0
    for thing in scene.facts["objects"]:
        count, many = thing["count"], thing["count"] > 1
        said = [_say(random, str(count))] if many else []
        said += [_say(random, thing[key]) for key in ("size", "colour") if key in thing]
        said += [_plural(_say(random, thing["shape"])) if many else _say(random, thing["shape"])]
        phrase = [Word(text, tuple(range(start, start + count))) for text in said]
        phrases.append(phrase if many else [Word("a", ()), *phrase])
        start += count
    between = _say(random, scene.facts["relation"] or "and").split()
    return [*phrases[0], *(word for phrase in phrases[1:] for word in [*(Word(text, ()) for text in between), *phrase])]


def vocabulary() -> set[str]:
    """Every word that a caption may have."""
    nouns, others = (
        [text for name in names for text in SYNONYMS.get(name, (name,))]
        for names in (SHAPES, [*COLOURS, *SIZES, *map(str, COUNTS), *RELATIONS, "and"])
    )
    return {"a", *nouns, *map(_plural, nouns), *" ".join(others).split()}


def _say(random: Random, name: str) -> str:
    return one_of(random, SYNONYMS.get(name, (name,)))


def one_of(random: Random, ways: Sequence[str]) -> str:
    """The first about every other time."""
    first, *others = ways
    return random.choice(others) if others and random.random() < 0.5 else first


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")
