"""What a run begins with: data, phase, optimizer and averages, fresh or from its newest checkpoint. And its export."""

from __future__ import annotations

import contextlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from diffusion.errors import GazeError
from diffusion.files import replacing_file
from diffusion.recompute import recompute

from .best import check_kept, recover
from .checkpoint import Checkpoints
from .checkpoint_files import folders
from .checkpoint_files import load as load_checkpoint
from .choice import load_trained, trained
from .config import Recipe
from .data.buckets import Part
from .data.drawn import draw_folder
from .data.open import open_source
from .data.source import Source
from .data.stream import Sample, Stream
from .ema import EMA
from .interval import Interval
from .launch import prepared
from .optimizer import learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from .processes import Processes, check_shared
from .signals import shielded
from .snapshots import PowerAverages, reconstruct
from .validation import Samples, Watched
from .zero import follow_weights

LATER = ("best", "checkpoints", "model", "samples", "snapshots")  # folders that a run begins to write late


class Phase(Watched, Protocol):
    """What is trained. The loop knows no more of it than this."""

    def fingerprint(self) -> str:
        """A hash of what the weights rest on beyond recipe and data; "" for nothing."""


@dataclass
class Run:
    """A run between two steps. seen: pictures so far. module: phase.module as Accelerate wrapped it. scaler: of the
    losses in fp16."""

    recipe: Recipe
    processes: Processes
    source: Source
    phase: Phase
    module: nn.Module
    optimizer: torch.optim.Optimizer
    averages: EMA
    powers: PowerAverages
    checkpoints: Checkpoints
    state: dict[str, Any]  # of every checkpoint: what it belongs to
    interval: Interval
    scaler: GradScaler | None
    batches: Iterator[list[Sample]] = field(default_factory=lambda: iter(()))
    held_out: Samples = ()  # pictures that are never trained on
    seen: int = 0
    owes: list[str] = field(default_factory=list)  # looks at itself that a signal cut short, made up for later

    @property
    def names(self) -> dict[Tensor, str]:
        """Of the parameters that are trained."""
        return {value: name for name, value in self.phase.module.named_parameters() if value.requires_grad}

    def set_rate(self) -> float:
        """Gives the optimizer the rate of the next step, and returns it."""
        rate = learning_rate(self.recipe.optimizer, self.seen, self.recipe.pictures)
        set_learning_rate(self.optimizer, rate)
        return rate

    def average(self) -> None:
        """Takes the weights of the step just made into their averages."""
        self.averages.update(self.seen, self.recipe.batch_size)
        self.powers.update(self.seen, self.recipe.batch_size)

    def snapshot(self) -> None:
        """Stores the averages for later ones; where that fails, with a warning."""
        try:
            self.powers.store(self.recipe.out / "snapshots", self.seen, self.state["identity"], self.processes.first)
        except OSError as error:
            warnings.warn(
                f"the snapshot of picture {self.seen} cannot be written: {error}; the run goes on", stacklevel=2
            )

    def settle(self, look: Callable[[list[str]], list[str]]) -> None:
        """Makes up for looks that the run owed where its checkpoint is. look: gives those that it still owes."""
        self.owes = look([name for name in self.owes if self.recipe.validation.looks.get(name)])
        self.checkpoints.amend(self.seen, {"owes": self.owes})

    def save(self, last: bool) -> None:
        """Writes a checkpoint. last: that it fails is an error at once, for no later one would make it good."""
        tensors = {"model": trained(self.phase.module), "ema": self.averages.state_dict()}
        tensors["optimizer"] = optimizer_tensors(self.optimizer, self.names)
        if self.recipe.ema.snapshots_every:
            tensors["powers"] = self.powers.state_dict()
        state = self.state | {"interval": self.interval.state_dict(), "owes": self.owes}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        self.checkpoints.save(self.seen, tensors, state, last)


def prepare(recipe: Recipe, accelerator: Accelerator, processes: Processes) -> Run:
    """Everything that the loop needs. Raises GazeError for what cannot work."""
    open_folder(recipe, processes)
    source = open_source(recipe, processes)
    data = open_stream(recipe, source)
    phase = make_phase(recipe, data, processes)
    state = belongs_to(recipe, data, phase)
    if recipe.gradient_checkpointing:
        recompute(phase.module)
    checkpoints = Checkpoints(recipe.out / "checkpoints", recipe.keep, processes)
    module, optimizer = prepared(accelerator, recipe, phase.module)
    averages = EMA(phase.module, recipe.ema.half_life)
    powers = PowerAverages(phase.module, recipe.ema.widths if recipe.ema.snapshots_every else ())
    run = Run(recipe, processes, source, phase, module, optimizer, averages, powers, checkpoints, state,
              Interval(processes), accelerator.scaler)  # fmt: skip
    resume(run)
    checkpoints.remove_leftovers(run.seen)
    if processes.first:
        recover(recipe.out)
        remove_leftovers(recipe.out, run.seen >= recipe.pictures)
        with replacing_file(recipe.out / "recipe.yaml") as aside:
            aside.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    if recipe.compile:
        run.module = cast(nn.Module, torch.compile(module))
    run.batches = load(recipe, data, run.seen, processes)
    if recipe.validation.every and recipe.data.held_out:
        run.held_out = open_stream(recipe, source, "held_out")
    return run


def open_folder(recipe: Recipe, processes: Processes) -> None:
    """Proves that all processes see the run's folder and that its own folders can be in it, and makes the pictures in
    it that the recipe asks to draw."""
    files = [path for path in (recipe.out / name for name in LATER) if path.exists() and not path.is_dir()]
    if processes.first and files:
        raise GazeError(f"{files[0]} is a file, where a run has a folder", "another name for it, or another out=DIR")
    if processes.first and recipe.validation.judges:
        check_kept(recipe.out)
    check_shared(recipe.out, processes, "out")
    drawn = recipe.out / "drawn"
    goes_on = (drawn / "metadata.jsonl").is_file() and folders(recipe.out / "checkpoints")
    if recipe.data.drawn and processes.first and not goes_on:  # else other pictures than it began with, of older runs
        draw_folder(drawn, recipe.data.drawn, recipe.data.size, recipe.seed)
    processes.wait()


def remove_leftovers(out: Path, at_the_end: bool) -> None:
    """Removes what a killed run left half written beside its checkpoints: its recipe, grids, snapshots, the model.

    at_the_end: all steps were made. Before it no run writes a model, but `train export` may be doing so now.
    """
    some = "[0-9a-f]" * 8  # as `replacing` and `replacing_file` end the names of what is not whole
    for pattern in (f".tmp-{some}*", f".recipe.yaml-{some}", f"samples/.*.png-{some}",
                    f"snapshots/.*.safetensors-{some}", "snapshots/.tmp??????"):  # fmt: skip
        for leftover in out.glob(pattern):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
    for pattern in (f".model-{some}", f".model-{some}-old") if at_the_end else ():
        for leftover in out.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def open_stream(recipe: Recipe, source: Source, part: Part = "train") -> Stream:
    """The samples of a run; with pixels, unless their latents are cached."""
    cached = recipe.phase != "autoencoder" and recipe.data.cache_latents
    return Stream(source, recipe, part, with_pixels=not cached)


def make_phase(recipe: Recipe, data: Stream, processes: Processes) -> Phase:
    """The phase with fresh weights, a function of recipe.seed."""
    torch.manual_seed(recipe.seed)  # everything later has randomness of its own
    if recipe.phase == "autoencoder":
        from .autoencoder_phase import AutoencoderPhase

        return AutoencoderPhase(recipe, data, processes)
    if recipe.phase == "text":
        from .text_phase import TextPhase

        return TextPhase(recipe, data, processes)
    from .diffusion_phase import DiffusionPhase

    return DiffusionPhase(recipe, data, processes)


def belongs_to(recipe: Recipe, data: Stream, phase: Phase) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must share, and the recipe, to tell what differs."""
    identity = "-".join(filter(None, [recipe.identity(), data.source.fingerprint(), phase.fingerprint()]))
    return {"identity": identity, "recipe": recipe.lasting()}


def resume(run: Run) -> None:
    """Loads the checkpoint that the run goes on from, if there is one."""
    found = run.checkpoints.find(run.recipe.resume)
    if found is None:
        return
    tensors, state = load_checkpoint(found, run.state)
    load_trained(run.phase.module, tensors["model"])
    follow_weights(run.optimizer)
    run.averages.load_state_dict(tensors["ema"])
    run.powers.load_state_dict(tensors.get("powers", {}))
    load_optimizer_tensors(run.optimizer, run.names, tensors["optimizer"])
    if "interval" in state:  # checkpoints of format 2 began without
        run.interval.load_state_dict(state["interval"])
    owed = state.get("owes", False)  # none wrote it at first, and then there was one kind only
    run.owes = ["validation"] * owed if isinstance(owed, bool) else owed
    if run.scaler is not None and "scaler" in state:
        run.scaler.load_state_dict(state["scaler"])
    run.seen = int(found.name)
    if run.processes.first:
        print(f"resumed from {found}", file=sys.stderr)


def load(recipe: Recipe, data: Stream, start: int, processes: Processes) -> Iterator[list[Sample]]:
    """The micro-batches of this process from picture `start` on, without end."""
    positions = data.batches(start, processes.rank, processes.count)
    return iter(DataLoader(data, batch_sampler=positions, collate_fn=list, **shielded(recipe.data.workers)))


def export(recipe: Recipe, width: float | None = None, source: Source | None = None) -> Path:
    """Writes `out/model` from the averaged weights of the newest sound checkpoint, also while a run goes on there.

    width: of the average to make of the run's snapshots instead (see snapshots.py). source: the recipe's pictures,
    where they have been looked at already.
    """
    newest = Checkpoints(recipe.out / "checkpoints", recipe.keep).newest()
    if newest is None:
        raise GazeError(f"{recipe.out} holds no checkpoint yet", "wait for the first one (checkpoint_every)")
    if source is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out has been said
            source = open_source(recipe)
    alone = {"data": recipe.data.model_copy(update={"cache_latents": False, "cache_text": False}),
             "validation": recipe.validation.model_copy(update={"judges": ()})}  # fmt: skip
    uncached = recipe.model_copy(update=alone)
    data = open_stream(uncached, source)
    phase = make_phase(uncached, data, Processes())
    own = belongs_to(recipe, data, phase)
    averages = load_checkpoint(newest, own)[0]["ema"]
    if width is not None:
        averages = reconstruct(recipe.out / "snapshots", width, own["identity"])[1]
    load_trained(phase.module, averages)
    phase.export(recipe.out / "model")
    return recipe.out / "model"
