"""Arms of an experiment: trainings that differ in a few lines of one recipe, judged exactly in the shapes world.

    python -m train data shapes data/shapes --count 20000 --masks
    python -m train configs/shapes/text.yaml
    python benchmarks/arms.py benchmarks/kinds.yaml [KEY=VALUE ...] [--pictures 100000 | --seconds 600] [--seeds 0,1]
                              [--arms dot,additive,...] [--splits seen,heldout] [--prompts 300] [--threads 1]
                              [--folder runs/kinds] [--table]

The file names a recipe, what the arms have in common (`set`), and of each arm what it `is` and what it sets beside. All
see the same pictures in the same order with the same noise, one arm after the other in processes of their own. First
2,048 pictures on trial, for the costs; the machine should be quiet then. The budget is equal in pictures or, by what
the trial says, in processor seconds. Can be stopped at any time: the same command goes on, and what is done is not done
again; --table prints what there is. Overrides KEY=VALUE belong to a folder: others need another --folder.

Exact: the judge of the shapes world finds every fact of the caption in the picture, with a Wilson 95 % interval over
prompts of all seeds; by how much trainings with other seeds differ is not in it. Broken facts tell arms apart that draw
nothing exactly yet. Training: processor seconds for 1,000 pictures, the median over the trial's log, and the most
memory that the process held. Drawing: processor seconds of a picture with the recipe's steps and guidance,
the median of 8.
Prints tables in Markdown; progress goes to stderr.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"seen": "seen", "heldout": "held out"}
DRAWN = 8  # pictures whose time is taken
TRIAL = 2048  # pictures whose costs are taken


def train(recipe: str, out: Path, overrides: list[str], threads: int) -> None:
    """Trains one arm to its end, from where it stands. Exits as the trainer does when that does not come to its end."""
    command = [sys.executable, "-m", "train", str(ROOT / recipe), f"out={out}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: child.send_signal(received))
        code = child.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if code:
        sys.exit(code)


def costs(out: Path) -> dict[str, float]:
    """Of a finished arm, from its log: training of 1,000 pictures in seconds of the processor and of the clock, and GB;
    from its model: parameters, GFLOP of a forward, and seconds of the processor for a picture."""
    from pipelines import TextToImage
    from pipelines.inspection import inspect

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "pictures_per_second" in line]  # not those of validation
    model = inspect(out / "model")
    pipe, times = TextToImage.from_pretrained(out / "model"), []
    for seed in range(1 + DRAWN):
        begin = time.process_time()
        pipe("a red circle", seed=seed)
        times.append(time.process_time() - begin)
    return {
        "cpu_seconds": 1000 * statistics.median(line["seconds/cpu_a_picture"] for line in lines),
        "seconds": statistics.median(1000 / line["pictures_per_second"] for line in lines),
        "memory_gb": max(line["peak_memory_gb"] for line in lines),
        "parameters": model["parameters"]["unet"],
        "gflop": model["flops"] / 1e9,
        "drawing": statistics.median(times[1:]),  # the first one lays out the weights
    }


def score(out: Path, split: str, prompts: int) -> dict[str, Any]:
    """What the judge says of a finished arm's pictures of a split."""
    from pipelines import TextToImage
    from pipelines.shapes.evaluation import evaluate_shapes

    return evaluate_shapes(TextToImage.from_pretrained(out / "model"), split, prompts)[0]


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a JSON file, made and written first where it is not there."""
    if not file.exists():
        made = json.dumps(make(), indent=1)
        file.write_text(made)
    return json.loads(file.read_text())


def finished(
    experiment: dict[str, Any], arm: str, seed: str, folder: Path, splits: list[str], options: argparse.Namespace
) -> dict[str, Any] | None:
    """Pictures, costs and scores of an arm, trained where it is not; None where it is not and must not be."""

    def trained(out: Path, pictures: int) -> bool:
        if not (out / "model").exists() and not options.table:
            print(f"{arm}, seed {seed}, in {out}", file=sys.stderr, flush=True)
            lines = [*experiment.get("set", []), *experiment["arms"][arm]["set"], *options.overrides]
            train(experiment["recipe"], out, [*lines, f"seed={seed}", f"pictures={pictures}"], options.threads)
        return (out / "model").exists()

    trial = folder / "trial" / f"{arm}-{seed}"
    if not trained(trial, TRIAL):
        return None
    cost = kept(trial / "costs.json", partial(costs, trial))
    pictures = int(1000 * options.seconds / cost["cpu_seconds"]) if options.seconds else options.pictures
    out = folder / (f"{options.seconds:g}s" if options.seconds else f"{pictures}") / f"{arm}-{seed}"
    if not trained(out, pictures):
        return None
    scored = {
        split: kept(out / f"{split}-{options.prompts}.json", partial(score, out, split, options.prompts))
        for split in splits
    }
    return {"pictures": pictures, "costs": cost, **scored}


def share(reports: list[dict[str, Any]]) -> str:
    """The mean score of one arm's reports with its interval over all their prompts, in percent."""
    from pipelines.evaluation import wilson

    mean, n = statistics.fmean(report["score"] for report in reports), sum(report["n"] for report in reports)
    low, high = wilson(mean * n, n)
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def broken(reports: list[dict[str, Any]]) -> str:
    """How many facts of its caption a picture breaks, over all pictures of one arm's reports."""
    return f"{sum(sum(report['broken'].values()) for report in reports) / sum(report['n'] for report in reports):.2f}"


def rows(head: list[str], found: dict[str, list[Any]], cells: Callable[[list[Any]], list[str]]) -> str:
    """A table with a row for each arm."""
    lines = [head, ["---"] * len(head), *([name, *cells(runs)] for name, runs in found.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(differ: str, splits: list[str], found: dict[str, list[dict[str, Any]]]) -> str:
    """Scores, costs and scores by skill of each arm; means over its seeds. differ: in what the arms do."""
    from pipelines.shapes.world import SKILLS

    def exact(runs: list[dict[str, Any]]) -> list[str]:
        reports = [[run[split] for run in runs] for split in splits]
        prompts = sum(report["n"] for report in reports[0])
        return [f"{runs[0]['pictures']:,}", *map(share, reports), *map(broken, reports), str(prompts)]

    def cost(runs: list[dict[str, Any]]) -> list[str]:
        forms = {"cpu_seconds": ".1f", "seconds": ".1f", "memory_gb": ".2f", "parameters": ",.0f", "gflop": ".3f",
                 "drawing": ".3f"}  # fmt: skip
        means = [format(statistics.fmean(run["costs"][name] for run in runs), form) for name, form in forms.items()]
        return [str(len(runs)), *means]

    def skilled(split: str, runs: list[dict[str, Any]]) -> list[str]:
        each = ([run[split]["skills"][skill] for run in runs] for skill in SKILLS)
        return [f"{statistics.fmean(one['score'] for one in skill):.0%}" for skill in each]

    names = [SPLITS[split] for split in splits]
    costs = [
        "seeds",
        "training of 1,000: CPU s",
        "clock s",
        "GB",
        "U-Net parameters",
        "GFLOP a call",
        "CPU s a picture",
    ]
    scores = [*(f"exact, {name}" for name in names), *(f"broken facts a picture, {name}" for name in names)]
    parts = [rows([differ, "pictures", *scores, "n each"], found, exact)]
    parts += [rows([differ, *costs], found, cost)]
    for split, name in zip(splits, names, strict=True):
        parts += [rows([differ, *(f"{skill}, {name}" for skill in SKILLS)], found, partial(skilled, split))]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the recipe of every arm")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--pictures", type=int, default=100_000, help="that each arm is trained on")
    budget.add_argument("--seconds", type=float, help="of the processor, for each arm's training")
    parser.add_argument("--seeds", default="0", help="of the trainer, with commas")
    parser.add_argument("--arms", help="some of them, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="runs/ and the experiment's name where there is none")
    parser.add_argument("--splits", default="seen,heldout")
    parser.add_argument("--prompts", type=int, default=300, help="to be drawn of each split")
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    options = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of this process too, before it imports torch
    experiment = yaml.safe_load(options.experiment.read_text())
    arms = options.arms.split(",") if options.arms else [*experiment["arms"]]
    if unknown := [arm for arm in arms if arm not in experiment["arms"]]:
        parser.error(f"no arm is called {unknown[0]!r}; there are {', '.join(experiment['arms'])}")
    folder = options.folder or Path("runs") / options.experiment.stem
    splits = options.splits.split(",")

    found: dict[str, list[dict[str, Any]]] = {}
    for seed, arm in product(options.seeds.split(","), arms):
        run = finished(experiment, arm, seed, folder, splits, options)
        if run is not None:
            found.setdefault(experiment["arms"][arm]["is"], []).append(run)
    print(tables(experiment["differ"], splits, found))


if __name__ == "__main__":
    main()
