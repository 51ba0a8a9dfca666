"""SIGTERM and SIGINT: in training remembered, so that all processes leave together after the step they are in; before
and after it the end of the program."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


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


def shielded(count: int) -> dict[str, Any]:
    """DataLoader's options for so many workers. They outlive signals to the whole process group, however many and
    however long the step and the save after them take, and none shows a traceback beside what the run says. They end
    with their run, or by its SIGTERM."""
    multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)  # before multiprocessing joins them
    return {"num_workers": count, "worker_init_fn": _shield}


def _end_workers() -> None:
    """Asks until they are gone, because a SIGTERM is lost where another one is still waiting to be looked at."""
    for worker in multiprocessing.active_children():
        while worker.daemon and worker.is_alive():
            worker.terminate()
            worker.join(0.1)


def _shield(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on a Mac; a handler is not told who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    run = multiprocessing.parent_process()
    while run is not None and run.is_alive():
        came = signal.sigtimedwait([signal.SIGTERM], 1)
        if came is not None and came.si_pid == run.pid:
            break
    os._exit(0)
