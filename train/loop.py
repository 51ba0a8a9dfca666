"""The training loop over Accelerate, readable top to bottom.

Accelerate launches, wraps the module, runs backward and reduces. It owns neither the data order, nor the learning
rate, nor the checkpoint: those are functions of pictures seen (see data/folder.py, optimizer.py, checkpoint.py).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusion.errors import GazeError
from pipelines.files import check_writable
from pipelines.images import to_pil
from pipelines.sheet import grid

from . import checkpoint
from .config import Recipe
from .data.drawn import draw_folder
from .data.folder import Batches, Captioned, Picture, Sample
from .data.open import open_source
from .ema import EMA
from .metrics import Metrics
from .optimizer import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors

GRACE = 10  # seconds


class Phase(Protocol):
    """What is trained. The loop knows no more of it than this."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B; module is self.module as Accelerate wrapped it."""

    def measure(self) -> dict[str, float]:
        """Figures of the current weights for the log."""

    def grid(self) -> Tensor:
        """Pictures of the current weights, BCHW in [-1, 1]."""

    def export(self, folder: Path) -> None:
        """Writes the current weights as a diffusers folder."""

    def fingerprint(self) -> str:
        """A hash of what the weights rest on beyond recipe and data; "" for nothing."""


class NotFinite(GazeError):
    """A loss or gradient is not finite; nothing of that step was applied."""

    exit_code = 70


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT) and has written a checkpoint. args[0]: pictures seen."""


def train(recipe: Recipe) -> Path:
    """Runs the recipe to its end and returns the exported folder, `out/model`. Resumes when checkpoints are there.

    Raises GazeError for bad data, a folder that cannot be written or a checkpoint of another recipe; NotFinite when the
    loss or a gradient is; NotSaved when a checkpoint cannot be written; Stopped after a signal.
    """
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    main = accelerator.is_main_process
    if main:
        open_folder(recipe)
    accelerator.wait_for_everyone()
    data = read_data(recipe, main)
    phase = make_phase(recipe, data, accelerator.device)
    identity = identify(recipe, data, phase)
    plain = phase.module
    names: dict[Tensor, str] = {parameter: name for name, parameter in plain.named_parameters()}
    optimizer = make_optimizer(plain, recipe.optimizer)
    ema = EMA(plain, recipe.ema.half_life)
    seen = resume(recipe, plain, ema, optimizer, names, identity, main)
    if main:
        checkpoint.remove_leftovers(recipe.out / "checkpoints")
        (recipe.out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    module, optimizer = accelerator.prepare(plain, optimizer)
    if recipe.compile:
        module = torch.compile(module)
    batches = load(recipe, data, seen, accelerator)
    total_loss, steps = torch.zeros((), device=accelerator.device), 0
    metrics = Metrics(recipe.out / "metrics.jsonl", seen, recipe.pictures, main)

    with metrics, StopSignal(accelerator) as stop:
        while seen < recipe.pictures:
            rate = learning_rate(recipe.optimizer, seen, recipe.pictures)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            for last in [False] * (recipe.gradient_accumulation_steps - 1) + [True]:
                with contextlib.nullcontext() if last else accelerator.no_sync(module):
                    loss = phase.loss(module, next(batches)).mean() / recipe.gradient_accumulation_steps
                    accelerator.backward(loss)
                total_loss += loss.detach()
            norm = accelerator.clip_grad_norm_(plain.parameters(), recipe.optimizer.clip)
            if not torch.isfinite(norm):
                raise NotFinite(
                    f"the gradient of pictures {seen} to {seen + recipe.batch_size - 1} is not finite; "
                    "the step was not applied",
                    "the same command goes on from the last checkpoint, which is sound; if it happens again, in a new "
                    "out=DIR a lower optimizer.learning_rate or mixed_precision=no",
                )
            optimizer.step()
            optimizer.zero_grad()
            before, seen, steps = seen, seen + recipe.batch_size, steps + 1
            ema.update(seen, recipe.batch_size)
            metrics.advance(seen)

            done, stopping = seen >= recipe.pictures, stop.anywhere()
            due = partial(is_due, before, seen, recipe.pictures)

            if due(recipe.log_every):
                mean = float(accelerator.reduce(total_loss / steps, "mean"))
                metrics.log(seen, loss=mean, learning_rate=rate, gradient_norm=float(norm))
                total_loss, steps = torch.zeros_like(total_loss), 0
            if due(recipe.validation.every) and main:
                show(recipe, phase, ema, metrics, seen)
            if due(recipe.checkpoint_every) or stopping:
                if main:
                    tensors = {"model": plain.state_dict(), "ema": ema.state_dict()}
                    tensors["optimizer"] = optimizer_tensors(optimizer, names)
                    state = {"identity": identity, "processes": accelerator.num_processes}
                    checkpoint.save(recipe.out / "checkpoints", seen, tensors, state, recipe.keep)
                accelerator.wait_for_everyone()
            if stopping and not done:
                accelerator.end_training()
                raise Stopped(seen)

    if main:
        with ema.swapped():
            phase.export(recipe.out / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return recipe.out / "model"


def is_due(before: int, seen: int, total: int, every: int) -> bool:
    """Whether the step from `before` to `seen` pictures passes a multiple of `every`, or ends the run; never for 0."""
    return every > 0 and (seen >= total or before // every < seen // every)


def open_folder(recipe: Recipe) -> None:
    """Makes the run's folder, and the pictures in it that the recipe asks to draw."""
    try:
        check_writable(recipe.out)
    except GazeError as error:
        raise GazeError(error.problem, "another place with out=DIR") from None
    if recipe.data.folder is None:
        draw_folder(recipe.out / "drawn", recipe.data.drawn, recipe.data.size, recipe.seed)


def read_data(recipe: Recipe, report: bool) -> Captioned:
    """The recipe's pictures that decode. report: warn of the others."""
    with warnings.catch_warnings():
        if not report:
            warnings.simplefilter("ignore")
        source: Any = open_source(recipe)
    files = [source.place.root / source.place.files[number] for number in source.numbers]
    pictures = [Picture(file, one.captions, one.repeats) for file, one in zip(files, source.records, strict=True)]
    cached = recipe.phase != "autoencoder" and recipe.data.cache_latents
    return Captioned(pictures, recipe.data.size, recipe.seed, recipe.data.caption_dropout, with_pixels=not cached)


def make_phase(recipe: Recipe, data: Captioned, device: torch.device) -> Phase:
    """The phase with fresh weights, a function of recipe.seed."""
    torch.manual_seed(recipe.seed)  # everything later has randomness of its own
    if recipe.phase == "autoencoder":
        from .autoencoder_phase import AutoencoderPhase

        return AutoencoderPhase(recipe, data, device)
    if recipe.phase == "text":
        from .text_phase import TextPhase

        return TextPhase(recipe, data, device)
    from .diffusion_phase import DiffusionPhase

    return DiffusionPhase(recipe, data, device)


def identify(recipe: Recipe, data: Captioned, phase: Phase) -> str:
    """What a checkpoint and the run that goes on from it must share."""
    return "-".join(filter(None, [recipe.identity(), data.fingerprint(), phase.fingerprint()]))


def resume(
    recipe: Recipe,
    module: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    identity: str,
    report: bool,
) -> int:
    """Loads the newest sound checkpoint of the run, if there is one. Returns the pictures seen so far."""
    with warnings.catch_warnings():
        if not report:
            warnings.simplefilter("ignore")
        newest = checkpoint.newest(recipe.out / "checkpoints")
    if newest is None:
        return 0
    if recipe.resume == "never":
        raise GazeError(f"{recipe.out} holds checkpoints and resume is never", "another out=DIR, or resume=auto")
    tensors, state = checkpoint.load(newest, identity)
    module.load_state_dict(tensors["model"])
    ema.load_state_dict(tensors["ema"])
    load_optimizer_tensors(optimizer, names, tensors["optimizer"])
    if report:
        print(f"resumed from {newest}", file=sys.stderr)
    return state["pictures"]


def load(recipe: Recipe, data: Captioned, start: int, accelerator: Accelerator) -> Iterator[list[Sample]]:
    """The micro-batches of this process from picture `start` on, without end."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    positions = Batches(start, recipe.batch_size, recipe.gradient_accumulation_steps, rank, processes)
    workers = recipe.data.workers
    return iter(DataLoader(data, batch_sampler=positions, collate_fn=list, num_workers=workers, worker_init_fn=shield))


def shield(worker: int) -> None:
    """Workers outlive a signal to the whole process group, so that the step in which it came can end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def show(recipe: Recipe, phase: Phase, ema: EMA, metrics: Metrics, seen: int) -> None:
    """Logs the phase's figures and writes a grid of its pictures, both with the averaged weights."""
    with ema.swapped():
        phase.module.eval()
        figures = phase.measure()
        if figures:
            metrics.log(seen, **figures)
        folder = recipe.out / "samples"
        folder.mkdir(exist_ok=True)
        grid(to_pil(phase.grid()), columns=8).save(folder / f"{seen:012d}.png")
        phase.module.train()


def export_newest(recipe: Recipe) -> Path:
    """Writes `out/model` from the averaged weights of the newest sound checkpoint, also while a run goes on there."""
    newest = checkpoint.newest(recipe.out / "checkpoints")
    if newest is None:
        raise GazeError(f"{recipe.out} holds no checkpoint yet", "wait for the first one (checkpoint_every)")
    data = read_data(recipe, report=False)
    uncached = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_latents": False})})
    phase = make_phase(uncached, data, torch.device("cpu"))
    tensors, _ = checkpoint.load(newest, identify(recipe, data, phase))
    phase.module.load_state_dict(tensors["model"] | tensors["ema"])
    phase.export(recipe.out / "model")
    return recipe.out / "model"


class StopSignal:
    """In its block, remembers SIGTERM and SIGINT, so that all processes leave together after the step they are in."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            self.previous = {number: signal.signal(number, self._remember) for number in self.NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def anywhere(self) -> bool:
        """Whether any process has received a signal."""
        if self.accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)
