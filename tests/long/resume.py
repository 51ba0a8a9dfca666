"""Runs that are killed, stopped and begun again, counted: R1, R4, R5, R9, R11 and R13. Prints one line for each.

    python -m tests.long.resume [FOLDER] [--only R1 R9 ...] [--kills 200] [--signals 50] [--seed 0] [--together 4]

Ends with 1 when anything was bad. --together: runs of R4, R11 and R13 at a time. Every run is of real processes (gloo,
CPU, fp32) that do what `python -m train` does, with everything on that has a state or draws; "the same bits" are those
of every file that the run leaves.
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.long.runs import (
    EVERYONE,
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
    said,
    undisturbed,
    whole_epochs,
)
from tests.train.tiny import make_vae, rows
from train import loop
from train.company import EXIT_CODE
from train.config import Recipe
from train.data.open import open_source
from train.run import open_stream

STOPPED = 130  # exit code
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
    the kills wait for the next checkpoint to be begun; each tenth hits one of two processes only. Before these have
    met, the other one is the launcher's to end, and there is none here."""
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
            processes, before = begin(recipe, count), starts(recipe.out)
            instant = time.monotonic() + chance.uniform(0, whole)
            if chance.random() < 0.5:
                wait(instant, processes)
                wait(instant + whole, processes, lambda: halves(recipe.out) - leftovers)  # noqa: B023
                instant = time.monotonic() + chance.uniform(0, 0.03)
            wait(instant, processes)
            if any(process.exitcode is not None for process in processes):
                codes, _ = end(processes)
                continue
            only = chance.random() < 0.1 and starts(recipe.out) > before
            kill([chance.choice(processes)] if only else processes)
            left, _ = end(processes, LIMIT)
            if not {*left} <= {0, -signal.SIGKILL, EXIT_CODE}:
                bad.append(f"{recipe.out}: {left} after a kill; {[said(recipe, rank)[-500:] for rank in range(count)]}")
            if -signal.SIGKILL in left:  # else it had come to its end just before
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


def starts(out: Path) -> int:
    """How often a run has begun to train: all of its processes have met."""
    log = out / "environment.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def halves(out: Path) -> set[str]:
    """Checkpoints that are being written, or were at a kill."""
    return {path.name for path in (out / "checkpoints").glob(".tmp-*")}


# R4 and R5


def places(data: Data) -> dict[str, tuple[str, int]]:
    """Where a run is interrupted: a function and its how many-th call. A step has two micro-batches."""
    recipe = data.recipe("none")
    epoch = len(open_stream(recipe, open_source(recipe)))
    return {
        "step 0": ("train.loop:backward", 1),
        "warm-up": ("train.loop:backward", 3),
        "accumulation": ("train.loop:backward", 2 * 5 + 2),
        "the end of an epoch": ("train.loop:backward", 2 * epoch // recipe.batch_size + 1),
        "validation": ("train.validation:_packed", 1),
        "judges": ("pipelines.shapes.evaluation:see", 1),
    }


def resumed(data: Data, together: int) -> Line:
    """Killed or stopped by a signal, also in validation or while judges look, a run leaves what it would have left
    anyway."""
    ways = [*product((1, 2), (0, 2))]
    where = places(data)

    def recipe_of(name: str, count: int, workers: int) -> Recipe:
        changes = {"data": {"workers": workers}, "optimizer": {"warmup": 24}}
        return data.recipe(f"{name}-{count}-{workers}".replace(" ", "-"), **changes)

    def one(case: tuple[tuple[int, int], str, str]) -> list[str]:
        (count, workers), place, act = case
        recipe, straight = recipe_of(f"{act} {place}", count, workers), recipe_of("straight", count, workers)
        victims, code = (EVERYONE, -signal.SIGKILL) if act == "killed" else ((count - 1,), STOPPED)
        found = [*finish(recipe, count, Disturbance(*where[place], act, victims)), *finish(recipe, count)]
        return differs(recipe.out, found, [code] * count + [0] * count) or differs(
            recipe.out, left_by(recipe.out), left_by(straight.out)
        )

    with ThreadPoolExecutor(together) as pool:
        codes = [*pool.map(lambda way: finish(recipe_of("straight", *way), way[0]), ways)]
        cases = [*product(ways, where, ("killed", "SIGTERM"))]
        bad = differs("straight", codes, [[0] * count for count, _ in ways])
        bad += chain.from_iterable(pool.map(one, cases))
    return Line(f"R4  killed or stopped at {', '.join(where)}; 1 and 2 processes, 0 and 2 workers: {len(cases)} runs "
                f"begun again, {len(bad)} not the same bits", bad)  # fmt: skip


def fewer_and_more(data: Data) -> Line:
    straight = data.recipe("straight-of-two")
    bad, worst = differs(straight.out, finish(straight, 2), [0, 0]), 0.0
    cuts = ((2, 5), (1, 6), (3, 4))  # steps after which the run is stopped
    for first, second in cuts:
        recipe = data.recipe(f"two-one-two-{first}")
        stop = partial(Disturbance, "train.loop:backward", act="SIGTERM", victims=(0,))
        codes = [
            *finish(recipe, 2, stop(2 * first)),
            *finish(recipe, 1, stop(2 * (second - first))),
            *finish(recipe, 2),
        ]
        bad += differs(recipe.out, codes, [STOPPED] * 3 + [0, 0])
        bad += differs(f"{recipe.out}, samples", seen_by(recipe.out), seen_by(straight.out))
        losses, right = ([row["loss"] for row in rows(out) if "loss" in row] for out in (recipe.out, straight.out))
        worst = max([worst, *(abs(loss / other - 1) for loss, other in zip(losses, right, strict=True))])
    bad += ["the losses are too far apart"] * (not worst < 1e-3)
    return Line(f"R5  2, 1 and 2 processes in turn, {len(cuts)} runs: {len(bad)} bad; same order of samples, losses "
                f"at most {worst:.1e} apart (relative)", bad)  # fmt: skip


def seen_by(out: Path) -> dict[int, list[Any]]:
    """Number in the source and content of the picture at each position, of all processes."""
    lines = [json.loads(line) for path in out.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    return {position: picture for line in lines for position, *picture in line["samples"]}


# R9


def marked_validation(mark: Path, rank: int) -> None:
    """While the first process is in validation, the file is there."""
    validate = loop.validate

    def marked(*arguments: Any, **options: Any) -> bool:
        mark.touch()
        done = validate(*arguments, **options)
        mark.unlink()
        return done

    if rank == 0:
        loop.validate = marked


def signals(data: Data, number: int, chance: random.Random) -> Line:
    """Of two processes one gets the signal, or both as Ctrl-C gives it; each fifth waits for a validation."""
    bad, slowest, in_validation = [], 0.0, 0
    for run in range(number):
        recipe = data.recipe(f"signal-{run}", pictures=1_000_000, checkpoint_every=160, validation={"pictures": 6})
        mark = data.folder / f"validating-{run}"
        processes = begin(recipe, 2, partial(marked_validation, mark))
        wait(math.inf, processes, (recipe.out / "samples-00001.jsonl").exists)
        wait(time.monotonic() + chance.uniform(0, 4), processes)
        if run % 5 == 0:
            wait(math.inf, processes, mark.exists)
        which, inside = (signal.SIGTERM, signal.SIGINT)[run % 2], mark.exists()
        for process in chance.choice([processes, processes[:1], processes[1:]]):
            os.kill(process.pid, which)
        in_validation += inside and mark.exists()
        codes, taken = end(processes, 60)
        slowest = max(slowest, taken)
        case = f"run {run}, {which.name}"
        bad += differs(case, codes, [STOPPED, STOPPED]) + [f"{case}: {taken:.0f} s"] * (taken > 30)
        logs = [path.read_text().splitlines()[-1] for path in recipe.out.glob("samples-*.jsonl")]
        saved = max([0, *(int(path.name) for path in (recipe.out / "checkpoints").glob("[0-9]*"))])
        bad += differs(f"{case}, saved", [saved, saved], [json.loads(line)["pictures"] for line in logs])
        shutil.rmtree(recipe.out)
    return Line(f"R9  SIGTERM and SIGINT to one or both of two processes at {number} instants, {in_validation} of them "
                f"in validation: {len(bad)} bad; saved and left together within {slowest:.1f} s", bad)  # fmt: skip


# R11 and R13


def watched_or_not(data: Data, together: int) -> Line:
    def one(case: tuple[str, int]) -> list[str]:
        phase, count = case
        vae = None if phase == "autoencoder" else data.vae
        ways = {0: {"every": 0, "judges": []}, 16: {"every": 16}}
        off, on = (full_recipe(data.folder / f"{phase}-{count}-{every}", data.pictures, vae, phase=phase,
                               validation=validation) for every, validation in ways.items())  # fmt: skip
        bad = differs(on.out, [*finish(off, count), *finish(on, count)], [0] * 2 * count)
        bad += differs(f"{on.out}, validation", newest(on.out), newest(off.out))
        grids = [(on.out / "samples" / f"{seen:012d}.png").is_file() for seen in range(16, 65, 16)]
        bad += differs(f"{on.out}, grids", grids, [True] * 4)
        return bad + differs(f"{on.out}, losses", sum("held_out_loss" in row for row in rows(on.out)), 4)

    cases = [*product(("autoencoder", "text", "diffusion"), (1, 2))]
    with ThreadPoolExecutor(together) as pool:
        bad = [*chain.from_iterable(pool.map(one, cases))]
    return Line(f"R11 validation on or off, three phases, 1 and 2 processes: {len(cases)} pairs of runs, {len(bad)} "
                "bad; weights, averages and optimizer are the same bits", bad)  # fmt: skip


def noted_rates(to: Path, disturb: Callable[[int], None], rank: int) -> None:
    """Writes the rate of each group at each step of the optimizer."""
    step = torch.optim.AdamW.step

    def noting(self: Any, *arguments: Any) -> Any:
        with to.with_suffix(f".{rank}").open("a") as file:
            file.write(json.dumps([group["lr"] for group in self.param_groups]) + "\n")
        return step(self, *arguments)

    torch.optim.AdamW.step = noting
    disturb(rank)


def rates(data: Data, together: int) -> Line:
    options = {"learning_rate": 1e-3, "warmup": 32, "decay": "cosine", "final_share": 0.1}
    right = [
        1e-3 * ((seen + 1) / 33 if seen < 32 else 0.1 + 0.9 * math.cos(math.pi / 2 * (seen - 32) / 96) ** 2)
        for seen in range(0, 128, 16)
    ]

    def one(case: tuple[int, int, bool]) -> tuple[float, list[str]]:
        count, accumulation, again = case
        to = data.folder / f"rates-{count}-{accumulation}-{again}"
        recipe = data.recipe(to.name, pictures=128, batch_size=16, gradient_accumulation_steps=accumulation,
                             optimizer=options, validation={"every": 0})  # fmt: skip
        bad, far, note = [], 0.0, partial(noted_rates, to)
        if again:
            stop = Disturbance("train.loop:backward", 4 * accumulation, "SIGTERM")
            bad += differs(to, finish(recipe, count, partial(note, stop)), [STOPPED] * count)
        bad += differs(to, finish(recipe, count, partial(note, undisturbed)), [0] * count)
        for rank in range(count):
            steps = [json.loads(line) for line in to.with_suffix(f".{rank}").read_text().splitlines()]
            taken = [step for step in steps if any(step)]  # a resumed optimizer makes its state in a step of rate 0
            bad += differs(f"{to}, process {rank}, steps", len(taken), len(right))
            pairs = zip(taken, right, strict=False)
            far = max([far, *(abs(rate - exact) for step, exact in pairs for rate in step)])
        return far, bad + [f"{to}: {far}"] * (not far < 1e-12)

    cases = [*product((1, 2, 4), (1, 4), (False, True))]
    with ThreadPoolExecutor(together) as pool:
        found = [*pool.map(one, cases)]
    bad, worst = [line for _, lines in found for line in lines], max(far for far, _ in found)
    return Line(f"R13 rates of 1, 2 and 4 processes, 1 and 4 micro-batches, resumed or not: {len(cases)} cells, "
                f"{len(bad)} bad; at most {worst:.1e} from the closed form", bad)  # fmt: skip


def proofs(arguments: argparse.Namespace, data: Data) -> Iterator[tuple[str, Callable[[], Line]]]:
    chance = random.Random(arguments.seed)
    for count in (1, 2):
        yield f"R1-{count}", partial(kills, data, count, arguments.kills // 2, chance)
    yield "R4", partial(resumed, data, arguments.together)
    yield "R5", partial(fewer_and_more, data)
    yield "R9", partial(signals, data, arguments.signals, chance)
    yield "R11", partial(watched_or_not, data, arguments.together)
    yield "R13", partial(rates, data, arguments.together)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=4)
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
