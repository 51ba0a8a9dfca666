"""What a caption says of a scene of emoji, in English or French, in words that vary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from diffusion.errors import GazeError, nearest

from ..shapes.captions import one_of
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
    words, random, facts = speaks(language), Random(f"caption/{language}/{scene.name}"), scene.facts
    phrases = []
    for asked in facts["objects"]:
        one, several = things[asked["kind"]].nouns[language]
        count = asked["count"]
        phrases.append(one if count == 1 else f"{one_of(random, words.numbers[count])} {several}")
    if facts["relation"]:
        between = words.relations[facts["relation"]]
    else:
        between = words.joined if len(phrases) == 2 else words.joined[:1]
    *before, last = phrases
    text = f"{', '.join(before)} {one_of(random, between)} {last}" if before else last
    if facts["background"]:
        colour = one_of(random, words.colours[facts["background"]])
        text += f" {one_of(random, words.background).format(colour)}"
    return elided(text) if language == "fr" else text


def elided(text: str) -> str:
    """French: "de" before "un" and "une"; the numbers behind it begin with no vowel."""
    return re.sub(r"\bde (?=une?\b)", "d'", text)
