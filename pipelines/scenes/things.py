"""What scenes are made of: emoji, their glyphs and what they are called, from a folder that the scenes' data has.

DATA/glyphs/metadata.jsonl   {"file_name", "text", "name", "nouns": {language: [one, several]}} a line
DATA/glyphs/*.png            square, transparent around the glyph
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..evaluation import read_each

HINT = "python -m train data scenes FOLDER --count 10000 builds one"


class Thing(NamedTuple):
    """name: in English, which stands for it in facts. nouns: by language, "a red apple" and "red apples". glyph: RGBA,
    square, cut close to what it shows."""

    name: str
    nouns: dict[str, tuple[str, str]]
    glyph: Image.Image


def read_things(data: str | Path) -> list[Thing]:
    """Those of a folder of scenes, in their order, on which the scenes depend. Raises GazeError."""
    return read_each(Path(data) / "glyphs", _thing, HINT)


def _thing(row: dict[str, Any], image: Image.Image) -> Thing:
    nouns = {str(language): (str(one), str(many)) for language, (one, many) in row["nouns"].items()}
    return Thing(str(row["name"]), nouns, image.convert("RGBA"))
