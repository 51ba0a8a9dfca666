"""The training loop over Accelerate, readable top to bottom.

Accelerate launches, wraps the module, runs backward and reduces. It owns neither the data order, nor the learning
rate, nor the checkpoint: those are functions of pictures seen (see data/folder.py, optimizer.py, checkpoint.py).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from pathlib import Path
from typing import Protocol

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion.errors import GazeError
from pipelines.images import grid, to_pil

from . import checkpoint
from .config import Recipe
from .data.drawn import draw_folder
from .data.folder import Batches, Captioned, Sample, check, read_folder
from .ema import EMA
from .metrics import Metrics
from .optimizer import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors


class Phase(Protocol):
    """What is trained. The loop knows no more of it than this."""

    module: nn.Module

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B; module is self.module as Accelerate wrapped it."""

    def measure(self) -> dict[str, float]:
        """Figures of the current weights for the log."""

    def grid(self) -> Tensor:
        """Pictures of the current weights, BCHW in [-1, 1]."""

    def export(self, folder: Path) -> None:
        """Writes the current weights as a diffusers folder."""


class NotFinite(GazeError):
    """A loss or gradient is not finite; nothing of that step was applied."""


def train(recipe: Recipe) -> Path:
    """Runs the recipe to its end and returns the exported folder, `out/model`. Resumes when checkpoints are there.

    Raises GazeError for bad data or a checkpoint of another recipe, NotFinite when the loss or a gradient is.
    """
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    phase, data, identity = prepare(recipe, accelerator)
    names = {parameter: name for name, parameter in phase.module.named_parameters()}
    plain = phase.module
    optimizer = make_optimizer(plain, recipe.optimizer)
    ema = EMA(plain, recipe.ema_half_life)
    seen = resume(recipe, plain, ema, optimizer, names, identity)
    module, optimizer = accelerator.prepare(plain, optimizer)
    if recipe.compile:
        module = torch.compile(module)
    accumulation = recipe.gradient_accumulation_steps
    positions = Batches(seen, recipe.batch_size, accumulation, accelerator.process_index, accelerator.num_processes)
    workers = recipe.data.workers
    loader = iter(DataLoader(data, batch_sampler=positions, collate_fn=list, num_workers=workers))
    metrics = Metrics(recipe.out / "metrics.jsonl", seen, recipe.pictures, accelerator.is_main_process)
    stop = StopSignal()
    total_loss, steps = torch.zeros((), device=accelerator.device), 0

    while seen < recipe.pictures:
        rate = learning_rate(recipe.optimizer, seen, recipe.pictures)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for micro in range(accumulation):
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(module), accelerator.autocast():
                loss = phase.loss(module, next(loader)).mean() / accumulation
                accelerator.backward(loss)
            total_loss += loss.detach()
        norm = accelerator.clip_grad_norm_(plain.parameters(), recipe.optimizer.clip)
        if not torch.isfinite(norm) and recipe.mixed_precision != "fp16":  # fp16's scaler skips such a step itself
            raise NotFinite(
                f"the gradient is not finite at pictures {seen} to {seen + recipe.batch_size}; the step was not applied",
                "the last checkpoint is sound: resume with a lower optimizer.learning_rate or mixed_precision=no",
            )
        optimizer.step()
        optimizer.zero_grad()
        before, seen, steps = seen, seen + recipe.batch_size, steps + 1
        ema.update(seen, recipe.batch_size)
        metrics.advance(seen)

        done = seen >= recipe.pictures
        stopping = stop.anywhere(accelerator)

        def due(every: int) -> bool:
            return bool(every) and (done or before // every < seen // every)

        if due(recipe.log_every):
            mean = float(accelerator.reduce(total_loss / steps, "mean"))
            metrics.log(seen, loss=mean, learning_rate=rate, gradient_norm=float(norm))
            total_loss, steps = torch.zeros_like(total_loss), 0
        if due(recipe.validation.every) and accelerator.is_main_process:
            show(recipe, phase, ema, metrics, seen)
        if due(recipe.checkpoint_every) or stopping:
            if accelerator.is_main_process:
                tensors = {"model": plain.state_dict(), "ema": ema.state_dict()}
                tensors["optimizer"] = optimizer_tensors(optimizer, names)
                checkpoint.save(recipe.out / "checkpoints", seen, tensors, {"identity": identity}, recipe.keep)
            accelerator.wait_for_everyone()
        if stopping and not done:
            metrics.close()
            raise Stopped(seen)

    metrics.close()
    if accelerator.is_main_process:
        with ema.swapped() if recipe.ema_half_life else contextlib.nullcontext():
            phase.export(recipe.out / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return recipe.out / "model"


def prepare(recipe: Recipe, accelerator: Accelerator) -> tuple[Phase, Captioned, str]:
    """The phase with fresh weights, its data, and the identity that a checkpoint must share."""
    torch.manual_seed(recipe.seed)  # initial weights; everything later has randomness of its own
    main, folder = accelerator.is_main_process, recipe.data.folder
    if folder is None:
        folder = recipe.out / "drawn"
        if main:
            draw_folder(folder, recipe.data.drawn, recipe.data.size, recipe.seed)
        accelerator.wait_for_everyone()
    entries, skipped = check(read_folder(folder), recipe.data.size)
    for item in skipped:
        warnings.warn(f"skipped {item.file}: {item.reason}", stacklevel=2)
    cached = recipe.phase == "diffusion" and recipe.data.cache_latents
    data = Captioned(entries, recipe.data.size, recipe.seed, recipe.data.caption_dropout, with_pixels=not cached)
    if recipe.phase == "autoencoder":
        from .autoencoder_phase import AutoencoderPhase

        phase: Phase = AutoencoderPhase(recipe, data, accelerator.device)
    else:
        from .diffusion_phase import DiffusionPhase

        phase = DiffusionPhase(recipe, data, accelerator.device)
    if main:
        recipe.out.mkdir(parents=True, exist_ok=True)
        (recipe.out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return phase, data, f"{recipe.identity()}-{data.fingerprint()}"


def resume(recipe: Recipe, module: nn.Module, ema: EMA, optimizer, names: dict[Tensor, str], identity: str) -> int:
    """Loads the newest sound checkpoint of the run, if there is one. Returns the pictures seen so far."""
    newest = checkpoint.newest(recipe.out / "checkpoints")
    if newest is None:
        return 0
    if recipe.resume == "never":
        raise GazeError(f"{recipe.out} already holds checkpoints and resume is never", "another out=DIR, or resume=auto")
    tensors, state = checkpoint.load(newest, identity)
    module.load_state_dict(tensors["model"])
    ema.load_state_dict(tensors["ema"])
    load_optimizer_tensors(optimizer, names, tensors["optimizer"])
    print(f"resumed from {newest}", file=sys.stderr)
    return state["pictures"]


def show(recipe: Recipe, phase: Phase, ema: EMA, metrics: Metrics, seen: int) -> None:
    """Logs the phase's figures and writes a grid of its pictures, both with the averaged weights."""
    with ema.swapped() if recipe.ema_half_life else contextlib.nullcontext():
        phase.module.eval()
        figures = phase.measure()
        if figures:
            metrics.log(seen, **figures)
        folder = recipe.out / "samples"
        folder.mkdir(exist_ok=True)
        grid(to_pil(phase.grid()), columns=8).save(folder / f"{seen:012d}.png")
        phase.module.train()


def export_newest(recipe: Recipe) -> Path:
    """Writes `out/model` from the averaged weights of the newest sound checkpoint, without training on."""
    phase, _, identity = prepare(recipe, Accelerator(cpu=True))
    newest = checkpoint.newest(recipe.out / "checkpoints")
    if newest is None:
        raise GazeError(f"{recipe.out} holds no checkpoint yet", "wait for the first one (checkpoint_every)")
    tensors, _ = checkpoint.load(newest, identity)
    phase.module.load_state_dict(tensors["model"] | tensors["ema"])
    phase.export(recipe.out / "model")
    return recipe.out / "model"


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has written a checkpoint. args[0]: pictures seen."""


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that all processes leave together after the step they are in."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        self.received = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process has received a signal."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)
