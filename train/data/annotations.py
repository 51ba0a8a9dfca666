"""What Unicode's CLDR calls the emoji, in each of its languages: names and keywords."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from diffusion.errors import GazeError, nearest

FOLDERS = tuple(Path("/usr/share/unicode/cldr/common") / part for part in ("annotations", "annotationsDerived"))
VARIATION_SELECTOR = "\ufe0f"  # absent from CLDR's keys
AS_TYPED = str.maketrans({"’": "'", "\u202f": " ", "\u00a0": " "})


class Annotation(NamedTuple):
    name: str
    keywords: list[str]


def parse_annotations(xml: str | bytes) -> dict[str, Annotation]:
    """{emoji without variation selectors: its name and keywords} of a CLDR annotations file."""
    nodes = [*ElementTree.fromstring(xml).iter("annotation")]
    names = {node.attrib["cp"]: node.text or "" for node in nodes if node.attrib.get("type") == "tts"}
    words = {node.attrib["cp"]: node.text or "" for node in nodes if "type" not in node.attrib}
    return {
        emoji: Annotation(name.strip(), [word.strip() for word in words.get(emoji, "").split("|") if word.strip()])
        for emoji, name in names.items()
    }


def read_annotations(language: str) -> dict[str, Annotation]:
    """All emoji that have a name in a language, "fr" for example. Raises GazeError where CLDR does not have it.

    Apostrophes and spaces are those of a keyboard, as prompts have them; but English keeps CLDR's, with which the
    shipped model was trained.
    """
    known = [path.stem for path in FOLDERS[0].glob("*.xml")]
    if language not in known:
        raise GazeError(f"CLDR does not name the emoji in the language {language!r}", nearest(language, known))
    found: dict[str, Annotation] = {}
    for folder in FOLDERS:
        file = folder / f"{language}.xml"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            found |= parse_annotations(text if language == "en" else text.translate(AS_TYPED))
    return found
