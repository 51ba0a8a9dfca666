"""What a run ran on: environment.jsonl gets a line at each start, so that a report can tell of resumes and versions."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path

import accelerate
import torch

from pipelines import __version__

from .processes import Processes


def note_start(out: Path, pictures: int, processes: Processes) -> None:
    """Adds a line of out/environment.jsonl. All processes call it, the first writes.

    pictures: seen before this start; 0 when the run is new.
    """
    devices = processes.gather(describe(processes.device))
    if processes.first:
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "pictures": pictures,
            "processes": processes.count,
            "devices": sorted(set(devices)),
            "gaze": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        }
        with (out / "environment.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type} with {torch.get_num_threads()} threads"
