"""Folders of scenes of emoji, captioned in English and French. The same bytes on every run.

OUT/00000.png ...
OUT/metadata.jsonl                    {"file_name", "text": [a caption in each language], "facts"} a line; with masks
                                      also "masks" and "words": [those of each caption]
OUT/masks/*.png                       grey levels: 0 where nothing is, 1 on the first object, 2 on the second, ...
OUT/glyphs/*.png, metadata.jsonl      what the scenes are made of, see pipelines/scenes/things.py
OUT/emoji/*.png                       where they are asked for: every emoji alone, as `train data emoji` draws and
                                      captions them; what that holds out is held out here
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.places import SIDE, check_split
from pipelines.scenes.captions import caption, speaks, words
from pipelines.scenes.things import NAMED_IN, read_things
from pipelines.scenes.world import Scene, draw, masks, scene

from . import nouns
from .emoji import Emoji, emoji_alone, glyph, in_language, installed
from .write import check_new, write_masks, write_pictures


def build_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    split: str = "seen",
    size: int = SIDE,
    languages: Sequence[str] = NAMED_IN,
    with_masks: bool = False,
    with_emoji: bool = False,
) -> Path:
    """Draws the first `count` scenes of a split, the six skills in turn. languages: of the captions.

    Raises GazeError, also where a package is missing or `out` holds something, which would be lost or stay among the
    pictures.
    """
    check_new(out, count, seed, size)
    check_split(split)
    for language in languages:
        speaks(language)
    write_things(out)
    things = {thing.name: thing for thing in read_things(out)}
    glyphs = {name: thing.glyph for name, thing in things.items()}
    scenes = (scene([*things], seed, index, split) for index in range(count))

    def line(index: int, each: Scene) -> dict[str, Any]:
        name = f"{index:05d}.png"
        text = [caption(each, things, language) for language in languages]
        row: dict[str, Any] = {"file_name": name, "text": text, "facts": each.facts}
        if with_masks:
            row["masks"] = write_masks(out, name, masks(each, glyphs, size))
            row["words"] = [[word._asdict() for word in words(each, things, language)] for language in languages]
        return row

    drawn = ((draw(each, glyphs, size), line(index, each)) for index, each in enumerate(scenes))
    return write_pictures(out, chain(drawn, _alone(out, size, languages) if with_emoji else ()))


def _alone(out: Path, size: int, languages: Sequence[str]) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    (out / "emoji").mkdir()
    for picture, line in emoji_alone(size, languages=languages)[0]["train"]:
        yield picture, {**line, "file_name": f"emoji/{line['file_name']}"}


def write_things(out: Path) -> Path:
    """Draws the glyphs of scenes and says what they are called. Raises GazeError, also where a package is missing."""
    emojis, font = installed()
    chosen = {emoji.key: emoji for emoji in emojis if emoji.key in nouns.GENDERS}
    french = in_language([*chosen.values()], "fr")

    def line(emoji: Emoji) -> tuple[Image.Image, dict[str, Any]]:
        called = nouns.english(emoji.name), nouns.french(french[emoji].name, nouns.GENDERS[emoji.key])
        return glyph(emoji.text, font), {
            "file_name": emoji.file_name,
            "text": [one for one, _ in called],
            "name": emoji.name,
            "nouns": dict(zip(NAMED_IN, called, strict=True)),
        }

    return write_pictures(out / "glyphs", (line(chosen[key]) for key in nouns.GENDERS))
