"""What a caption says of a scene of emoji, in English or French, in words that vary."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from random import Random
from typing import NamedTuple

from diffusion.errors import GazeError, nearest
from diffusion.text import WORD

from ..shapes.captions import Word, one_of
from .things import Thing
from .world import Scene


class Language(NamedTuple):
    """Ways to say it, the first about every other time. Behind a relation stands the second thing, and behind a
    background's way nothing: "fond" is masculine, so colours need no agreement."""

    numbers: dict[int, tuple[str, ...]]
    relations: dict[str, tuple[str, ...]]
    joined: tuple[str, ...]
    background: tuple[str, ...]
    colours: dict[str, tuple[str, ...]]


LANGUAGES = {
    "en": Language(
        {2: ("two", "2"), 3: ("three", "3")},
        {
            "left of": ("to the left of", "left of"),
            "right of": ("to the right of", "right of"),
            "above": ("above", "over"),
            "below": ("below", "under"),
        },
        ("and", "with"),
        ("on a {} background", "against a {} background"),
        {
            "white": ("white",),
            "blue": ("blue",),
            "green": ("green",),
            "yellow": ("yellow",),
            "pink": ("pink",),
            "grey": ("grey", "gray"),
            "purple": ("purple", "violet"),
        },
    ),
    "fr": Language(
        {2: ("deux", "2"), 3: ("trois", "3")},
        {
            "left of": ("à gauche de", "à la gauche de"),
            "right of": ("à droite de", "à la droite de"),
            "above": ("au-dessus de",),
            "below": ("sous", "au-dessous de"),
        },
        ("et", "avec"),
        ("sur un fond {}", "sur fond {}"),
        {
            "white": ("blanc",),
            "blue": ("bleu",),
            "green": ("vert",),
            "yellow": ("jaune",),
            "pink": ("rose",),
            "grey": ("gris",),
            "purple": ("violet",),
        },
    ),
}


def speaks(language: str) -> Language:
    """Raises GazeError: no such language."""
    if language not in LANGUAGES:
        raise GazeError(f"scenes have no captions in the language {language!r}", nearest(language, LANGUAGES))
    return LANGUAGES[language]


def caption(scene: Scene, things: Mapping[str, Thing], language: str = "en") -> str:
    """One of the ways to say the scene's facts, a function of its name. Raises GazeError: no such language."""
    return "".join(part.text for part in _parts(scene, things, language))


def words(scene: Scene, things: Mapping[str, Thing], language: str = "en") -> list[Word]:
    """The caption's words, in order: a word of two parts, as "d'une", describes what the second one does."""
    parts = _parts(scene, things, language)
    ends = [*accumulate(len(part.text) for part in parts)]
    found = WORD.finditer("".join(part.text for part in parts))
    return [Word(word[0], parts[bisect_left(ends, word.end())].objects) for word in found]


def _parts(scene: Scene, things: Mapping[str, Thing], language: str) -> list[Word]:
    """What the caption is joined of, without anything between."""
    said, random, facts = speaks(language), Random(f"caption/{language}/{scene.name}"), scene.facts
    phrases, start = [], 0
    for asked in facts["objects"]:
        one, several = things[asked["kind"]].nouns[language]
        objects = tuple(range(start, start + asked["count"]))
        article, space, noun = one.partition(" ")
        alone = [Word(article + space, ()), Word(noun, objects)]
        many = len(objects) > 1
        phrases.append([Word(f"{one_of(random, said.numbers[len(objects)])} {several}", objects)] if many else alone)
        start += len(objects)
    if facts["relation"]:
        between = said.relations[facts["relation"]]
    else:
        between = said.joined if len(phrases) == 2 else said.joined[:1]
    parts = phrases[0]
    for number, phrase in enumerate(phrases[1:], start=2):
        way = f" {one_of(random, between)} " if number == len(phrases) else ", "
        parts = [*parts, Word(elided(way, phrase[0].text) if language == "fr" else way, ()), *phrase]
    if facts["background"]:
        colour = one_of(random, said.colours[facts["background"]])
        parts.append(Word(f" {one_of(random, said.background).format(colour)}", ()))
    return parts


def elided(text: str, following: str) -> str:
    """French: "de" before "un" and "une"; the numbers behind it begin with no vowel."""
    return re.sub(r"\bde $", "d'", text) if re.match(r"une?\b", following) else text
