"""Several processes that draw one command's pictures, as `accelerate launch` or torchrun starts them, or one alone.

They meet in the launcher's key-value store and pass bytes through it: no collective that all have to enter.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from diffusion.errors import GazeError

from .launch import start_the_others

T = TypeVar("T")
PIECE = 2**20  # bytes of a value: the store refuses 8 MB at once
FAILED = "failed"


@dataclass(frozen=True)
class Processes:
    """rank: this one's number among `count`. store: where they meet; None for one alone."""

    rank: int = 0
    count: int = 1
    store: Any = None

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, a JSON value, in all of them."""
        if self.count == 1:
            return decide()
        if self.rank == 0:
            self._send("plan", json.dumps(decide()).encode())
        return json.loads(self._receive("plan"))

    def part(self, total: int, rank: int | None = None) -> range:
        """Which of `total` things a process has, by default this one: a run of neighbours."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.count, total * (rank + 1) // self.count)

    def collect(
        self,
        total: int,
        mine: Sequence[T],
        pack: Callable[[T], bytes],
        unpack: Callable[[bytes], T],
        name: str = "picture",
    ) -> list[T] | None:
        """All processes' things in their order to the first process; None to the others. name: theirs, once only."""
        if self.rank > 0:
            self._send_all(total, mine, pack, name)
            return None
        return [*mine, *(unpack(self._receive(f"{name}/{index}")) for index in range(len(mine), total))]

    def share(
        self, total: int, mine: Sequence[T], pack: Callable[[T], bytes], unpack: Callable[[bytes], T], name: str
    ) -> list[T]:
        """As `collect`, but to all processes."""
        if self.count > 1:
            self._send_all(total, mine, pack, name)
        own = dict(zip(self.part(total), mine, strict=True))
        return [own[index] if index in own else unpack(self._receive(f"{name}/{index}")) for index in range(total)]

    def _send_all(self, total: int, mine: Sequence[T], pack: Callable[[T], bytes], name: str) -> None:
        for index, thing in zip(self.part(total), mine, strict=True):
            self._send(f"{name}/{index}", pack(thing))

    def _send(self, key: str, value: bytes) -> None:
        pieces = range(0, len(value), PIECE)
        for number, start in enumerate(pieces):
            self.store.set(f"{key}/{number}", value[start : start + PIECE])
        self.store.set(key, str(len(pieces)))  # last, because it is what is waited for

    def _receive(self, key: str) -> bytes:
        """Waits for as long as the others live: the launcher ends all when one dies, and one that fails says so."""
        while not self.store.check([key]):
            if self.store.check([FAILED]):
                sys.exit(1)
            time.sleep(0.02)
        return b"".join(self.store.get(f"{key}/{number}") for number in range(int(self.store.get(key))))


def own_device() -> Any:
    """torch's device of this process: its GPU if there is one, else the CPU."""
    import torch

    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def processes(module: str = "pipelines") -> Iterator[Processes]:
    """The processes of this command, `python -m module`; one that leaves by an error takes the others with it."""
    start_the_others(module, sys.argv[1:])
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    from torch.distributed import rendezvous

    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
    except (RuntimeError, ValueError) as error:
        raise GazeError(
            f"the {count} processes do not find each other: {error}", "accelerate launch, or torchrun"
        ) from error
    try:
        yield Processes(rank, count, store)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the store may have gone with the process that keeps it
            if store.add(FAILED, 1) > 1:  # the first to fail speaks for all
                sys.exit(1)
        raise
