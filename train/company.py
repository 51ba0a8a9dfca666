"""The processes of a run watch over each other: when one dies or falls silent, the others end too and say which.

A collective operation waits for all processes, for ever if one is gone. So a thread in each says every second how far
its process is; the first process listens, and tells all when one has failed or said nothing for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from .processes import Processes

BEAT = 1.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one after which a process counts as stopped
SUSPECT = 4.0  # the same once an operation over all processes has failed: somebody must be gone
MEETING = 600.0  # seconds for all processes to come; as yet nobody listens to signs of life
GRACE = 4.0  # seconds for an error that all processes find to be reported by each of them
EXIT_CODE = 75  # EX_TEMPFAIL, when one was killed or stopped: the same command goes on


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """A block in which the processes meet. It ends this one when the others do not come: an operation of all of them
    would wait for hours for one that was stopped on the way."""
    patience = threading.Timer(MEETING, _nobody_came)
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()


def _nobody_came() -> None:
    says = (f"error: process {os.environ.get('RANK', '0')} has waited for {MEETING / 60:.0f} minutes and not met all "
            "others: one was killed or stopped on the way, or never began\n  try: the same command")  # fmt: skip
    print(says, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Verdict(NamedTuple):
    """What happened to one process, and the exit code of the others."""

    says: str
    code: int = EXIT_CODE


class Company:
    """A context manager around a run. An error that leaves the block is told to the other processes, which then end
    with its exit code, and with 75 when a process just vanished. Alone, it does nothing."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.state: dict[str, Any] = {"beat": 0, "pictures": 0, "step": 0, "failed": None, "suspects": False}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.guard = threading.Thread(target=self._guard, daemon=True)
        self.heard = 0.0  # when the place where they ask last answered

    def __enter__(self) -> Company:
        if self.processes.count > 1:
            with meeting():
                self._meet()
            self.heard = time.monotonic()
            self.thread.start()
            self.guard.start()
        return self

    def _meet(self) -> None:
        """All join the place where they ask, which lies with the first process."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        wait = timedelta(seconds=SILENCE)
        port = 0
        if self.processes.first:
            self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = self.store.port
        port = self.processes.gather(port)[0]
        if not self.processes.first:
            self.store = dist.TCPStore(host, port, is_master=False, timeout=wait)
        self._tell()
        self.processes.wait()

    def at(self, pictures: int, step: int) -> None:
        """Notes how far this process is."""
        self.state |= {"pictures": pictures, "step": step}

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.processes.count == 1:
            return
        if error is not None and _is_of_the_network(error):
            self.state["suspects"] = True  # the thread finds out who is gone, and ends this process
            self.thread.join(SUSPECT + GRACE + 3 * BEAT)
        elif error is not None:
            self.state |= {"failed": f"{type(error).__name__}: {error}", "code": getattr(error, "exit_code", 1)}
            with contextlib.suppress(RuntimeError):  # the first process is gone; the error itself is what to report
                self._tell()
                if self.processes.first:  # nobody else listens, and the place where they ask goes with this process
                    self.store.set("verdict", json.dumps(failed(0, self.state)))
                    time.sleep(3 * BEAT)
        self.over.set()
        self.guard.join()
        if error is None:
            self.processes.wait()  # the place where they ask lies with the first process, and must outlive every thread

    def _tell(self) -> None:
        self.state["beat"] += 1
        self.store.set(str(self.processes.rank), json.dumps(self.state))

    def _watch(self) -> None:
        listener = _Listener(self.processes.count) if self.processes.first else None
        while not self.over.wait(BEAT):
            try:
                self._tell()
                if listener is not None:
                    found = listener.verdict([json.loads(text) for text in self.store.multi_get(listener.keys)])
                    if found:
                        self.store.set("verdict", json.dumps(found))
                if self.store.check(["verdict"]):
                    self._end(Verdict(*json.loads(self.store.get("verdict"))))
                self.heard = time.monotonic()
            except RuntimeError:
                if not self.over.wait(GRACE):
                    self._end(Verdict(f"process 0 is gone, {self._here()}"))

    def _guard(self) -> None:
        """Ends this process when the thread waits for an answer without end, as it does while the first is stopped."""
        while self.thread.is_alive():
            silent = time.monotonic() - self.heard
            if silent > SILENCE:
                says = f"process 0 was killed or stopped, {self._here()}: no answer for {silent:.0f} seconds"
                self._leave(Verdict(says))
            self.thread.join(BEAT)

    def _here(self) -> str:
        return f"at picture {self.state['pictures']}, step {self.state['step']} or later"

    def _end(self, verdict: Verdict) -> None:
        """Ends this process, unless it does so by itself."""
        if not self.over.wait(GRACE):
            self._leave(verdict)

    def _leave(self, verdict: Verdict) -> None:
        """Ends this process, whose main thread may wait in an operation that never returns."""
        vanished = verdict.code == EXIT_CODE
        hint = "the same command, which goes on from the last checkpoint" if vanished else "what that process says"
        says = f"error: {verdict.says}; process {self.processes.rank} ends too\n  try: {hint}"
        print(says, file=sys.stderr, flush=True)
        os._exit(verdict.code)


class _Listener:
    """What the first process makes of the signs of life."""

    def __init__(self, count: int):
        self.keys = [str(rank) for rank in range(count)]
        self.last = {rank: (0, time.monotonic()) for rank in range(count)}  # the newest beat, and when it came

    def verdict(self, states: list[dict[str, Any]]) -> Verdict | None:
        """What happened, or None while all is well. states: of each process, by rank."""
        now = time.monotonic()
        patience = SUSPECT if any(state["suspects"] for state in states) else SILENCE
        for rank, state in enumerate(states):
            if state["failed"] is not None:
                return failed(rank, state)
            if state["beat"] != self.last[rank][0]:
                self.last[rank] = state["beat"], now
            elif now - self.last[rank][1] > patience:
                return Verdict(
                    f"process {rank} was killed or stopped at picture {state['pictures']}, step {state['step']}: "
                    f"no sign of life for {now - self.last[rank][1]:.0f} seconds"
                )
        return None


def failed(rank: int, state: dict[str, Any]) -> Verdict:
    """Of a process that has told of its error, in its state."""
    at = f"at picture {state['pictures']}, step {state['step']}"
    return Verdict(f"process {rank} failed {at} ({state['failed']})", state["code"])


def _is_of_the_network(error: BaseException) -> bool:
    """Whether an operation over all processes failed, which it does when another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
