"""The same work for many numbers, in several processes, with a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from diffusion.errors import GazeError

from ..signals import shielded

T = TypeVar("T")


class _Work(Dataset[Any]):
    """A GazeError is given as a value: a DataLoader would put a traceback into its message."""

    def __init__(self, work: Callable[[int], Any]):
        self.work = work

    def __getitem__(self, number: int) -> Any:
        try:
            return self.work(number)
        except GazeError as error:
            return error


def in_parallel(work: Callable[[int], T], numbers: range, workers: int, doing: str) -> Iterator[T]:
    """work(n) of each number, in order, computed by so many processes (0: here, when it is asked for).

    Raises the GazeError that `work` raised.
    """
    from rich.console import Console
    from rich.progress import track

    loader = DataLoader(_Work(work), None, sampler=numbers, collate_fn=_as_it_is, **shielded(workers))
    shown = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    for result in track(loader, doing, total=len(numbers), **shown):  # type: ignore[arg-type]
        if isinstance(result, GazeError):
            raise result
        yield result


def _as_it_is(value: T) -> T:
    return value
