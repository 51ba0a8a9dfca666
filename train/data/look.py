"""Looking at every picture once before training: those that decode, and why the others do not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from diffusion.errors import GazeError

from ..processes import Processes
from .decode import probe
from .parallel import in_parallel
from .source import LARGEST, Place, Record, Skipped, digest

MOST_BROKEN = 0.05  # share of pictures that may be left out before a run stops
AT_ONCE = 64  # pictures that a process looks at before it answers


class Looked:
    """The pictures of a place that decode, as a Source. `records` tells of each, `numbers` where it is in the place."""

    def __init__(self, place: Place, records: Sequence[Record], numbers: Sequence[int]):
        self.place, self.records, self.numbers = place, records, numbers

    @property
    def blocks(self) -> list[int]:
        ends = np.searchsorted(self.numbers, np.cumsum(self.place.blocks))
        return [int(count) for count in np.diff(ends, prepend=0) if count]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it is another than was looked at."""
        record = self.records[index]
        try:
            content = self.place.read(self.numbers[index])
        except GazeError as error:
            reason = error.problem
        else:
            if hashlib.sha256(content).hexdigest() == record.key:
                return content
            reason = "its content is another"
        raise GazeError(
            f"{record.name} has changed since the run began: {reason}",
            "put it back; the same command goes on from the last checkpoint",
        )

    def fingerprint(self) -> str:
        return digest((record.name, record.captions, record.key, record.repeats) for record in self.records)


def look(place: Place, workers: int = 0, processes: Processes | None = None) -> tuple[Looked, list[Skipped]]:
    """Decodes every picture once, each process its part: those that decode and have a caption, and the others.

    workers: further processes of each process. All processes get the same.
    Raises GazeError when the processes see different pictures.
    """
    processes = processes or Processes()
    if len({*processes.gather(place.fingerprint())}) > 1:
        raise GazeError("the processes see different pictures or captions", "the same data on every machine")
    start, end = (len(place) * part // processes.count for part in (processes.rank, processes.rank + 1))
    batches = in_parallel(partial(_look, place, end), range(start, end, AT_ONCE), workers, "looking at the pictures")
    found = [one for batch in batches for one in batch]
    records, numbers, skipped = [], [], []
    for number, seen in enumerate(one for part in processes.gather(found) for one in part):
        entry = place[number]
        if isinstance(seen, str):
            skipped.append(Skipped(entry.name, seen))
        else:
            key, height, width = seen
            records.append(Record(entry.name, entry.captions, key, height, width, entry.repeats))
            numbers.append(number)
    return Looked(place, records, numbers), skipped


def examine(place: Place, index: int) -> tuple[bytes, Record]:
    """A picture's file and its record. Raises GazeError when it does not decode or has no caption."""
    entry = place[index]
    if not entry.captions:
        raise GazeError("it has no caption")
    content = place.read(index)
    if len(content) > LARGEST:
        raise GazeError(f"the file has {len(content)} bytes, more than {LARGEST}")
    key = hashlib.sha256(content).hexdigest()
    height, width = probe(content)
    return content, Record(entry.name, entry.captions, key, height, width, entry.repeats)


def refuse_many(skipped: Sequence[Skipped], total: int) -> None:
    """Raises GazeError when more than 5 % of all pictures are left out, or all of them."""
    if skipped and (len(skipped) > MOST_BROKEN * total or len(skipped) == total):
        raise GazeError(
            f"{len(skipped)} of {total} pictures do not decode or have no caption (more than {MOST_BROKEN:.0%}), "
            f"first {skipped[0].name}: {skipped[0].reason}",
            "repair or remove them; python -m train data check PATH names all",
        )


def _look(place: Place, end: int, start: int) -> list[tuple[str, int, int] | str]:
    """(key, height, width) of each picture from start on, or why it is left out, as JSON has it."""
    found: list[tuple[str, int, int] | str] = []
    for index in range(start, min(start + AT_ONCE, end)):
        try:
            _, record = examine(place, index)
        except GazeError as error:
            found.append(error.problem)
        else:
            found.append((record.key, record.height, record.width))
    return found
