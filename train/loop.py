"""The training loop over Accelerate, readable top to bottom.

Accelerate launches, wraps the module, runs backward and reduces. It owns neither the data order, nor the learning
rate, nor the checkpoint: those are functions of pictures seen (see data/stream.py, optimizer.py, checkpoint.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion.errors import GazeError

from .alone import alone
from .best import judge, said
from .company import Company
from .config import Recipe
from .data.stream import Sample
from .environment import note_start
from .launch import leave, make_accelerator, processes_of
from .metrics import Metrics
from .plan import compare, utilization
from .precision import scale_of, skips
from .run import Run, export, prepare
from .sample_log import begin_logs, log_samples
from .sharding import whole
from .signals import StopSignal
from .trackers import check_trackers, open_trackers
from .validation import validate

Losses = list[tuple[list[Sample], Tensor]]  # of each micro-batch


class NotFinite(GazeError):
    """A loss or gradient is not finite; nothing of that step was applied."""

    exit_code = 70


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has written a checkpoint; something is left to do. args[0]:
    pictures seen."""


def train(recipe: Recipe) -> Path:
    """Runs the recipe to its end and returns the exported folder, `out/model`. Resumes when checkpoints are there.

    Raises GazeError for bad data, a folder that cannot be written or a checkpoint of another recipe; NotFinite when the
    loss or a gradient is; NotSaved when checkpoints cannot be written; Stopped after a signal.
    """
    check_trackers(recipe.trackers)
    accelerator = make_accelerator(recipe)
    processes = processes_of(accelerator)
    with Company(processes) as company, alone(recipe.out, processes):
        run = prepare(recipe, accelerator, processes)
        with open_metrics(run) as metrics, StopSignal() as stop:
            lap = metrics.watch.lap
            look = partial(look_at, run, metrics, lambda: processes.any(stop.received))
            if run.owes:
                run.settle(look)
            stopping = bool(run.owes)
            while run.seen < recipe.pictures and not stopping:
                company.at(run.seen, run.seen // recipe.batch_size)
                rate = run.set_rate()
                losses = [backward(accelerator, run, lap) for _ in range(recipe.gradient_accumulation_steps)]
                loss = torch.cat([loss_B for _, loss_B in losses]).mean()
                norm = whole(accelerator.clip_grad_norm_([*run.phase.module.parameters()], recipe.optimizer.clip))
                sound = loss.isfinite() & (norm.isfinite() | skips(run.scaler, norm))
                broken, stopping = processes.any_of(~sound, stop.received)
                if broken:
                    raise not_finite(run, losses)
                run.optimizer.step()
                run.optimizer.zero_grad()
                lap("optimizer")
                before, run.seen = run.seen, run.seen + recipe.batch_size
                run.average()
                seen_now = [sample for samples, _ in losses for sample in samples]
                run.interval.add(loss, sum(sample.dropped for sample in seen_now) / len(seen_now))
                if recipe.log_samples:
                    log_samples(recipe.out, run.seen, processes.rank, seen_now)
                metrics.advance(run.seen)

                due = partial(is_due, before, run.seen, recipe.pictures)
                if due(recipe.log_every):
                    means, distance = run.interval.means(), run.averages.distance()
                    means |= {"learning_rate": rate, "gradient_norm": float(norm), "ema_distance": distance}
                    metrics.log(run.seen, **means, **scale_of(run.scaler))
                    run.interval.begin()
                if due(recipe.ema.snapshots_every):
                    run.snapshot()
                lap("trainer")
                if looks := [name for name, every in recipe.validation.looks.items() if due(every)]:
                    run.owes = look(looks)
                    stopping = processes.any(stop.received)
                if due(recipe.checkpoint_every) or stopping:
                    run.save(last=stopping or run.seen >= recipe.pictures)
                    lap("checkpoint")
        seen, finished = run.seen, run.seen >= recipe.pictures and not run.owes
        if seen >= recipe.pictures and processes.first:
            export(recipe, source=run.source)
            for line in filter(None, (compare(recipe, metrics.measured(), processes.count), said(recipe.out))):
                print(line, file=sys.stderr)
        processes.wait()
    del run, look  # which holds run
    leave(accelerator)
    if not finished:
        raise Stopped(seen)
    return recipe.out / "model"


def open_metrics(run: Run) -> Metrics:
    """The log of the run, with the trackers that the recipe asks for."""
    recipe, processes = run.recipe, run.processes
    note_start(recipe.out, run.seen, processes)
    begin_logs(recipe.out, run.seen, processes)
    trackers = open_trackers(recipe, run.seen) if processes.first else []
    log, device = recipe.out / "metrics.jsonl", processes.device
    share = utilization(recipe, processes)
    return Metrics(log, run.seen, recipe.pictures, processes.first, device=device, trackers=trackers, mfu=share)


def look_at(run: Run, metrics: Metrics, stopping: Callable[[], bool], looks: list[str]) -> list[str]:
    """Has the run look at itself in these ways of `Validation.looks`. Returns those that `stopping` cut short: nothing
    was logged or written of them."""
    ways = {
        "validation": partial(validate, run.recipe, run.phase, run.held_out, run.averages, run.processes, metrics),
        "judges": partial(judge, run.recipe, run.phase, run.state["identity"], run.averages, run.processes, metrics),
    }
    owed = [name for name in looks if not ways[name](run.seen, stopping)]
    metrics.watch.lap("validation")
    return owed


def is_due(before: int, seen: int, total: int, every: int) -> bool:
    """Whether the step from `before` to `seen` pictures passes a multiple of `every`, or ends the run; never for 0."""
    return every > 0 and (seen >= total or before // every < seen // every)


def backward(accelerator: Accelerator, run: Run, lap: Callable[[str], None]) -> tuple[list[Sample], Tensor]:
    """Adds the gradient of this process's next micro-batch. Returns its samples and the loss of each, B."""
    lap("trainer")
    samples = next(run.batches)
    lap("data")
    with accelerator.accumulate(run.module):  # divides the loss by the number of micro-batches
        loss_B = run.phase.loss(run.module, samples)
        lap("forward")
        accelerator.backward(loss_B.mean())
        lap("backward")
    return samples, loss_B.detach()


def not_finite(run: Run, losses: Losses) -> NotFinite:
    """What is said, by every process alike, of a step whose loss or gradient is not finite somewhere."""
    own = [
        (run.source[sample.index].name, sample.position, finite)
        for samples, loss_B in losses
        for sample, finite in zip(samples, loss_B.isfinite().tolist(), strict=True)
    ]
    seen = [(f"{name} (picture {position}, process {rank})", finite)
            for rank, part in enumerate(run.processes.gather(own)) for name, position, finite in part]  # fmt: skip
    broken = [name for name, finite in seen if not finite]
    names = broken or [name for name, _ in seen]
    where = ("the loss of " if broken else "no loss, but the gradient over ") + ", ".join(names[:8])
    where += f" and {len(names) - 8} more" if len(names) > 8 else ""
    return NotFinite(
        f"the step over pictures {run.seen} to {run.seen + run.recipe.batch_size - 1} is not finite: "
        f"{where}; it was not applied",
        "the same command goes on from the last checkpoint, which is sound; if it happens again, in a new "
        "out=DIR a lower optimizer.learning_rate or mixed_precision=no",
    )
