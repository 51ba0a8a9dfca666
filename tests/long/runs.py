"""Runs of one or more processes for the long proofs: begun as a user begins them, disturbed, and looked at."""

import hashlib
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from tests.train.tiny import PROCESSES, free_port, make_pictures, merged, rows, tiny_recipe
from train.config import Recipe

EVERYONE = (0, 1, 2, 3)


class Line(NamedTuple):
    """What a proof prints: its figure, and a line for each case that is bad."""

    text: str
    bad: list[str]


def differs(where: object, found: Any, right: Any) -> list[str]:
    """A line when the two are not the same; of dictionaries, with the keys that differ."""
    if found == right:
        return []
    if isinstance(found, dict):
        found = sorted(key for key in found.keys() | right.keys() if found.get(key) != right.get(key))
        right = "as they were"
    return [f"{where}: {found}, not {right}"]


def full_recipe(folder: Path, pictures_in: Path | None, vae: Path | None, /, **changes: Any) -> Recipe:
    """A run (see `tiny_recipe`) with everything on that has a state or draws: micro-batches, averages of both kinds,
    dropped captions, crops, mirroring, held-out losses, grids and, in the diffusion phase, judges. Every step ends with
    a checkpoint and a row."""
    judging = {"every": 16, "prompts": 6, "batch": 4, "num_inference_steps": 1}
    draws = changes.get("phase", "diffusion" if vae else "autoencoder") == "diffusion"
    values: dict[str, Any] = {
        "pictures": 64,
        "gradient_accumulation_steps": 2,
        "checkpoint_every": 8,
        "log_every": 8,
        "log_samples": True,
        "ema": {"half_life": 20, "snapshots_every": 32},
        "data": {"cache_latents": False, "crop": "random", "flip": 0.5, "caption_dropout": 0.3, "held_out": 0.15},
        "model": {"defaults": {"num_inference_steps": 1, "guidance_scale": 2.0}},
        "objective": {"noises": 2, "offset_noise": 0.1},
        "validation": {
            "every": 32,
            "prompts": ("red square", "a blue one"),
            "bins": 2,
            "judging": judging,
            "judges": ["shapes"] * draws,
        },
    }
    return tiny_recipe(folder, pictures_in, vae, **merged(values, changes))


def whole_epochs(folder: Path) -> Path:
    """Pictures of which those that train fill an epoch of three steps and a half with nothing left over."""
    from train.data.open import open_source
    from train.run import open_stream

    for count in itertools.count(20):
        recipe = full_recipe(folder / "none", make_pictures(folder / f"{count}", count), folder)
        if len(open_stream(recipe, open_source(recipe))) % recipe.batch_size == 0:
            return folder / f"{count}"
    raise AssertionError("there are as many numbers as one likes")


# Processes


class Disturbance(NamedTuple):
    """In the processes `victims`, at the call number `call` of the function `target`, before it does anything."""

    target: str  # as "train.loop:backward" or "train.run:Run.save"
    call: int
    act: str  # of ACTS
    victims: Sequence[int] = EVERYONE
    mark: Path | None = None  # a file that is made then

    def __call__(self, rank: int) -> None:
        if rank not in self.victims:
            return
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), itertools.count(1)

        def disturbed(*arguments: Any, **options: Any) -> Any:
            if next(calls) == self.call:
                if self.mark is not None:
                    self.mark.touch()
                ACTS[self.act]()
            return original(*arguments, **options)

        setattr(owner, name, disturbed)


def _fail() -> None:
    raise RuntimeError("made to fail")


ACTS: dict[str, Callable[[], None]] = {
    "raised": _fail,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
}


def undisturbed(rank: int) -> None:
    pass


def begin(recipe: Recipe, count: int = 1, disturb: Callable[[int], None] = undisturbed) -> list[Any]:
    """`count` processes of `python -m train`, told of each other as a launcher tells them. `disturb` is called with the
    rank in each of them before; what they say is in `said`."""
    file = recipe.out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    processes = [
        PROCESSES.Process(target=_command, args=(file, environment, disturb)) for environment in environments(count)
    ]
    for process in processes:
        process.start()
    return processes


def environments(count: int) -> list[dict[str, str]]:
    if count == 1:
        return [{"RANK": "0"}]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _command(file: Path, environment: dict[str, str], disturb: Callable[[int], None]) -> None:
    os.environ.update(environment)
    words = os.open(file.with_suffix(f".{environment['RANK']}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.argv = ["train", str(file)]
    torch.set_num_threads(1)
    disturb(int(environment["RANK"]))
    from train.__main__ import main

    sys.exit(main())


def said(recipe: Recipe, rank: int) -> str:
    """What the process of that rank printed since it was begun last."""
    return recipe.out.with_suffix(f".{rank}.txt").read_text()


def end(processes: Sequence[Any], seconds: float = 120) -> tuple[list[int | None], float]:
    """The exit codes, and the seconds until the last ended. Who has not ended in time has None, and is killed."""
    start = time.monotonic()
    for process in processes:
        process.join(max(start + seconds - time.monotonic(), 0))
    taken, codes = time.monotonic() - start, [process.exitcode for process in processes]
    kill(processes)
    return codes, taken


def kill(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(recipe: Recipe, count: int = 1, disturb: Callable[[int], None] = undisturbed) -> list[int | None]:
    """The exit codes of a run until its end."""
    return end(begin(recipe, count, disturb))[0]


@contextmanager
def load(loops: int) -> Iterator[None]:
    """So many processes beside that do nothing, as fast as they can."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


# What a run leaves


def left_by(out: Path) -> dict[str, str]:
    """sha256 of everything in the folder: all but two files is a function of recipe and number of processes."""
    own = {"environment.jsonl", "recipe.yaml"}  # when and where
    paths = [path for path in out.rglob("*") if path.name not in own]
    content = {str(path.relative_to(out)): path.read_bytes() if path.is_file() else b"" for path in paths}
    content["metrics.jsonl"] = repr(rows(out)).encode()
    return {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}


def newest(out: Path) -> dict[str, str]:
    """sha256 of the files of the newest checkpoint, and of the logs of samples."""
    checkpoint = max((out / "checkpoints").glob("[0-9]*"))
    files = [*checkpoint.iterdir(), *out.glob("samples-*.jsonl")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights, relative to the length of one."""
    assert one.keys() == other.keys()
    distance = math.fsum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return math.sqrt(distance / math.fsum(float(value.double().square().sum()) for value in one.values()))
