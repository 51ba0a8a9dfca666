"""Captioned pictures from a folder: metadata.jsonl (`file_name`, `text`; the imagefolder convention) or .txt files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from torch import Tensor

from diffusion.errors import GazeError
from pipelines.images import open_picture, to_tensor

from .source import Record

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_BROKEN = 0.05  # share of pictures that may fail to decode before a run stops


class Entry(NamedTuple):
    """One picture: its file, its captions, and how often it occurs per epoch."""

    file: Path
    captions: tuple[str, ...]
    repeats: int = 1


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


class Folder:
    """The pictures of a folder as a `Source`: one block, in the order of `entries`."""

    def __init__(self, entries: Sequence[Entry]):
        self.files = [entry.file for entry in entries]
        self.records = [_record(entry) for entry in entries]
        self.blocks = [len(entries)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def read(self, index: int) -> bytes:
        content = self.files[index].read_bytes()
        if hashlib.sha256(content).hexdigest() != self.records[index].key:
            raise GazeError("its content is another", "put it back")
        return content

    def captions(self) -> Iterator[str]:
        """Of all pictures."""
        return (caption for entry in self.entries for caption in entry.captions)

    def fingerprint(self) -> str:
        """A hash of file names, captions, keys and repeats."""
        rows = [(Path(r.name).name, r.captions, r.key, r.repeats) for r in self.records]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _record(entry: Entry) -> Record:
    content, picture = entry.file.read_bytes(), open_picture(entry.file)
    key = hashlib.sha256(content).hexdigest()
    return Record(str(entry.file), entry.captions, key, picture.height, picture.width, entry.repeats)
