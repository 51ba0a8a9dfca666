"""What is logged as a mean over the steps since the line before, also where the run was stopped between two lines."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from typing import Any

import torch
from torch import Tensor

from .processes import Processes


class Interval:
    """This process's sums since the last line. Those of all go into a checkpoint, so that a resumed run writes the
    lines of one that never stopped, to the bit on as many processes."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.begin()

    def begin(self) -> None:
        """Of a line: nothing has been seen."""
        self.loss, self.dropped, self.steps = torch.zeros((), device=self.processes.device), 0.0, 0

    def add(self, loss: Tensor, dropped: float) -> None:
        """After a step. loss: this process's. dropped: share of its captions."""
        self.loss, self.dropped, self.steps = self.loss + loss, self.dropped + dropped, self.steps + 1

    def means(self) -> dict[str, float]:
        """Over the steps and all processes, each of which must call."""
        sums = {"loss": self.loss, "captions_dropped": torch.tensor(self.dropped, dtype=torch.float64)}
        return {name: self.processes.mean(value / self.steps) for name, value in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same on every process, each of which must call."""
        return {"steps": self.steps, "sums": self.processes.gather([float(self.loss), self.dropped])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Processes of another number than saved it begin with the mean of what those had."""
        sums, count = state["sums"], self.processes.count
        mean = [fsum(column) / len(sums) for column in zip(*sums, strict=True)]
        loss, self.dropped = sums[self.processes.rank] if len(sums) == count else mean
        self.loss, self.steps = torch.full_like(self.loss, loss), state["steps"]
