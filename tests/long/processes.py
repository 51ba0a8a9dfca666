"""Processes that fail, die, fall silent or share uneven data, counted: P1, P2, P3 and R10. Prints one line for each.

    python -m tests.long.processes [FOLDER] [--only P1 P2 ...] [--clean 60] [--load 0] [--together 6]

Ends with 1 when anything was bad. Real processes (gloo on the CPU, fp32) do what `python -m train` does. --load: how
many processes compute without end beside them. --together: runs of P1 at a time.
"""

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from tests.long.runs import Disturbance, Line, apart, begin, differs, end, finish, full_recipe, left_by, load, said
from tests.train.tiny import difference, make_pictures, make_vae, tiny_recipe, weights
from train import loop
from train.company import EXIT_CODE
from train.data.folder import Folder
from train.data.pack import pack
from train.data.stream import Stream
from train.diffusion_phase import DiffusionPhase

LIMITS = {"raised": 15, "killed": 15, "stopped": 60}  # seconds that the others may go on
ROOT = Path(__file__).resolve().parents[2]


# P1

PLACES = {
    "before the data": ("train.loop:prepare", 1),
    "encoding pictures": ("train.cache:Latents._encode", 3),
    "in the first step": ("train.loop:backward", 1),
    "in a step": ("train.loop:backward", 6),
    "between backward and step": ("train.loop:whole", 4),
    "in a held-out loss": ("train.validation:held_out_losses", 1),
    "in a grid": ("train.validation:_packed", 1),
    "writing a checkpoint": ("train.checkpoint_files:_write_flushed", 6),
    "reading it again": ("train.checkpoint_files:_problem", 2),
}


def ends(folder: Path, data: Path, vae: Path, act: str, place: str, victim: int) -> tuple[float, list[str]]:
    """How long the other goes on after one of two processes was struck, and what is wrong with its end."""
    name = f"{act}-{place.replace(' ', '-')}-{victim}"
    recipe = full_recipe(folder / name, data, vae, validation={"every": 16},
                         data={"cache_latents": True, "crop": "center"})  # fmt: skip
    processes = begin(recipe, 2, Disturbance(*PLACES[place], act, (victim,), mark=folder / f"{name}.struck"))
    struck = folder / f"{name}.struck"
    begun = time.monotonic()
    while not struck.exists() and time.monotonic() < begun + 120:
        time.sleep(0.01)
    codes, _ = end([processes[1 - victim]], 2 * LIMITS[act])
    taken = time.time() - struck.stat().st_mtime if struck.exists() else math.inf
    end([processes[victim]], 0 if act == "stopped" else 10)
    words = said(recipe, 1 - victim)
    bad = differs(name, codes, [1 if act == "raised" else EXIT_CODE])
    if taken > LIMITS[act]:
        bad.append(f"{name}: it took {taken:.0f} s")
    if not re.search(rf"error: process {victim} (failed|was killed|is gone).* at picture \d+, step \d+", words):
        bad.append(f"{name}: it said {words[-500:]!r}")
    return taken, bad


def losses_of_company(folder: Path, data: Path, vae: Path, together: int) -> Iterator[Line]:
    for act, limit in LIMITS.items():
        cases = list(product([act], PLACES, (0, 1)))
        with ThreadPoolExecutor(together) as pool:
            found = list(pool.map(lambda case: ends(folder, data, vae, *case), cases))
        bad = [line for _, lines in found for line in lines]
        slowest = max(taken for taken, _ in found)
        yield Line(f"P1  either of two processes {act} at {len(PLACES)} places: {len(found)} runs, {len(bad)} bad; the "
                   f"other ended within {slowest:.1f} s (at most {limit}) and said who and where", bad)  # fmt: skip


def clean_runs(folder: Path, data: Path, vae: Path, number: int, together: int) -> Line:
    """Runs that nothing disturbs, several at a time, so that their threads have to wait for a processor: all end."""

    def one(run: int) -> tuple[list[int | None], float]:
        recipe = tiny_recipe(folder / f"clean-{run}", data, vae, pictures=16)
        return end(begin(recipe, 2))

    with ThreadPoolExecutor(together) as pool:
        found = list(pool.map(one, range(number)))
    bad = [line for run, (codes, _) in enumerate(found) for line in differs(f"clean run {run}", codes, [0, 0])]
    times = [taken for _, taken in found]
    return Line(f"P1  {number} clean runs of two processes, {together} at a time: {len(bad)} bad; "
                f"{min(times):.1f} to {max(times):.1f} s", bad)  # fmt: skip


# P2 and P3


def uneven_data(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """How many processes, and what changes in the recipe."""
    odd, one, many = (make_pictures(folder / f"{count}", count) for count in (13, 1, 40))
    shapes = make_pictures(folder / "shapes", 17)
    for number in range(5):
        with Image.open(shapes / f"{number}.png") as picture:
            picture.resize((32, 16)).save(shapes / f"{number}.png")
    for number in (6, 7):
        (many / f"{number}.png").write_bytes(b"no picture")
    manifest, _ = pack(Folder(many), folder / "shards", shard_size=2)
    assert sorted({shard.pictures for shard in manifest.shards}) == [0, 2]
    shards = {"folder": None, "shards": str(folder / "shards"), "held_out": 0.2}
    cached = {"cache_latents": True, "crop": "center"}
    return {
        "13 pictures, 2 processes": (2, {"data": {"folder": odd, "held_out": 0.3}}),
        "13 pictures, 3 processes": (3, {"data": {"folder": odd, "held_out": 0.3}, "batch_size": 12, "pictures": 96}),
        "1 picture, 2 processes": (2, {"data": {"folder": one, "held_out": 0, **cached}}),
        "17 pictures of 2 sizes": (2, {"data": {"folder": shapes, "held_out": 0, "bucket_step": 8, **cached}}),
        "an empty shard": (2, {"data": shards}),
        "an empty shard, each for itself": (2, {"data": {**shards, "window": 1, **cached}}),
        "an empty shard, 4 processes": (4, {"data": {**shards, **cached}}),
    }


def uneven(folder: Path, vae: Path) -> Line:
    bad, cases = [], uneven_data(folder / "uneven")
    for number, (case, (count, changes)) in enumerate(cases.items()):
        recipe = full_recipe(folder / f"uneven-{number}", None, vae, **changes)
        bad += differs(case, finish(recipe, count), [0] * count)
        logs = [[json.loads(line) for line in path.read_text().splitlines()]
                for path in sorted(recipe.out.glob("samples-*.jsonl"))]  # fmt: skip
        steps = [*range(recipe.batch_size, recipe.pictures + 1, recipe.batch_size)]
        bad += differs(f"{case}, steps", [[line["pictures"] for line in log] for log in logs], [steps] * count)
        positions = sorted(row[0] for log in logs for line in log for row in line["samples"])
        bad += differs(f"{case}, positions", positions, [*range(recipe.pictures)])
    return Line(f"P2  {'; '.join(cases)}: {len(bad)} bad; the same number of steps everywhere", bad)


def several_as_one(folder: Path, data: Path, vae: Path) -> Line:
    bad, said_of = [], []
    runs = {count: full_recipe(folder / f"as-one-{count}", data, vae, pictures=400, checkpoint_every=400,
                               validation={"every": 0}) for count in (1, 2, 4)}  # fmt: skip
    for count, recipe in runs.items():
        bad += differs(recipe.out, finish(recipe, count), [0] * count)
    for count in (2, 4):
        for part in ("model", "ema"):
            one, several = (weights(runs[number].out, part) for number in (1, count))
            far = apart(one, several), difference(one, several)
            bad += [f"{count} processes, {part}: {far}"] * (not max(far) < 1e-6)
            said_of.append(f"{count}, {part}: {far[0]:.1e} of its length, {far[1]:.1e} of the largest weight")
    return Line(f"P3  50 steps of 1, 2 and 4 processes: {len(bad)} bad; {'; '.join(said_of)}", bad)


# R10


def broken_number(kind: str, step: int, victim: int, rank: int) -> None:
    """From that step on, something of a sample that the process `victim` sees in it is NaN, at each visit."""
    stream, phase, backward, calls = Stream.__getitem__, DiffusionPhase.loss, loop.backward, itertools.count()
    position = 8 * step + victim

    def pixels(self: Stream, number: int) -> Any:
        sample = stream(self, number)
        return sample if number != position else sample._replace(pixels_CHW=math.nan * sample.pixels_CHW)

    def loss(self: DiffusionPhase, module: Any, samples: list[Any], u_B: Any = None) -> torch.Tensor:
        here = torch.tensor([sample.position == position for sample in samples])
        return torch.where(here, math.nan, 1.0) * phase(self, module, samples, u_B)

    def gradient(accelerator: Any, run: Any, lap: Any) -> Any:
        weight = next(value for value in run.phase.module.parameters() if value.requires_grad)
        broken = math.nan if rank == victim and next(calls) == 2 * step else 1.0
        handle = weight.register_hook(lambda grad: grad * broken)
        found = backward(accelerator, run, lap)
        handle.remove()
        return found

    if kind == "data":
        Stream.__getitem__ = pixels
    elif kind == "loss":
        DiffusionPhase.loss = loss
    else:
        loop.backward = gradient


def not_finite(folder: Path, data: Path, vae: Path) -> Line:
    """Each case: all processes end before the step, say whose sample it was, and without the NaN the run goes on."""
    bad, cases = [], 0
    straights = {count: full_recipe(folder / f"finite-{count}", data, vae) for count in (1, 2)}
    for count, straight in straights.items():
        bad += differs(straight.out, finish(straight, count), [0] * count)
    for kind, step, (count, victim) in product(("loss", "gradient", "data"), (0, 5), ((1, 0), (2, 0), (2, 1))):
        case = f"{kind}-{step}-{count}-{victim}"
        recipe = full_recipe(folder / case, data, vae)
        codes = finish(recipe, count, partial(broken_number, kind, step, victim))
        bad += differs(f"{case}: {said(recipe, victim)[-500:]}", codes, [70] * count)
        saved = [*(recipe.out / "checkpoints").glob("[0-9]*/*.safetensors")]
        bad += differs(f"{case}, saved", max([0, *(int(file.parent.name) for file in saved)]), 8 * step)
        finite = all(value.isfinite().all() for file in saved for value in load_file(file).values())
        bad += differs(f"{case}, checkpoints are finite", finite, True)
        for rank in range(count):
            positions = re.findall(r"\d+\.png \(picture (\d+), process \d\)", said(recipe, rank))
            named = range(8 * step, 8 * step + 8) if kind == "gradient" else [8 * step + victim]
            bad += differs(f"{case}, named by {rank}", sorted(map(int, positions)), [*named])
        bad += differs(f"{case}, again", finish(recipe, count), [0] * count)
        bad += differs(f"{case}, again", left_by(recipe.out), left_by(straights[count].out))
        cases += 1
    return Line(f"R10 NaN in loss, gradient or data of one process, two steps, 1 and either of 2 processes: {cases} "
                f"runs, all ended with 70 before the step and named the samples: {len(bad)} bad", bad)  # fmt: skip


def proofs(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    data, vae = make_pictures(folder / "pictures", 22), make_vae(folder / "vae")
    yield "P1", partial(losses_of_company, folder, data, vae, arguments.together)
    yield "P2", lambda: iter([uneven(folder, vae)])
    yield "P3", lambda: iter([several_as_one(folder, data, vae)])
    yield "R10", lambda: iter([not_finite(folder, data, vae)])
    yield "clean", lambda: iter([clean_runs(folder, data, vae, arguments.clean, arguments.together)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--clean", type=int, default=60)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--together", type=int, default=6)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place, load(arguments.load):
        for name, proof in proofs(arguments, Path(place)):
            if not arguments.only or name in arguments.only:
                for line in proof():
                    print(line.text, *line.bad, sep="\n  ", flush=True)
                    bad += len(line.bad)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
