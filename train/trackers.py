"""Metrics for other programs (TensorBoard, Weights & Biases, ...) through Accelerate's trackers.

Each tracker lives in a thread of its own behind a bounded queue: one that fails, blocks for ever or cannot be imported
is warned of once and never stops or slows the run. metrics.jsonl does not depend on them.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from diffusion.errors import GazeError, nearest

from .config import Recipe

PROJECT = "gaze"
CAPACITY = 100  # rows and pictures that may wait for a slow tracker
LIMIT = 10.0  # seconds that the end of a run waits for all of them
IMAGE_OPTIONS = {"tensorboard": {"dataformats": "NHWC"}}  # the others take pictures as they are


def check_trackers(names: Sequence[str]) -> None:
    """Raises GazeError when one is not known to Accelerate or not installed, with the command that installs it."""
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise GazeError(f"trackers: there is no tracker {name!r}", nearest(name, LOGGER_TYPE_TO_CLASS))
        if name in LoggerType.list() and name not in installed:
            raise GazeError(f"trackers: {name} is not installed", f"pip install {name}; or trackers=[]")


def open_trackers(recipe: Recipe, start: int) -> list[Tracker]:
    """The recipe's trackers for a run that goes on from picture `start`; those that keep files, under out/trackers.

    Only for the process that writes; to be called when processes that are forked from this one have been.
    """
    return [Tracker(name, _maker(name, recipe, start), _settings(recipe)) for name in recipe.trackers]


def finish(trackers: Sequence[Tracker], limit: float = LIMIT) -> None:
    """Lets all trackers write what waits, for at most `limit` seconds together."""
    end = time.monotonic() + limit
    for tracker in trackers:
        tracker.close()
    for tracker in trackers:
        tracker.join(max(end - time.monotonic(), 0))


class Tracker:
    """One of Accelerate's trackers in a thread. make: makes it; settings: what the run says of itself there.

    No method blocks or raises; the first problem is warned of by the call that comes after it.
    """

    def __init__(self, name: str, make: Callable[[], GeneralTracker], settings: Mapping[str, Any]):
        self.name, self.make, self.settings = name, make, settings
        self.problem, self.warned = "", False
        self.waiting: SimpleQueue[Callable[[GeneralTracker], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def log(self, pictures: int, values: Mapping[str, float]) -> None:
        self._send(lambda tracker: tracker.log(dict(values), step=pictures))

    def picture(self, pictures: int, image: Image.Image) -> None:
        """Shows a picture where the tracker can."""

        def show(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                options = IMAGE_OPTIONS.get(self.name, {})
                tracker.log_images({"samples": np.asarray(image)[None]}, step=pictures, **options)

        self._send(show)

    def close(self) -> None:
        """No more will be sent."""
        self.waiting.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the tracker to take what was sent."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            self._note("has not taken all in time")
        self._warn()

    def _send(self, call: Callable[[GeneralTracker], None]) -> None:
        if self.thread.is_alive() and self.waiting.qsize() < CAPACITY:
            self.waiting.put(call)
        elif self.thread.is_alive():
            self._note("does not keep up")
        self._warn()

    def _run(self) -> None:
        try:
            tracker = self.make()
            tracker.start()
            tracker.store_init_configuration(dict(self.settings))
        except BaseException as error:  # some programs exit where they should raise
            self._note(f"cannot start: {type(error).__name__}: {error}")
            return
        while (call := self.waiting.get()) is not None:
            self._try(call, tracker)
        self._try(lambda tracker: tracker.finish(), tracker)

    def _try(self, call: Callable[[GeneralTracker], None], tracker: GeneralTracker) -> None:
        """A row that is refused does not mean that the next one will be."""
        try:
            call(tracker)
        except BaseException as error:
            self._note(f"failed: {type(error).__name__}: {error}")

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _warn(self) -> None:
        if self.problem and not self.warned:
            self.warned = True
            warnings.warn(
                f"tracker {self.name} {self.problem}; the run goes on, and metrics.jsonl has what is missing there",
                stacklevel=5,
            )


def _maker(name: str, recipe: Recipe, start: int) -> Callable[[], GeneralTracker]:
    def make() -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {}
        if kind.requires_logging_directory:
            folder = recipe.out / "trackers"
            folder.mkdir(exist_ok=True)
            options["logging_dir"] = str(folder)
        if name == "tensorboard":
            options["purge_step"] = start + 1  # hides what a run that was killed said of later pictures
        return kind(PROJECT, **options)

    return make


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers want it: one level, numbers and texts."""
    settings: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = list(recipe.model_dump(mode="json").items())
    while pending:
        name, value = pending.pop(0)
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            settings[name] = value if isinstance(value, int | float | str) else str(value)
    return settings
