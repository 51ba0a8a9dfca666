"""What a run shows of itself while it goes on: losses of pictures that it never trains on, and grids of samples.

All of it is with the averaged weights, shared over the processes, and touches nothing that training rests on.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from torch import Tensor, nn

from diffusion.files import replacing_file
from pipelines.images import to_pil
from pipelines.sheet import grid

from .config import Recipe
from .ema import EMA
from .judges import Judge
from .memory import is_lack_of_memory
from .metrics import Metrics
from .processes import Processes
from .sharding import gathered

COLUMNS = 8  # pictures beside each other in a grid


class Samples(Protocol):
    """Samples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Any: ...


class Watched(Protocol):
    """The part of a phase that is looked at, and kept where it is the best so far."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def shown(self) -> int:
        """How many pictures a grid has."""

    def loss(self, module: nn.Module, samples: list[Any], u_B: Tensor | None = None) -> Tensor:
        """The loss of each sample, B. u_B: each sample's quantile of the density of noise levels."""

    def observe(self, samples: list[Any], u_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`loss` of one sample at several quantiles, and figures of how the network came to it."""

    def levels(self, u_B: Tensor) -> list[float]:
        """The noise level, sigma, at each of these quantiles; none where the phase has no noise levels."""

    def figures(self) -> dict[str, float]:
        """Further figures of the current weights."""

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """The shown pictures of these numbers, BCHW in [-1, 1]."""

    @property
    def judges(self) -> Mapping[str, Judge]:
        """Those of validation.judges, by name."""

    def export(self, folder: Path) -> None:
        """Writes the current weights as a diffusers folder."""


def validate(
    recipe: Recipe,
    phase: Watched,
    held_out: Samples,
    ema: EMA,
    processes: Processes,
    metrics: Metrics,
    seen: int,
    stopping: Callable[[], bool],
) -> bool:
    """Logs the held-out losses and the phase's figures and writes a grid of its pictures, out/samples/SEEN.png.

    All processes call it. held_out: samples by position, none for no such loss. stopping: whether to leave early,
    asked on all processes alike before each picture; the answer is then False, and nothing was logged or written.
    What does not fit into memory is left out with a warning.
    """
    with averaged(phase, ema, processes):
        values = held_out_losses(recipe, phase, held_out, processes, stopping)
        for figures in shared(1, lambda _: phase.figures(), processes, stopping) or []:
            values |= figures
        images = shared(phase.shown, lambda number: _packed(phase.pictures([number])), processes, stopping)
    if stopping():
        return False
    if values:
        metrics.log(seen, **values)
    if images and processes.first:
        sheet = grid([_unpacked(image) for image in images], COLUMNS)
        metrics.picture(seen, sheet)
        try:
            with replacing_file(recipe.out / "samples" / f"{seen:012d}.png") as aside:
                sheet.save(aside, format="PNG")
        except OSError as error:
            warnings.warn(f"the grid of picture {seen} cannot be written: {error}; the run goes on", stacklevel=2)
    return True


@contextmanager
def averaged(phase: Watched, ema: EMA, processes: Processes) -> Iterator[None]:
    """Within the block the phase has the averaged weights, whole on every process, to be looked at only; after it all
    is as before."""
    devices = [processes.device] if processes.device.type == "cuda" else []
    with ema.swapped(), gathered(phase.module), evaluating(phase.module), torch.random.fork_rng(devices):
        yield


def held_out_losses(
    recipe: Recipe, phase: Watched, held_out: Samples, processes: Processes, stopping: Callable[[], bool]
) -> dict[str, float]:
    """`held_out_loss`, and for the diffusion phase `held_out_loss/sigma_S` for each bin, S its noise level, the least
    first. With validation.attention also the figures of `attention_figures`, the mean over the pictures that have them.

    A picture meets the middle quantile of every bin, with the noise of its position, in a batch of its own: the
    result is a function of the weights alone, to the bit, however many processes share the work. {} when stopped.
    """
    bins = recipe.validation.bins if recipe.phase == "diffusion" else 1
    u_B = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins

    def observed(position: int) -> tuple[list[float], dict[str, float]]:
        loss_B, figures = phase.observe([held_out[position]] * bins, u_B)
        return loss_B.double().tolist(), figures

    found = shared(min(recipe.validation.pictures, len(held_out)), observed, processes, stopping)
    if not found:
        return {}
    losses, figures = zip(*found, strict=True)
    means = [_mean(column) for column in zip(*losses, strict=True)]
    names = [f"held_out_loss/sigma_{sigma:.4g}" for sigma in phase.levels(u_B)]
    others = {name: _mean([own[name] for own in figures if name in own]) for own in figures for name in own}
    return {"held_out_loss": _mean(means), **dict(zip(names, means, strict=False)), **others}


def shared(
    count: int, compute: Callable[[int], Any], processes: Processes, stopping: Callable[[], bool]
) -> list[Any] | None:
    """compute(0), compute(1), ... compute(count - 1), JSON values, on every process; each computes its share of them.

    All processes compute equally often, as a network that is spread over them needs: one without a number left
    repeats the last. None when `stopping` says so or memory does not suffice somewhere; the latter is warned of.
    """
    found = []
    for first in range(0, count, processes.count):
        if stopping():
            return None
        value, fits = _attempt(compute, min(first + processes.rank, count - 1))
        if processes.any(not fits):
            if processes.first:
                warnings.warn("validation does not fit into memory and is left out; the run goes on (fewer "
                              "validation.bins, a smaller validation.judging.batch, or smaller pictures, need less)",
                              stacklevel=2)  # fmt: skip
            return None
        found.append(value)
    rounds = processes.gather(found)
    return [rounds[number % processes.count][number // processes.count] for number in range(count)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block no part of the module is in training mode, and no gradients are kept; after it all is as
    before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _attempt(compute: Callable[[int], Any], number: int) -> tuple[Any, bool]:
    """The value, and whether memory sufficed for it."""
    try:
        return compute(number), True
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)  # here, where the error no longer holds what it was computing
    return None, False


def _packed(pixels_1CHW: Tensor) -> str:
    file = io.BytesIO()
    to_pil(pixels_1CHW)[0].save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _unpacked(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))
