"""Which pictures each process saw in each step: out/samples-RANK.jsonl, one line a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .data.stream import Sample
from .metrics import drop_after
from .processes import Processes


def begin_logs(out: Path, seen: int, processes: Processes) -> None:
    """Takes back what was logged after the checkpoint at `seen` pictures, also by processes that are gone now."""
    if processes.first:
        for path in out.glob("samples-*.jsonl"):
            drop_after(path, seen)
    processes.wait()


def log_samples(out: Path, seen: int, rank: int, samples: Sequence[Sample]) -> None:
    """Notes the step that ended at `seen` pictures: position, number in the source and content of each picture."""
    rows = [[sample.position, sample.index, sample.key] for sample in samples]
    with (out / f"samples-{rank:05d}.jsonl").open("a") as file:
        file.write(json.dumps({"pictures": seen, "samples": rows}) + "\n")
