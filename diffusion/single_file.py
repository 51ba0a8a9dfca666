"""A whole model in one safetensors file in the original key layout of Stable Diffusion 1.x, 2.x and XL.

What it is, is read from its keys and shapes, never from its name, and checked before any tensor is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import GazeError
from .files import differences, read_tensors
from .header import Entry, read_header, refuse_pickle
from .original_names import from_original
from .structure import UNUSED, Place, Structure, layout, recognise
from .tokenizer import Tokenizer

PAD = "gaze.{}.pad_token_id"  # metadata: what fills the prompts of a text encoder, where it is not its family's


@dataclass(frozen=True)
class SingleFile:
    """A file whose header has been checked: every tensor of `structure` is in its place, and no other is.

    metadata: texts that stand beside the tensors.
    """

    path: Path
    structure: Structure
    places: dict[str, Place]
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, part: str, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """The tensors of a part by their names here. dtype: None gives them as they are.

        Raises GazeError when they cannot be read.
        """
        entries = {original: self.entries[original] for original, place in self.places.items() if place.part == part}
        found: dict[str, Tensor] = {}
        for original, value in read_tensors(self.path, entries, dtype):
            names = self.places[original].names
            pieces = from_original(original, value).chunk(len(names))
            # Each in memory of its own, so that one may go without the others.
            found |= zip(names, [piece.clone() for piece in pieces] if len(names) > 1 else pieces, strict=True)
        return found


def open_single_file(path: str | Path, prediction_type: str | None = None) -> SingleFile:
    """Reads the header of a file in the original layout and finds the place of each tensor.

    prediction_type: instead of what the file or its family says.
    Raises GazeError for a pickle, for a broken file, for another structure and for weights that are no floats.
    """
    path = Path(path)
    refuse_pickle(path)
    header = read_header(path)
    try:
        structure = recognise(header, prediction_type)
        places = layout(structure)
    except GazeError as error:
        raise GazeError(f"{path} cannot be opened as a model: {error.problem}", error.hint) from None
    shapes = {name: entry.shape for name, entry in header.tensors.items() if not UNUSED.match(name)}
    wrong = differences(shapes, {name: place.shape for name, place in places.items()}, "the other keys say")
    if wrong:
        raise GazeError(
            f"{path} has the keys of {structure.family.name}, but not its tensors: {wrong}",
            "the checkpoint as it was published; parts such as LoRA or VAE alone are no model",
        )
    for name in places:
        if "F" not in header.tensors[name].dtype:
            raise GazeError(f"{path} holds {name} as {header.tensors[name].dtype}", "a version that is not quantised")
    return SingleFile(path, structure, places, {name: header.tensors[name] for name in places}, header.metadata)


def tokenizer_of(file: SingleFile, part: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer for a text encoder of a file, which itself has none: all of the families read the same words.

    folder: a tokenizer/ or a model's folder that has one; None: tokenizer/ beside the file. What fills a prompt is what
    the metadata say (PAD), else the text encoder's: the end again for CLIP, token 0 for OpenCLIP. Raises GazeError when
    there is no tokenizer, or no such token in it.
    """
    place = tokenizer_folder(file.path.parent if folder is None else folder)
    if not place.is_dir() or (folder is None and place == file.path.parent):
        raise GazeError(
            f"{file.path} holds no tokenizer (no single file does), and none is at {place}",
            "--tokenizer FOLDER, with the tokenizer/ of any Stable Diffusion model or that model's folder",
        )
    words = Tokenizer.from_pretrained(place)
    usual = words.end if file.structure.family.texts[part][0] == "clip" else 0
    stated = file.metadata.get(PAD.format(part), str(usual))
    if not stated.isdecimal() or len(stated) > 9 or int(stated) >= len(words):
        raise GazeError(
            f"{file.path} fills prompts with token {stated!r:.50}, which {place} lacks", "its own tokenizer"
        )
    return words.padded_with(int(stated))


def tokenizer_folder(folder: str | Path) -> Path:
    """The tokenizer/ of a folder, or the folder itself when it has none."""
    inner = Path(folder) / "tokenizer"
    return inner if inner.is_dir() else Path(folder)
