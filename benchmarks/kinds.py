"""What does cross-attention buy, and which score function serves best? Arms that differ in one line of a recipe.

    python -m train data shapes data/shapes --count 20000
    python -m train configs/shapes/text.yaml
    python benchmarks/kinds.py [KEY=VALUE ...] [--pictures 30000] [--seeds 0] [--arms dot,additive,...] [--threads 1]
                               [--folder runs/kinds] [--prompts 300] [--table]

Trains each arm with configs/shapes/diffusion.yaml, the overrides KEY=VALUE and the arm's own, all on the same pictures
in the same order with the same noise, one after the other in processes of their own. Can be stopped at any time: the
same command goes on, and what is done is not done again; --table prints what there is. Overrides belong to a folder:
others need another --folder.

Exact: the judge of the shapes world finds every fact of the caption in the picture, with a Wilson 95 % interval over
prompts of all seeds; by how much trainings with other seeds differ is not in it. Training: processor seconds for 1,000
pictures, the median over the run's log, and the most memory that the process held. Drawing: processor seconds of a
picture with the recipe's steps and guidance, the median of 8.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "shapes" / "diffusion.yaml"
POOLED = ["model.unet.cross_attention_dim=null", "model.unet.addition_embed_type=pooled"]
ARMS = {
    "dot": ["model.unet.cross_attention_score=dot"],
    "additive": ["model.unet.cross_attention_score=additive"],
    "bilinear": ["model.unet.cross_attention_score=bilinear"],
    "cosine": ["model.unet.cross_attention_score=cosine"],
    "pooled": POOLED,
    "none": ["model.unet.cross_attention_dim=null"],
}
WORDS = {
    "dot": "scaled dot product",
    "additive": "additive",
    "bilinear": "bilinear",
    "cosine": "cosine, learned temperature",
    "pooled": "no cross-attention, pooled text beside the time",
    "none": "no text",
}
SPLITS = {"seen": "seen", "heldout": "held out"}
DRAWN = 8  # pictures whose time is taken


def train(out: Path, overrides: list[str], threads: int) -> None:
    """Trains one arm to its end, from where it stands. Exits as the trainer does when that does not come to its end."""
    command = [sys.executable, "-m", "train", str(RECIPE), f"out={out}", *overrides]
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


def scores(out: Path, prompts: int) -> dict[str, Any]:
    """What the judge says of a finished arm, by split."""
    from pipelines import TextToImage
    from pipelines.shapes.evaluation import evaluate_shapes

    pipe = TextToImage.from_pretrained(out / "model")
    return {split: evaluate_shapes(pipe, split, prompts)[0] for split in SPLITS}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in a JSON file, made and written first where it is not there."""
    if not file.exists():
        made = json.dumps(make(), indent=1)
        file.write_text(made)
    return json.loads(file.read_text())


def share(reports: list[dict[str, Any]]) -> str:
    """The mean score of one arm's reports with its interval over all their prompts, in percent."""
    from pipelines.evaluation import wilson

    mean, n = statistics.fmean(report["score"] for report in reports), sum(report["n"] for report in reports)
    low, high = wilson(mean * n, n)
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def rows(head: list[str], found: dict[str, list[Any]], cells: Callable[[list[Any]], list[str]]) -> str:
    """A table with a row for each arm."""
    lines = [["cross-attention", *head], ["---"] * (1 + len(head))]
    lines += [[WORDS[arm], *cells(runs)] for arm, runs in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(costs: dict[str, list[dict[str, Any]]], scores: dict[str, list[dict[str, Any]]]) -> str:
    """Costs, scores and scores by skill; means over the seeds of an arm."""
    from pipelines.shapes.world import SKILLS

    def cost(runs: list[dict[str, Any]]) -> list[str]:
        forms = {"cpu_seconds": ".1f", "seconds": ".1f", "memory_gb": ".2f", "parameters": ",.0f", "gflop": ".3f",
                 "drawing": ".3f"}  # fmt: skip
        means = [format(statistics.fmean(run[name] for run in runs), form) for name, form in forms.items()]
        return [str(len(runs)), *means]

    def exact(runs: list[dict[str, Any]]) -> list[str]:
        prompts = sum(run["seen"]["n"] for run in runs)
        return [*(share([run[split] for run in runs]) for split in SPLITS), str(prompts)]

    def skilled(split: str, runs: list[dict[str, Any]]) -> list[str]:
        each = ([run[split]["skills"][skill] for run in runs] for skill in SKILLS)
        return [f"{statistics.fmean(one['score'] for one in skill):.0%}" for skill in each]

    head = ["seeds", "training of 1,000: CPU s", "clock s", "GB", "U-Net parameters", "GFLOP a call", "CPU s a picture"]
    parts = [rows(["exact, seen", "exact, held out", "n each"], scores, exact), rows(head, costs, cost)]
    parts += [
        rows([f"{skill}, {SPLITS[split]}" for skill in SKILLS], scores, partial(skilled, split)) for split in SPLITS
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the recipe of every arm")
    parser.add_argument("--pictures", type=int, default=30_000, help="that each arm is trained on")
    parser.add_argument("--seeds", default="0", help="of the trainer, with commas")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of them, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/kinds"))
    parser.add_argument("--prompts", type=int, default=300, help="to be drawn of each split")
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    arguments = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of this process too, before it imports torch
    arms = arguments.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"no arm is called {unknown[0]!r}; there are {', '.join(ARMS)}")
    cost: dict[str, list[dict[str, Any]]] = {}
    score: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds.split(","):
        for arm in arms:
            out = arguments.folder / str(arguments.pictures) / f"{arm}-{seed}"
            overrides = [*arguments.overrides, *ARMS[arm], f"seed={seed}", f"pictures={arguments.pictures}"]
            if not (out / "model").exists():
                if arguments.table:
                    continue
                print(f"{arm}, seed {seed}, in {out}", file=sys.stderr, flush=True)
                train(out, overrides, arguments.threads)
            cost.setdefault(arm, []).append(kept(out / "costs.json", partial(costs, out)))
            judged = out / f"scores-{arguments.prompts}.json"
            score.setdefault(arm, []).append(kept(judged, partial(scores, out, arguments.prompts)))
    print(tables(cost, score))


if __name__ == "__main__":
    main()
