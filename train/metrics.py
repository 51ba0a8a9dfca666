"""What a run says: one JSON object per line in metrics.jsonl, and a progress bar where a terminal is."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Metrics:
    """A context manager. start, total: pictures. active: True on the one process that writes."""

    def __init__(self, path: Path, start: int, total: int, active: bool):
        self.path, self.total, self.active = path, total, active
        self.last_pictures, self.last_time, self.speed = start, time.monotonic(), 0.0
        self.bar: Progress | None = None
        if not active:
            return
        _drop_after(path, start)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(16), TextColumn("{task.completed}/{task.total} pictures  {task.fields[note]}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=total, completed=start, note="")
            self.bar.start()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, pictures: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=pictures)

    def log(self, pictures: int, **values: float) -> None:
        """Writes one line and shows it; adds pictures per second if some were seen since the line before."""
        if not self.active:
            return
        done, now = pictures - self.last_pictures, time.monotonic()
        if done:
            values["pictures_per_second"] = done / max(now - self.last_time, 1e-9)
            self.last_pictures, self.last_time, self.speed = pictures, now, values["pictures_per_second"]
        with self.path.open("a") as file:
            file.write(json.dumps({"pictures": pictures} | values) + "\n")
        figures = [f"{name} {value:.4g}" for name, value in values.items()]
        if self.bar:  # which has room for one figure
            self.bar.update(self.task, completed=pictures, note=f"{figures[0]}  {self.speed:.1f}/s")
            return
        note = "  ".join(figures)
        if done:
            minutes = max(self.total - pictures, 0) / values["pictures_per_second"] / 60
            note += f"  {minutes:.1f} min left"
        print(f"{pictures}/{self.total} pictures  {note}", file=sys.stderr, flush=True)


def _drop_after(path: Path, pictures: int) -> None:
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
