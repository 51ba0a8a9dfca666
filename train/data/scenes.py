"""Folders of scenes of emoji, captioned in English and French. The same bytes on every run.

OUT/00000.png ...
OUT/metadata.jsonl                    {"file_name", "text": [a caption in each language], "facts"} a line
OUT/glyphs/*.png, metadata.jsonl      what the scenes are made of, see pipelines/scenes/things.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.places import SIDE
from pipelines.scenes.captions import caption, speaks
from pipelines.scenes.things import read_things
from pipelines.scenes.world import draw, scene

from . import nouns
from .emoji import glyph, in_language, installed
from .write import check_new, write_pictures

LANGUAGES = ("en", "fr")


def build_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    split: str = "seen",
    size: int = SIDE,
    languages: Sequence[str] = LANGUAGES,
) -> Path:
    """Draws the first `count` scenes of a split, the six skills in turn. languages: of the captions.

    Raises GazeError, also where a package is missing or `out` holds something, which would be lost or stay among the
    pictures.
    """
    check_new(out, count, seed, size)
    for language in languages:
        speaks(language)
    write_things(out)
    things = {thing.name: thing for thing in read_things(out)}
    glyphs = {name: thing.glyph for name, thing in things.items()}
    scenes = (scene([*things], seed, index, split) for index in range(count))
    pictures = (
        (
            draw(each, glyphs, size),
            {
                "file_name": f"{index:05d}.png",
                "text": [caption(each, things, language) for language in languages],
                "facts": each.facts,
            },
        )
        for index, each in enumerate(scenes)
    )
    return write_pictures(out, pictures)


def write_things(out: Path) -> Path:
    """Draws the glyphs of scenes and says what they are called. Raises GazeError, also where a package is missing."""
    emojis, font = installed()
    chosen = {emoji.key: emoji for emoji in emojis if emoji.key in nouns.GENDERS}
    french = in_language([*chosen.values()], "fr")

    def line(emoji: Any) -> tuple[Image.Image, dict[str, Any]]:
        called = nouns.english(emoji.name), nouns.french(french[emoji].name, nouns.GENDERS[emoji.key])
        return glyph(emoji.text, font), {
            "file_name": emoji.file_name,
            "text": [one for one, _ in called],
            "name": emoji.name,
            "nouns": dict(zip(LANGUAGES, called, strict=True)),
        }

    return write_pictures(out / "glyphs", (line(chosen[key]) for key in nouns.GENDERS))
