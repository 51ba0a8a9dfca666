"""Where the things are that a caption's words speak of: masks named by metadata.jsonl, cut as the pictures are.

    {"file_name": "0.png", "text": "a red circle", "masks": "masks/0.png",
     "words": [{"text": "a", "objects": []}, {"text": "red", "objects": [0]}, {"text": "circle", "objects": [0]}]}

masks: a picture of the size of the other, in grey levels: 0 where nothing is, 1 on object 0, 2 on object 1, ...
words: those of the caption in their order, with the objects that each speaks of; where text is a list of captions, a
list of such lists.
"""

# Shapes: O objects, H W height and width of the masks that are asked for.

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.text import words_in

from .decode import Size, part_of
from .folder import encodable
from .stream import Sample

EXAMPLE = (
    '{"file_name": "0.png", "text": "discs", "masks": "masks/0.png", "words": [{"text": "discs", "objects": [0]}]}'
)


class Marked(NamedTuple):
    """file: of the masks. objects: by caption, the numbers of those that each of its words speaks of."""

    file: Path
    objects: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def number_of_objects(self) -> int:
        """Of objects, as far as a word speaks of them."""
        return 1 + max((number for words in self.objects.values() for word in words for number in word), default=-1)


class Masks:
    """The masks of a folder's pictures, by the pictures' names; pictures without any are not among them.

    Raises GazeError: no metadata.jsonl, no picture with masks, a line that is not as above.
    """

    def __init__(self, folder: Path):
        self.marked: dict[str, Marked] = {}
        metadata = folder / "metadata.jsonl"
        try:
            lines = metadata.read_bytes().split(b"\n")
        except OSError as error:
            raise GazeError(f"{metadata} cannot be read: {error.strerror}", f"lines such as {EXAMPLE}") from None
        for number, line in enumerate(lines, start=1):
            row = json.loads(line) if line.strip() else {}
            if "masks" in row:
                self.marked[row["file_name"]] = _marked(row, folder, f"{metadata}, line {number}")
        if not self.marked:
            raise GazeError(f"no line of {metadata} names masks", f"lines such as {EXAMPLE}")

    def covered(self, name: str, sample: Sample, size: Size) -> Tensor:
        """masks_OHW in 0 to 1: how much of each cell of the sample, in a grid of `size`, each of its objects covers.
        name: of the sample's picture. Raises GazeError where the file is not what it should be."""
        levels = _opened(self.marked[name].file, sample.original)
        part = part_of(sample.original, sample.size, sample.crop, sample.flipped)
        masks_OHW = torch.zeros(self.marked[name].number_of_objects, *size)
        for number in range(len(masks_OHW)):
            mask = levels.point(lambda level, own=number + 1: 255 if level == own else 0)
            cells = np.asarray(mask.resize(size[::-1], Image.Resampling.BOX, part), np.float32) / 255
            masks_OHW[number] = torch.from_numpy(cells)
        return masks_OHW.flip(-1) if sample.flipped else masks_OHW

    def fingerprint(self) -> str:
        """A hash of all masks and of which words speak of them."""
        total = hashlib.sha256()
        for name, marked in sorted(self.marked.items()):
            content = hashlib.sha256(marked.file.read_bytes()).hexdigest()
            total.update(json.dumps([name, *marked.objects.values(), content]).encode())
        return total.hexdigest()


def _opened(file: Path, size: Size) -> Image.Image:
    """The masks of a picture of this size."""
    try:
        with Image.open(file) as picture:
            given = picture.height, picture.width
            levels = picture.convert("L") if given == size else None
    except Exception as error:  # Pillow raises whatever a broken file makes it
        raise GazeError(f"{file} cannot be opened: {error}", "the masks of the picture of that name") from None
    if levels is None:
        found, right = (f"{width} x {height}" for height, width in (given, size))
        raise GazeError(f"{file} has {found} pixels, its picture has {right}", "masks of the picture's size")
    return levels


def _marked(row: dict[str, Any], folder: Path, where: str) -> Marked:
    try:
        text, words, file = row["text"], row["words"], folder / row["masks"]
        captions, lists = ([text], [words]) if isinstance(text, str) else (text, words)
        pairs = [(encodable(caption), list(map(_word, own))) for caption, own in zip(captions, lists, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise GazeError(f"{where}: masks without their words ({type(error).__name__}: {error})", EXAMPLE) from None
    for caption, own in pairs:
        if words_in(caption, ())[0] != [word for word, _ in own]:
            raise GazeError(f"{where}: the caption is {caption!r}, but its words are {[word for word, _ in own]}",
                            "all words of each caption, in their order")  # fmt: skip
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise GazeError(f"{where}: there are no masks {row['masks']!r} in the folder", "its path within the folder")
    if any(number not in range(255) for _, own in pairs for _, objects in own for number in objects):
        raise GazeError(f"{where}: an object's number is not from 0 to 254", "0 for the grey level 1, and so on")
    return Marked(file, {caption: tuple(objects for _, objects in own) for caption, own in pairs})


def _word(word: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    return str(word["text"]), tuple(map(int, word["objects"]))
