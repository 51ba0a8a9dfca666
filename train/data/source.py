"""What a place with captioned pictures offers, whatever it is: a folder, tar shards, a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """What is known of a picture without decoding it."""

    name: str  # as a person finds it: a file, or a shard and its member, or a table and its row
    captions: tuple[str, ...]  # at least one
    key: str  # sha256 of the picture's file, in hex
    height: int  # pixels, upright (EXIF applied)
    width: int
    repeats: int = 1  # visits per epoch; 0 leaves the picture out


class Source(Protocol):
    """Pictures that decode, by number. Cheap to send to another process; reads by itself there."""

    @property
    def blocks(self) -> Sequence[int]:
        """How many consecutive pictures lie in each shard; one block where there are no shards."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it is not what its record says."""

    def fingerprint(self) -> str:
        """A hash of names, captions, keys and repeats: a run resumes only on the data that it began with."""


class Skipped(NamedTuple):
    """A picture that is left out."""

    name: str
    reason: str
