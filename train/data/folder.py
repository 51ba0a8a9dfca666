"""Captioned pictures from a folder: metadata.jsonl (`file_name`, `text`; the imagefolder convention) or .txt files.

Sample n of a run is a pure function of (seed, n): the order, the caption, its dropping and the noise. A run therefore
resumes exactly, and any number of processes sees the same stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from diffusion.errors import GazeError
from pipelines.images import open_picture, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_BROKEN = 0.05  # share of pictures that may fail to decode before a run stops


class Entry(NamedTuple):
    """One picture: its file, its captions, and how often it occurs per epoch."""

    file: Path
    captions: tuple[str, ...]
    repeats: int = 1


class Sample(NamedTuple):
    """Position n of the stream. pixels_CHW in [-1, 1], or None where latents are cached."""

    position: int
    entry: int
    caption: str
    pixels_CHW: Tensor | None


def randomness(seed: int, position: int, stream: str) -> np.random.Generator:
    """The generator of one sample for one purpose: a counter-based Philox keyed by all three."""
    key = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


def normal(seed: int, samples: list[Sample], stream: str, shape: tuple[int, ...]) -> Tensor:
    """Unit-variance noise of `shape` for each sample."""
    draws = [randomness(seed, sample.position, stream).standard_normal(shape, np.float32) for sample in samples]
    return torch.from_numpy(np.stack(draws))


def stack(samples: list[Sample]) -> Tensor:
    """The pixels of samples that carry them, BCHW."""
    return torch.stack([sample.pixels_CHW for sample in samples if sample.pixels_CHW is not None])


class Skipped(NamedTuple):
    file: Path
    reason: str


def read_folder(folder: str | Path) -> list[Entry]:
    """The entries of a folder, in the order of metadata.jsonl or of sorted file names.

    Raises GazeError naming file and line when a caption file is not JSON or a caption is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GazeError(f"data folder {str(folder)!r} does not exist", "check data.folder")
    metadata = folder / "metadata.jsonl"
    entries = _from_metadata(metadata) if metadata.is_file() else _from_text_files(folder)
    if not entries:
        raise GazeError(f"{folder} holds no captioned picture", "metadata.jsonl, or a .txt file beside each picture")
    return entries


def _from_metadata(metadata: Path) -> list[Entry]:
    # Bytes, because text would also be split at the line separators of Unicode, which may stand inside a caption.
    lines = metadata.read_bytes().split(b"\n")
    return [_entry(metadata, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _entry(metadata: Path, number: int, line: bytes) -> Entry:
    where = f"{metadata}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
        name, text, repeats = row["file_name"], row["text"], row.get("repeats", 1)
        file = (metadata.parent / name).resolve()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise GazeError(
            f"{where}: no JSON object with file_name and text ({type(error).__name__}: {error})",
            'a line such as {"file_name": "1.png", "text": "a red circle"}',
        ) from None
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise GazeError(f"{where}: text is neither a caption nor a list of captions", "put it in quotes")
    if type(repeats) is not int or repeats < 0:
        raise GazeError(f"{where}: repeats is {repeats!r}", "a whole number, 0 leaves the picture out")
    if not file.is_relative_to(metadata.parent.resolve()):
        raise GazeError(f"{where}: {name!r} lies outside the folder", "move the picture into the folder")
    return Entry(metadata.parent / name, tuple(captions), repeats)


def _from_text_files(folder: Path) -> list[Entry]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    missing = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if missing:
        raise GazeError(
            f"{len(missing)} of {len(pictures)} pictures in {folder} have no caption, first {missing[0].name}",
            f"write {missing[0].with_suffix('.txt').name}, or a metadata.jsonl",
        )
    return [Entry(path, (_read_caption(path.with_suffix(".txt")),)) for path in pictures]


def _read_caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except ValueError as error:
        raise GazeError(f"{file} is not UTF-8: {error}", "save it as UTF-8") from None


def decode(file: Path, size: int) -> Tensor:
    """A picture as CHW in [-1, 1]: upright by EXIF, alpha on white, central square, resized with Lanczos.

    Raises GazeError when it does not decode.
    """
    return to_tensor(ImageOps.fit(open_picture(file), (size, size), Image.Resampling.LANCZOS))[0]


def check(entries: list[Entry], size: int) -> tuple[list[Entry], list[Skipped]]:
    """Decodes every picture once: the good entries, and what was skipped and why.

    Raises GazeError when more than 5 % do not decode.
    """
    good, skipped = [], []
    for entry in entries:
        try:
            decode(entry.file, size)
        except GazeError as error:
            skipped.append(Skipped(entry.file, error.problem))
        else:
            good.append(entry)
    if len(skipped) > MOST_BROKEN * len(entries):
        raise GazeError(
            f"{len(skipped)} of {len(entries)} pictures do not decode (more than {MOST_BROKEN:.0%}), "
            f"first {skipped[0].file}: {skipped[0].reason}",
            "repair or remove them",
        )
    return good, skipped


class Captioned(Dataset[Sample]):
    """The endless stream of samples: item n is sample n.

    An epoch holds each entry `repeats` times; each epoch is shuffled by (seed, epoch).
    with_pixels: False where latents are cached, so that nothing is decoded.
    """

    def __init__(self, entries: list[Entry], size: int, seed: int, caption_dropout: float, with_pixels: bool):
        self.entries = entries
        self.size = size
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.with_pixels = with_pixels
        self.slots = np.repeat(np.arange(len(entries)), [entry.repeats for entry in entries])
        if not len(self.slots):
            raise GazeError("every picture has repeats 0", "give at least one picture repeats 1")
        self._epoch, self._order = -1, self.slots

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, len(self.slots))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, randomness(self.seed, epoch, "epoch").permutation(self.slots)
        index = int(self._order[place])
        entry = self.entries[index]
        random = randomness(self.seed, position, "caption")
        dropped = random.random() < self.caption_dropout
        caption = "" if dropped else entry.captions[random.integers(len(entry.captions))]
        return Sample(position, index, caption, self._pixels(entry.file) if self.with_pixels else None)

    def _pixels(self, file: Path) -> Tensor:
        try:
            return decode(file, self.size)
        except Exception as error:
            raise GazeError(f"{file} has changed since the run began: {type(error).__name__}: {error}",
                            "put it back; the same command goes on from the last checkpoint") from None  # fmt: skip

    def captions(self) -> Iterator[str]:
        """Of all pictures."""
        return (caption for entry in self.entries for caption in entry.captions)

    def fingerprint(self) -> str:
        """A hash of file names, captions and repeats: a run resumes only on the data it began with."""
        rows = [(entry.file.name, entry.captions, entry.repeats) for entry in self.entries]
        return hashlib.sha256(json.dumps([self.size, rows]).encode()).hexdigest()


class Batches:
    """Batch sampler: the positions of this process, one list per micro-batch, from picture `start` on, without end.

    Process r of R takes every R-th position of a global batch, so all processes together see 0, 1, 2, ... in order.
    """

    def __init__(self, start: int, batch_size: int, accumulation: int, rank: int, processes: int):
        if batch_size % (accumulation * processes):
            raise GazeError(
                f"batch_size {batch_size} does not divide by {processes} processes x {accumulation} accumulation steps",
                f"batch_size={-(-batch_size // (accumulation * processes)) * accumulation * processes}",
            )
        self.start, self.batch_size, self.accumulation = start, batch_size, accumulation
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.accumulation
        position = self.start
        while True:
            yield list(range(position + self.rank, position + micro, self.processes))
            position += micro
