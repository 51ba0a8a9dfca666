"""The training loop over Accelerate, readable top to bottom.

Accelerate launches, wraps the module, runs backward and reduces. It owns neither the data order, nor the learning
rate, nor the checkpoint: those are functions of pictures seen (see data/folder.py, optimizer.py, checkpoint.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion.errors import GazeError
from pipelines.images import to_pil
from pipelines.sheet import grid

from .company import Company
from .config import Recipe
from .data.folder import Sample
from .launch import make_accelerator, processes_of
from .metrics import Metrics
from .run import Run, export, prepare
from .sharding import gathered, whole
from .signals import StopSignal

Losses = list[tuple[list[Sample], Tensor]]  # of each micro-batch


class NotFinite(GazeError):
    """A loss or gradient is not finite; nothing of that step was applied."""

    exit_code = 70


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has written a checkpoint. args[0]: pictures seen."""


def train(recipe: Recipe) -> Path:
    """Runs the recipe to its end and returns the exported folder, `out/model`. Resumes when checkpoints are there.

    Raises GazeError for bad data, a folder that cannot be written or a checkpoint of another recipe; NotFinite when the
    loss or a gradient is; NotSaved when checkpoints cannot be written; Stopped after a signal.
    """
    accelerator = make_accelerator(recipe)
    processes = processes_of(accelerator)
    with Company(processes) as company:
        run = prepare(recipe, accelerator, processes)
        total_loss, steps = torch.zeros((), device=accelerator.device), 0
        with (
            Metrics(recipe.out / "metrics.jsonl", run.seen, recipe.pictures, processes.first) as metrics,
            StopSignal() as stop,
        ):
            while run.seen < recipe.pictures:
                company.at(run.seen, run.seen // recipe.batch_size)
                rate = run.set_rate()
                losses = [backward(accelerator, run) for _ in range(recipe.gradient_accumulation_steps)]
                loss = torch.cat([loss_B for _, loss_B in losses]).mean()
                norm = whole(accelerator.clip_grad_norm_([*run.phase.module.parameters()], recipe.optimizer.clip))
                broken, stopping = processes.any(~(loss + norm).isfinite(), stop.received)
                if broken:
                    raise not_finite(run, losses)
                run.optimizer.step()
                run.optimizer.zero_grad()
                before, run.seen = run.seen, run.seen + recipe.batch_size
                run.average()
                metrics.advance(run.seen)
                total_loss, steps = total_loss + loss, steps + 1

                due = partial(is_due, before, run.seen, recipe.pictures)
                if due(recipe.log_every):
                    metrics.log(
                        run.seen, loss=processes.mean(total_loss / steps), learning_rate=rate, gradient_norm=float(norm)
                    )
                    total_loss, steps = torch.zeros_like(total_loss), 0
                if due(recipe.ema.snapshots_every):
                    run.powers.store(recipe.out / "snapshots", run.seen, run.state["identity"], processes.first)
                if due(recipe.validation.every):
                    show(run, metrics)
                if due(recipe.checkpoint_every) or stopping:
                    run.save(last=stopping or run.seen >= recipe.pictures)
                if stopping and run.seen < recipe.pictures:
                    raise Stopped(run.seen)
        if processes.first:
            export(recipe)
        processes.wait()
    accelerator.end_training()
    return recipe.out / "model"


def is_due(before: int, seen: int, total: int, every: int) -> bool:
    """Whether the step from `before` to `seen` pictures passes a multiple of `every`, or ends the run; never for 0."""
    return every > 0 and (seen >= total or before // every < seen // every)


def backward(accelerator: Accelerator, run: Run) -> tuple[list[Sample], Tensor]:
    """Adds the gradient of this process's next micro-batch. Returns its samples and the loss of each, B."""
    samples = next(run.batches)
    with accelerator.accumulate(run.module):  # divides the loss by the number of micro-batches
        loss_B = run.phase.loss(run.module, samples)
        accelerator.backward(loss_B.mean())
    return samples, loss_B.detach()


def not_finite(run: Run, losses: Losses) -> NotFinite:
    """What is said, by every process alike, of a step whose loss or gradient is not finite somewhere."""
    names = [
        str(sample.entry)
        for samples, loss_B in losses
        for sample, finite in zip(samples, loss_B.isfinite().tolist(), strict=True)
        if not finite
    ]
    found = [f"{name} (process {rank})" for rank, part in enumerate(run.processes.gather(names)) for name in part]
    where = f"the loss of {', '.join(found[:8])}" if found else "no loss, but the gradient"
    return NotFinite(
        f"the step over pictures {run.seen} to {run.seen + run.recipe.batch_size - 1} is not finite: "
        f"{where}; it was not applied",
        "the same command goes on from the last checkpoint, which is sound; if it happens again, in a new "
        "out=DIR a lower optimizer.learning_rate or mixed_precision=no",
    )


def show(run: Run, metrics: Metrics) -> None:
    """Logs the phase's figures and writes a grid of its pictures, both with the averaged weights."""
    with run.averages.swapped(), gathered(run.phase.module):
        run.phase.module.eval()
        figures = run.phase.measure()
        if figures:
            metrics.log(run.seen, **figures)
        folder = run.recipe.out / "samples"
        folder.mkdir(exist_ok=True)
        if run.processes.first:
            grid(to_pil(run.phase.grid()), columns=8).save(folder / f"{run.seen:012d}.png")
        run.phase.module.train()
