"""What a place with captioned pictures offers, whatever it is: a folder, tar shards, a table."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from diffusion.errors import GazeError

LARGEST = 2**28  # bytes of a picture's file; a film with a picture's name must not fill the memory
MOST_REPEATS = 2**32 - 1  # that buckets have room for


class Entry(NamedTuple):
    """What a place says of a picture at which nobody has looked yet."""

    name: str  # as a person finds it: a file, or a shard and its member, or a table and its row
    captions: tuple[str, ...]  # none: the picture is left out, as one that does not decode
    repeats: int = 1  # visits per epoch; 0 leaves the picture out


class Record(NamedTuple):
    """What is known of a picture without decoding it."""

    name: str  # as in Entry
    captions: tuple[str, ...]  # at least one
    key: str  # sha256 of the picture's file, in hex
    height: int  # pixels, upright (EXIF applied)
    width: int
    repeats: int = 1  # visits per epoch; 0 leaves the picture out


class Place(Protocol):
    """Pictures by number, as they lie somewhere; `look` makes a Source of those that decode. Every Source is one, too.
    Cheap to send to another process; reads by itself there."""

    @property
    def blocks(self) -> Sequence[int]:
        """How many consecutive pictures lie in each shard or row group; one block where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry | Record: ...

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it cannot be read, or is not what its record says."""

    def fingerprint(self) -> str:
        """A hash of all that is known of the pictures: a run resumes only on the data that it began with."""


class Source(Place, Protocol):
    """Pictures that decode, by number."""

    def __getitem__(self, index: int) -> Record: ...


class Listed:
    """What the places have in common that know all their pictures from the start; they add `read`."""

    entries: list[Entry]

    @property
    def blocks(self) -> list[int]:
        return [len(self.entries)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def fingerprint(self) -> str:
        return digest(self.entries)


class Skipped(NamedTuple):
    """A picture that is left out."""

    name: str
    reason: str


def digest(rows: Iterable[Any]) -> str:
    """sha256, in hex, of rows of JSON values."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()


def need(module: str, extra: str, what: str) -> Any:
    """The module of an extra. Raises GazeError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise GazeError(f"{what} needs {module.split('.')[0]}: {error}", f"pip install -e '.[{extra}]'") from None
