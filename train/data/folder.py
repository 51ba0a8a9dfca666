"""Captioned pictures from a folder: metadata.jsonl (`file_name`, `text`; the imagefolder convention) or .txt files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion.errors import GazeError

from . import decode as decoding
from .source import LARGEST, Entry, digest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class Folder:
    """The pictures of a folder as a Place, in the order of metadata.jsonl or of sorted file names.

    Raises GazeError naming file and line when a line of captions is not what it should be.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise GazeError(f"data folder {str(root)!r} does not exist", "check data.folder")
        metadata = self.root / "metadata.jsonl"
        found = _from_metadata(metadata) if metadata.is_file() else _from_text_files(self.root)
        if not found:
            raise GazeError(f"{root} holds no captioned picture", _hint(self.root))
        self.files, self.entries = [file for file, _ in found], [entry for _, entry in found]

    @property
    def blocks(self) -> list[int]:
        return [len(self.entries)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it cannot be read."""
        try:
            with (self.root / self.files[index]).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > LARGEST:
                    raise GazeError(f"the file has {size} bytes, more than {LARGEST}")
                return file.read()
        except OSError as error:
            raise GazeError(f"the file cannot be read: {error.strerror}") from None

    def fingerprint(self) -> str:
        return digest(self.entries)


def _hint(root: Path) -> str:
    for key, pattern in (("shards", "manifest.json"), ("table", "*.parquet"), ("dataset", "*.arrow")):
        if any(root.glob(pattern)):
            return f"data.{key}={root}"
    return "metadata.jsonl, or a .txt file beside each picture"


def _from_metadata(metadata: Path) -> list[tuple[str, Entry]]:
    root = metadata.parent.resolve()
    # Bytes, because text would also be split at the line separators of Unicode, which may stand inside a caption.
    lines = metadata.read_bytes().split(b"\n")
    return [_entry(metadata, root, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _entry(metadata: Path, root: Path, number: int, line: bytes) -> tuple[str, Entry]:
    where = f"{metadata}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
        name, text, repeats = row["file_name"], row.get("text"), row.get("repeats", 1)
        file = (root / name).resolve()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise GazeError(
            f"{where}: no JSON object with file_name and text ({type(error).__name__}: {error})",
            'a line such as {"file_name": "1.png", "text": "a red circle"}',
        ) from None
    captions = [] if text is None else [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise GazeError(f"{where}: text is neither a caption nor a list of captions", "put it in quotes")
    if type(repeats) is not int or repeats < 0:
        raise GazeError(f"{where}: repeats is {repeats!r}", "a whole number, 0 leaves the picture out")
    if not file.is_relative_to(root):
        raise GazeError(f"{where}: {name!r} lies outside the folder", "move the picture into the folder")
    return name, Entry(_text(name), tuple(map(_text, captions)), repeats)


def _from_text_files(root: Path) -> list[tuple[str, Entry]]:
    pictures = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = [path.relative_to(root).as_posix() for path in pictures]
    return [(name, Entry(_text(name), _captions(path))) for name, path in zip(names, pictures, strict=True)]


def _captions(picture: Path) -> tuple[str, ...]:
    file = picture.with_suffix(".txt")
    try:
        return (file.read_text(encoding="utf-8-sig").strip(),)
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise GazeError(f"{file} is not UTF-8: {error}", "save it as UTF-8") from None


def _text(text: str) -> str:
    """Without single surrogates, which no file of ours can hold: they come from JSON and from odd file names."""
    return text.encode("utf-8", "replace").decode()


# What follows moves to stream.py and randomness.py.


class Picture(NamedTuple):
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


def decode(file: Path, size: int) -> Tensor:
    """The central square of a picture as CHW in [-1, 1]. Raises GazeError when it does not decode."""
    return decoding.decode(file, (size, size))[0]


class Captioned(Dataset[Sample]):
    """The endless stream of samples: item n is sample n.

    An epoch holds each entry `repeats` times; each epoch is shuffled by (seed, epoch).
    with_pixels: False where latents are cached, so that nothing is decoded.
    """

    def __init__(self, entries: list[Picture], size: int, seed: int, caption_dropout: float, with_pixels: bool):
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
