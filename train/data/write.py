"""Folders of captioned pictures that are made here: pictures and metadata.jsonl, as the folder reader takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.errors import GazeError


def check_new(out: Path, count: int, seed: int, size: int) -> None:
    """Raises GazeError where nothing can be drawn, or `out` holds something, which would be lost or stay among it."""
    if count < 1 or size < 1:
        raise GazeError(f"{count} pictures of {size} pixels cannot be drawn", "--count 10000 --size 64")
    if seed < 0:
        raise GazeError(f"the seed is {seed}; those below 0 are of the scenes that a model is scored on", "--seed 0")
    if out.is_dir() and any(out.iterdir()):
        raise GazeError(f"{out} holds something already", "another folder, or remove it first")


def write_masks(folder: Path, name: str, masks_OHW: np.ndarray) -> str:
    """Writes the masks of the picture of this name, as `masks.Masks` reads them; returns their name in the folder."""
    (folder / "masks").mkdir(exist_ok=True)
    numbers_O11 = np.arange(1, len(masks_OHW) + 1, dtype=np.uint8)[:, None, None]
    Image.fromarray((masks_OHW * numbers_O11).max(0)).save(folder / "masks" / name)
    return f"masks/{name}"


def write_pictures(folder: Path, pictures: Iterable[tuple[Image.Image, dict[str, Any]]]) -> Path:
    """Each picture under the "file_name" of its line, all lines in metadata.jsonl. GazeError: it cannot be written."""
    lines = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture, line in pictures:
            picture.save(folder / line["file_name"])
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise GazeError(f"cannot write the folder {folder}: {error}", "a folder you may write to") from error
    return folder
