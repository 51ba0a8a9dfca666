"""Runs that are killed, stopped and begun again, counted: R1, R4, R5, R9, R11 and R13. Prints one line for each.

    python -m tests.long.resume [FOLDER] [--only R1 R9 ...] [--kills 200] [--signals 50] [--seed 0]

Ends with 1 when anything was bad. Every run is of real processes (gloo on the CPU, fp32) that do what `python -m train`
does, with everything on that has a state or draws; "the same bits" are those of every file that the run leaves.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.long.runs import (
    Disturbance,
    Line,
    begin,
    differs,
    end,
    finish,
    full_recipe,
    kill,
    left_by,
    newest,
    undisturbed,
    whole_epochs,
)
from tests.train.tiny import make_vae, rows
from train.company import EXIT_CODE
from train.config import Recipe
from train.data.stream import Stream

LIMIT = 15  # seconds that a process may go on when the other was killed


class Data(NamedTuple):
    """What all runs learn from."""

    pictures: Path
    vae: Path
    folder: Path  # where runs may write

    def recipe(self, name: str, **changes: Any) -> Recipe:
        return full_recipe(self.folder / name, self.pictures, self.vae, **changes)


# R1


def kills(data: Data, count: int, number: int, chance: random.Random) -> Line:
    """A run is begun again after each kill until it ends; then the next one, until there were so many kills. Half of
    the kills wait for the next checkpoint to be begun; each tenth hits one of two processes only."""
    lighter = {"gradient_accumulation_steps": 1, "objective": {"noises": 1}}
    straight = data.recipe(f"straight-{count}", **lighter)
    processes = begin(straight, count)
    wait(math.inf, processes, (straight.out / "recipe.yaml").exists)  # once, what all are forked from takes seconds
    begun = time.monotonic()
    bad = differs(f"{straight.out}", end(processes)[0], [0] * count)
    whole, right = 1.5 * (time.monotonic() - begun), left_by(straight.out)
    killed = writing = runs = 0
    while killed < number:
        recipe = data.recipe(f"killed-{count}-{runs}", **lighter)
        codes, leftovers = None, set()
        while codes is None:
            processes = begin(recipe, count)
            instant = time.monotonic() + chance.uniform(0, whole)
            if chance.random() < 0.5:
                wait(instant, processes)
                wait(instant + whole, processes, lambda: halves(recipe.out) - leftovers)  # noqa: B023
                instant = time.monotonic() + chance.uniform(0, 0.03)
            wait(instant, processes)
            if any(process.exitcode is not None for process in processes):
                codes, _ = end(processes)
                continue
            only = [chance.choice(processes)] if chance.random() < 0.1 else processes
            kill(only)
            left, _ = end(processes, LIMIT) if only is not processes else end(processes)
            bad += [f"{recipe.out}: {left} after a kill"] * (not {*left} <= {-signal.SIGKILL, EXIT_CODE})
            new = halves(recipe.out) - leftovers
            killed, writing, leftovers = killed + 1, writing + bool(new), leftovers | new
        found = differs(f"{recipe.out}", codes, [0] * count) or differs(f"{recipe.out}", left_by(recipe.out), right)
        bad, runs = bad + found, runs + 1
    text = (f"R1  {count} process{'es' * (count > 1)}: killed {killed} times in {runs} runs, {writing} times "
            f"({writing / killed:.0%}) while a checkpoint was written: {len(bad)} bad")  # fmt: skip
    return Line(text, bad + ["fewer than 30 % while a checkpoint was written"] * (writing < 0.3 * killed))


def wait(instant: float, processes: list[Any], until: Callable[[], Any] = bool) -> None:
    """Until the instant, or `until` says so, or a process has ended."""
    while time.monotonic() < instant and not until() and all(process.exitcode is None for process in processes):
        time.sleep(0.002)


def halves(out: Path) -> set[str]:
    """Checkpoints that are being written, or were at a kill."""
    return {path.name for path in (out / "checkpoints").glob(".tmp-*")}


def proofs(arguments: argparse.Namespace, data: Data) -> Iterator[tuple[str, Callable[[], Line]]]:
    chance = random.Random(arguments.seed)
    for count in (1, 2):
        yield f"R1-{count}", partial(kills, data, count, arguments.kills // 2, chance)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        data = Data(whole_epochs(folder / "pictures"), make_vae(folder / "vae"), folder)
        for name, proof in proofs(arguments, data):
            if not arguments.only or name in arguments.only:
                begun = time.monotonic()
                line = proof()
                print(f"{line.text}  ({time.monotonic() - begun:.0f} s)", *line.bad, sep="\n  ", flush=True)
                bad += len(line.bad)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
