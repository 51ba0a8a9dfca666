"""A few real steps of a recipe on this machine, with random weights and pictures, for their time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from diffusion.clip import CLIPText

from .config import Recipe
from .ema import EMA
from .optimizer import make_optimizer
from .snapshots import PowerAverages
from .workload import HALF, make_workload

ENOUGH = 4.0  # seconds of measured steps, of which there are at least LEAST
LEAST = 3


class Rehearsal(NamedTuple):
    """Seconds, medians. micro_batch: of one forward and backward. update: of clipping, optimizer and averages."""

    micro_batch: float
    update: float


def rehearse(recipe: Recipe, batch: int, device: torch.device) -> Rehearsal:
    """batch: pictures of a micro-batch. The random state is left as it was. Eager: recipe.compile is not looked at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        work = make_workload(recipe, device)
        for text in (part for part in (*work.module.modules(), *work.beside.modules()) if isinstance(part, CLIPText)):
            text.initialize()
        trained = [parameter for parameter in work.module.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(work.module, recipe.optimizer)
        ema = EMA(work.module, recipe.ema.half_life)
        powers = PowerAverages(work.module, recipe.ema.widths if recipe.ema.snapshots_every else ())
        half = HALF.get(recipe.mixed_precision)

        def micro_batch() -> None:
            with device, torch.autocast(device.type, half) if half else nullcontext():
                out = work.forward(batch)
            out.float().square().mean().backward()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(recipe.batch_size, recipe.batch_size)
            powers.update(recipe.batch_size, recipe.batch_size)

        return _timed(micro_batch, update, device)


def _timed(micro_batch: Callable[[], None], update: Callable[[], None], device: torch.device) -> Rehearsal:
    """The first round is not counted: it makes the optimizer's state and chooses kernels."""
    rounds: list[Rehearsal] = []
    while len(rounds) <= LEAST or sum(map(sum, rounds[1:])) < ENOUGH:
        start = _now(device)
        micro_batch()
        between = _now(device)
        update()
        rounds.append(Rehearsal(between - start, _now(device) - between))
    return Rehearsal(*(statistics.median(times) for times in zip(*rounds[1:], strict=True)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_here(device: torch.device) -> int:
    """Bytes of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
