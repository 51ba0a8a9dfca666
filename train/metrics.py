"""What a run says: one JSON object per line in metrics.jsonl, and a progress bar where a terminal is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Metrics:
    """active: True on the one process that writes."""

    def __init__(self, path: Path, start: int, total: int, active: bool):
        self.path, self.total, self.active = path, total, active
        self.last_pictures, self.last_time = start, time.monotonic()
        self.bar: Progress | None = None
        if not active:
            return
        _drop_after(path, start)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.completed}/{task.total} pictures {task.fields[note]}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=total, completed=start, note="")
            self.bar.start()

    def advance(self, pictures: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=pictures)

    def log(self, pictures: int, **values: float) -> None:
        """Writes one line; adds pictures per second since the last one."""
        if not self.active:
            return
        now = time.monotonic()
        speed = (pictures - self.last_pictures) / max(now - self.last_time, 1e-9)
        self.last_pictures, self.last_time = pictures, now
        row = {"pictures": pictures, "pictures_per_second": round(speed, 2)} | values
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        note = " ".join(f"{key} {value:.4g}" for key, value in values.items()) + f" {speed:.1f}/s"
        if self.bar:
            self.bar.update(self.task, completed=pictures, note=note)
        else:
            left = (self.total - pictures) / max(speed, 1e-9)
            print(f"{pictures}/{self.total} pictures  {note}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _drop_after(path: Path, pictures: int) -> None:
    """Removes lines past the checkpoint that a run resumes from, and a last line cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["pictures"] <= pictures:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept))
