"""What do edits and excite do where a judge can say? Asked of a model of the shapes world.

    python benchmarks/steering.py MODEL [-n 100] [--only edits excite] [--strengths 0.25,0.5,1,2]

Edits: one word of a caption, a colour or a shape, is swapped for another that the scene has nothing of. Right: the
judge finds every fact of the new caption; kept: the root of the mean squared difference to the source outside both
masks of the object, pixels in [0, 1]. Only sources count that show their own caption.
Excite: captions of two objects, all their nouns named. There: no object is missing; right: every fact. The strength is
diffusion/excite.py's STRENGTH; those of --strengths are tried on other scenes than it is measured on.
Prints tables in Markdown; shares have Wilson's 95 % interval, differences that of the mean of pairs.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.agreement import CALIBRATION, KIND_OF, KINDS, MEASURED, mask_of, progress, shown, table
from diffusion import excite
from pipelines import TextToImage
from pipelines.edit import edit
from pipelines.evaluation import wilson
from pipelines.facts import Facts
from pipelines.shapes.captions import Word, caption, words
from pipelines.shapes.judge import check, see
from pipelines.shapes.world import Scene, scene

SHARES = [(0.0, 0.0), (0.8, 0.4), (0.8, 0.8), (1.0, 0.4), (1.0, 0.8)]  # of cross- and self-attention; the first: alone
SWAPPED = ("colour", "shape")


def scenes(seed: int) -> Iterator[Scene]:
    """Those of a seed, without end."""
    index = 0
    while True:
        yield scene(seed, index)
        index += 1


def swapped(each: Scene, kind: str) -> tuple[str, Facts, Word, Word] | None:
    """The caption and the facts with the first word of a kind swapped, that word, and the one in its place."""
    said = words(each)
    for place, word in enumerate(said):
        if KIND_OF.get(word.text) == kind and len(word.objects) == 1:
            there = {getattr(thing, kind) for thing in each.objects}
            other = Random(f"swap/{each.name}").choice([name for name in KINDS[kind] if name not in there])
            (number,) = word.objects
            objects = [
                {**thing, kind: other} if i == number else thing for i, thing in enumerate(each.facts["objects"])
            ]
            texts = [one.text for one in said]
            texts[place] = other
            return " ".join(texts), {**each.facts, "objects": objects}, word, word._replace(text=other)
    return None


def edits(pipe: TextToImage, n: int) -> str:
    rows = []
    for kind in SWAPPED:
        found: dict[tuple[float, float], list[tuple[bool, float]]] = {shares: [] for shares in SHARES}
        for seed, each in enumerate(scenes(MEASURED)):
            if len(found[SHARES[0]]) == n:
                break
            case = swapped(each, kind)
            if case is not None:
                judged = [edited(pipe, each, case, shares, seed) for shares in SHARES]
                if all(one is not None for one in judged):
                    for shares, one in zip(SHARES, judged, strict=True):
                        found[shares].append(one)
                progress(f"{kind}: {len(found[SHARES[0]])} of {n}")
        alone = found[SHARES[0]]
        for shares, judged in found.items():
            right = sum(is_right for is_right, _ in judged)
            less = [before - after for (_, before), (_, after) in zip(alone, judged, strict=True)]
            error = 1.96 * statistics.stdev(less) / len(less) ** 0.5
            rows.append([kind, "alone" if shares == SHARES[0] else f"{shares[0]:g}, {shares[1]:g}", str(len(judged)),
                         shown((right / len(judged), *wilson(right, len(judged)))),
                         f"{statistics.mean(far for _, far in judged):.4f}",
                         f"{statistics.mean(less):.4f} ± {error:.4f}"])  # fmt: skip
    return table(["swapped", "cross, self", "n", "right", "not kept", "less by"], rows)


def edited(
    pipe: TextToImage, each: Scene, case: tuple[str, Facts, Word, Word], shares: tuple[float, float], seed: int
) -> tuple[bool, float] | None:
    """Whether the edited picture is right, and how far it is from the source beside the object; None where the source
    does not show its caption or the object of either cannot be told."""
    target, facts, word, other = case
    made = edit(pipe, caption(each), target, *shares, seed=seed)
    before, after = see(made.source), see(made.target)
    old_HW, new_HW = mask_of(word, each.facts, before), mask_of(other, facts, after)
    if check(each.facts, before) or old_HW is None:
        return None
    beside_HW = ~old_HW if new_HW is None else ~(old_HW | new_HW)
    pixels = [np.asarray(image, dtype=np.float64) / 255 for image in (made.source, made.target)]
    return not check(facts, after), float(np.sqrt(np.square(pixels[0] - pixels[1])[beside_HW].mean()))


def excited(pipe: TextToImage, n: int, strengths: list[float]) -> str:
    rows = [excited_row(pipe, n, CALIBRATION, strength, "tried") for strength in (0.0, *strengths)]
    rows += [excited_row(pipe, n, MEASURED, strength, "measured") for strength in (0.0, excite.STRENGTH)]
    return table(["scenes", "strength", "n", "there", "right"], rows)


def excited_row(pipe: TextToImage, n: int, seed: int, strength: float, name: str) -> list[str]:
    """strength: 0 leaves excite out."""
    pairs = (each for each in scenes(seed) if len(each.facts["objects"]) == 2)
    before, excite.STRENGTH = excite.STRENGTH, strength
    broken = []
    for number, each in zip(range(n), pairs, strict=False):
        nouns = [word.text for word in words(each) if KIND_OF.get(word.text) == "shape"]
        options: dict[str, Any] = {"excite": nouns} if strength else {}
        broken.append(check(each.facts, see(pipe(caption(each), seed=number, **options).images[0])))
        progress(f"{name}, strength {strength:g}: {number + 1} of {n}")
    excite.STRENGTH = before
    counts = [sum("count" not in facts for facts in broken), sum(not facts for facts in broken)]
    return [name, f"{strength:g}", str(n), *(shown((count / n, *wilson(count, n))) for count in counts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=("edits", "excite"), default=("edits", "excite"))
    parser.add_argument("--strengths", default="0.25,0.5,1,2")
    arguments = parser.parse_args()
    pipe = TextToImage.from_pretrained(arguments.model)
    if "edits" in arguments.only:
        print(edits(pipe, arguments.n), flush=True)
    if "excite" in arguments.only:
        print(excited(pipe, arguments.n, [float(strength) for strength in arguments.strengths.split(",")]))


if __name__ == "__main__":
    main()
