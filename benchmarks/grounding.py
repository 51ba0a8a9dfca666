"""What does a loss for attention beside masks bring? Trained with and without, on pictures of the shapes world.

    python benchmarks/grounding.py CONFIG OUT [--grounding 0.3] [--count 20000] [-n 300] [key.path=value ...]

CONFIG is a recipe of the diffusion phase; the further words replace keys of it in both runs. They share seed, pictures
and budget, and differ in objective.grounding alone. Then each model draws the exam of `gaze evaluate shapes`, with
seen and with held-out combinations, and the maps of its words are held against the judge's masks as benchmarks/truth.py
does. Prints a table in Markdown, with 95 % intervals. What is there is not made again: the pictures in OUT/data, runs
(which go on from their checkpoints) and results.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.agreement import CALIBRATION, MEASURED, alike, measure, observed, shown, table
from pipelines import TextToImage
from pipelines.places import SPLITS
from pipelines.shapes.evaluation import evaluate_shapes
from train.data.drawn import build_shapes

BATCH = 32


def result(config: Path, out: Path, data: Path, grounding: float, n: int, overrides: list[str]) -> dict[str, Any]:
    """Scores by split, and mIoU by kind of word, of a run that is finished where it is not."""
    run = out / f"grounding-{grounding:g}"
    kept = run / f"result-{n}.json"
    if not kept.is_file():
        words = [f"out={run}", f"data.folder={data}", f"data.cache={out / 'cache'}", f"objective.grounding={grounding}"]
        subprocess.run([sys.executable, "-m", "train", config, *overrides, *words], check=True)
        kept.write_text(json.dumps(judged(TextToImage.from_pretrained(run / "model"), n)))
    return json.loads(kept.read_text())


def judged(pipe: TextToImage, n: int) -> dict[str, Any]:
    scores = {split: evaluate_shapes(pipe, split, n, batch=BATCH)[0] for split in SPLITS}
    before, found = alike(*(observed(pipe, seed, n, "seen", BATCH, {})[1] for seed in (CALIBRATION, MEASURED)))
    agreed = {kind: measure(before[kind], own, "word map") for kind, own in found.items()}
    return {
        "scores": {split: [each[key] for key in ("score", "low", "high", "n")] for split, each in scores.items()},
        "miou": {kind: [*each.miou, each.n] for kind, each in agreed.items()},
    }


def cell(figures: list[float]) -> str:
    middle, low, high, n = figures
    return f"{shown((middle, low, high))}, n {n}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grounding", type=float, default=0.3)
    parser.add_argument("--count", type=int, default=20_000, help="pictures to draw")
    parser.add_argument("-n", type=int, default=300, help="prompts of each split, and pictures for the maps")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()
    data = arguments.out / "data"
    if not (data / "metadata.jsonl").is_file():  # which is written last
        build_shapes(data, arguments.count, with_masks=True)
    of = {
        weight: result(arguments.config, arguments.out, data, weight, arguments.n, arguments.overrides)
        for weight in (0.0, arguments.grounding)
    }
    kinds = [kind for kind in of[0.0]["miou"] if all(kind in each["miou"] for each in of.values())]
    rows = [
        [f"{weight:g}", *map(cell, [*each["scores"].values(), *(each["miou"][kind] for kind in kinds)])]
        for weight, each in of.items()
    ]
    heads = [*(f"right, {split}" for split in SPLITS), *(f"mIoU, {kind}" for kind in kinds)]
    print(table(["objective.grounding", *heads], rows))


if __name__ == "__main__":
    main()
