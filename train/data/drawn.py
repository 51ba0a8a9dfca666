"""Folders of captioned pictures of the shapes world, for training without any data. The same bytes on every run.

OUT/00000.png ...
OUT/metadata.jsonl       {"file_name", "text", "facts"} a line; with masks also "masks", "objects" and "words"
OUT/masks/00000.png ...  grey levels: 0 where nothing is, 1 on the first of "objects", 2 on the second, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.places import SIDE
from pipelines.shapes.captions import caption, words
from pipelines.shapes.world import SKILLS, Scene, draw, masks, scene

from .write import check_new, write_masks, write_pictures


def draw_folder(folder: Path, count: int, size: int, seed: int) -> Path:
    """Draws `count` pictures of `size` pixels: single objects, of which the caption says colour and shape."""
    coloured = SKILLS.index("colours")
    return write_scenes(folder, (scene(seed, len(SKILLS) * index + coloured) for index in range(count)), size)


def build_shapes(
    out: Path, count: int, seed: int = 0, split: str = "seen", size: int = SIDE, with_masks: bool = False
) -> Path:
    """Draws the first `count` scenes of a split, the six skills in turn. Raises GazeError, also where `out` holds
    something, which would be lost or stay among the pictures."""
    check_new(out, count, seed, size)
    return write_scenes(out, [scene(seed, index, split) for index in range(count)], size, with_masks)


def write_scenes(folder: Path, scenes: Iterable[Scene], size: int, with_masks: bool = False) -> Path:
    """Draws scenes into a folder that the folder reader takes. Raises GazeError when it cannot be written."""

    def line(index: int, each: Scene) -> dict[str, Any]:
        name = f"{index:05d}.png"
        row: dict[str, Any] = {"file_name": name, "text": caption(each), "facts": each.facts}
        if with_masks:
            row["masks"] = write_masks(folder, name, masks(each, size))
            row["objects"] = [asdict(thing) for thing in each.objects]
            row["words"] = [word._asdict() for word in words(each)]
        return row

    return write_pictures(folder, ((draw(each, size), line(index, each)) for index, each in enumerate(scenes)))
