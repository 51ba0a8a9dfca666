"""SIGTERM and SIGINT, remembered, so that all processes leave together after the step they are in."""

from __future__ import annotations

import contextlib
import signal
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


def shield(worker: int) -> None:
    """Workers outlive a signal to the whole process group, so that the step in which it came can end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
