"""SIGTERM and SIGINT: in training remembered, so that all processes leave together after the step they are in; before
and after it the end of the program."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

GRACE = 10  # seconds that a worker outlives a signal


class StopSignal:
    """In its block, `received` tells whether this process has got SIGTERM or SIGINT."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            self.previous = {number: signal.signal(number, self._remember) for number in self.NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In its block SIGTERM ends what goes on as SIGINT does, by KeyboardInterrupt: so that files half written go."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def shield(worker: int) -> None:
    """Workers outlive a signal to the whole process group, so that the step in which it came can end, and
    none shows a traceback beside what the run says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
