"""What a run says: one JSON object per line in metrics.jsonl, a progress bar where a terminal is, and the trackers."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .trackers import LIMIT, Tracker, finish

HURRY = 2.0  # seconds for the trackers when the run does not end as planned: its other processes will not wait longer
AWAY = ("validation", "checkpoint")  # laps that are no part of a step
MEASURED = ("pictures_per_second", "mfu", "peak_memory_gb", "time/", "seconds/")  # of the machine, not of the recipe


class Stopwatch:
    """Where the time goes. A lap costs two readings of a dictionary and one of the clock, below a microsecond."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Counts the time since the lap before as `name`'s."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def read(self) -> dict[str, float]:
        """Seconds by name since the reading before; those since the last lap are the trainer's own."""
        self.lap("trainer")
        seconds, self.seconds = self.seconds, {}
        return seconds


class Metrics:
    """A context manager. start, total: pictures. active: True on the one process that writes.

    The loop gives each part of a step a lap of `watch`: "data" (waiting for the next batch), "forward", "backward",
    "optimizer", "trainer" (all else), and outside of steps "validation" and "checkpoint", which do not count as speed.
    mfu: pictures per second -> share of the device's peak arithmetic, None where that is not known.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        total: int,
        active: bool,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (does not change)
        trackers: Sequence[Tracker] = (),
        mfu: Callable[[float], float | None] = lambda speed: None,
    ):
        self.path, self.total, self.active, self.device, self.mfu = path, total, active, device, mfu
        self.trackers = trackers
        self.watch = Stopwatch()
        self.last_pictures, self.speed = start, 0.0
        self.last_cpu = time.process_time()
        self.speeds: list[float] = []  # of each line
        self.bar: Progress | None = None
        if not active:
            return
        drop_after(path, start)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(16), TextColumn("{task.completed}/{task.total} pictures  {task.fields[note]}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=total, completed=start, note="")
            self.bar.start()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        finish(self.trackers, LIMIT if kind is None else HURRY)

    def advance(self, pictures: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=pictures)

    def log(self, pictures: int, **values: float) -> None:
        """Writes one line and shows it; adds speed, memory and where the time went if pictures were seen since the
        line before. Figures with a slash in their names are written only; those that are not finite are null."""
        if not self.active:
            return
        done, self.last_pictures = pictures - self.last_pictures, pictures
        if done:
            values |= self._measure(done)
        finite = {name: value if isfinite(value) else None for name, value in values.items()}  # JSON has no infinity
        self._write(json.dumps({"pictures": pictures} | finite) + "\n")
        for tracker in self.trackers:
            tracker.log(pictures, values)
        figures = [f"{name} {value:.4g}" for name, value in values.items() if "/" not in name]
        if self.bar:  # which has room for one figure
            self.bar.update(self.task, completed=pictures, note=f"{figures[0]}  {self.speed:.1f}/s")
            return
        note = "  ".join(figures)
        if done:
            minutes = max(self.total - pictures, 0) / self.speed / 60
            note += f"  {minutes:.1f} min left"
        print(f"{pictures}/{self.total} pictures  {note}", file=sys.stderr, flush=True)

    def picture(self, pictures: int, image: Image.Image) -> None:
        """Shows a grid of samples to the trackers."""
        for tracker in self.trackers:
            tracker.picture(pictures, image)

    def measured(self) -> dict[str, float]:
        """What a plan can be compared with: the median speed of the lines so far and, where the device has a memory of
        its own, the most bytes in it."""
        memory = {"memory": float(peak_memory(self.device))} if self.device.type == "cuda" else {}
        return ({"pictures_per_second": statistics.median(self.speeds)} if self.speeds else {}) | memory

    def _measure(self, done: int) -> dict[str, float]:
        """Speed and shares of the time in steps; seconds outside of them."""
        seconds = self.watch.read()
        away = {f"seconds/{name}": seconds.pop(name) for name in AWAY if name in seconds}
        stepping = max(sum(seconds.values()), 1e-9)
        self.speed = done / stepping
        self.speeds.append(self.speed)
        utilization = self.mfu(self.speed)
        before, self.last_cpu = self.last_cpu, time.process_time()
        return {
            "pictures_per_second": self.speed,
            **({} if utilization is None else {"mfu": utilization}),
            "peak_memory_gb": peak_memory(self.device) / 1e9,
            "seconds/cpu_a_picture": (self.last_cpu - before) / done,
            **{f"time/{name}": value / stepping for name, value in seconds.items()},
            **away,
        }

    def _write(self, line: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:  # such as a full disk, which may be emptied before the next checkpoint
            warnings.warn(f"{self.path} cannot be written: {error}; the run goes on", stacklevel=3)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU's memory, or on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def drop_after(path: Path, pictures: int) -> None:
    """Removes lines past the checkpoint that a run resumes from, and a last line cut short."""
    if not path.is_file():
        return
    aside = path.with_suffix(".tmp")
    lines = path.read_text(errors="replace").splitlines()
    aside.write_text("".join(line + "\n" for line in lines if _seen(line) <= pictures))
    os.replace(aside, path)


def _seen(line: str) -> float:
    """The pictures of a line, infinite if it is broken."""
    try:
        return float(json.loads(line)["pictures"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
