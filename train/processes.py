"""The processes of a run, as the parts that must agree see them. Values travel as JSON, never as pickle."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from diffusion.errors import GazeError


class Processes(NamedTuple):
    """rank: of this process, from 0; count: of all. Every method must be called by all processes, in the same order."""

    rank: int = 0
    count: int = 1  # type: ignore[assignment]  # a tuple has a method of that name
    device: torch.device = torch.device("cpu")  # where the backend's messages lie: NCCL knows no CPU

    @property
    def first(self) -> bool:
        """Whether this is the one process that speaks and writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Each process's JSON value, by rank, everywhere."""
        if self.count == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = int(max(size.item() for size in sizes))
        padded = torch.nn.functional.pad(text, (0, longest - len(text)))
        texts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(texts, padded)
        return [json.loads(bytes(text[: int(size)].cpu().numpy())) for text, size in zip(texts, sizes, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool | torch.Tensor) -> list[bool]:
        """For each flag, whether any process says so. One message for all of them."""
        raised = torch.stack([torch.as_tensor(flag, device=self.device).float() for flag in flags])
        if self.count > 1:
            dist.all_reduce(raised)
        return [value > 0 for value in raised.tolist()]

    def mean(self, value: torch.Tensor) -> float:
        """Of a number that each process has."""
        total = value.detach().to(self.device, torch.float64 if self.device.type == "cpu" else torch.float32)
        if self.count > 1:
            dist.all_reduce(total)
        return float(total / self.count)

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)


def check_shared(folder: Path, processes: Processes, option: str) -> None:
    """Raises GazeError, in all processes, unless all see what the first writes into `folder`, which is there for it.

    option: the key of the recipe that gives the folder.
    """
    mark = folder / processes.gather(f".tmp-{uuid.uuid4().hex}")[0]
    if processes.first:
        mark.touch()
    processes.wait()
    seen = processes.gather(mark.exists())
    if processes.first:
        mark.unlink()
    if not all(seen):
        raise GazeError(
            f"process {seen.index(False)} does not see what process 0 writes into {folder.resolve()}",
            f"{option}=DIR on a file system that all machines share",
        )
