"""Are the maps of words true? Asked of a model of the shapes world, where the judge knows every object's pixels.

    python benchmarks/truth.py MODEL [-n 200] [--split seen] [--only maps weights] [--plot FILE]

Four questions: does a word's map lie on its object in the generated picture, does removing the word change what lies
under its map, does more weight make what it says more likely, and which layers and steps carry which kind of word.
Prints tables in Markdown. docs/attention-truth.md says how each figure is measured, and what came out.
"""

# Shapes: I instances of words over all pictures, H W height and width.

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import (
    CALIBRATION,
    KIND_OF,
    KINDS,
    MEASURED,
    Kinds,
    alike,
    bootstrap,
    measure,
    observed,
    progress,
    regions,
    scenes_of,
    shown,
    stacked,
    table,
)
from pipelines import TextToImage
from pipelines.evaluation import wilson
from pipelines.images import to_pil
from pipelines.shapes.captions import caption, words
from pipelines.shapes.judge import check, see
from pipelines.shapes.world import Scene
from pipelines.text_to_image import Request

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)
FACTS = {kind: {"relation": "position"}.get(kind, kind) for kind in KINDS}  # as the judge names them


# Maps against masks, all together and by layer and step

METHODS = ("word map", "saliency", "random", "uniform", "the mask itself")
Courses = dict[str, dict[str, float]]  # mIoU by kind of word, then by layer or step


def agreement(before: Kinds, measured: Kinds) -> str:
    """The table of all methods."""
    rows = []
    for kind, own in measured.items():
        found = [measure(before[kind], own, method) for method in METHODS]
        rows.append([kind, f"{found[0].n} in {found[0].pictures}", f"{found[0].share:.2f}",
                     *(shown(each.miou) for each in found)])  # fmt: skip
    return table(["words", "n", "share", *METHODS], rows)


def courses(before: Kinds, measured: Kinds, axis: str) -> Courses:
    """Along the layers or the steps."""
    along = [name for name in next(iter(measured.values()))[0].maps if name.startswith(f"{axis} ")]
    return {
        kind: {name.removeprefix(f"{axis} "): measure(before[kind], own, name).miou[0] for name in along}
        for kind, own in measured.items()
    }


def course_table(axis: str, found: Courses) -> str:
    along = [*next(iter(found.values()))]
    rows = [[short(place), *(f"{own[place]:.2f}" for own in found.values())] for place in along]
    return table([axis, *found], rows)


def short(name: str) -> str:
    """ "up 1.0" for "up_blocks.1.attentions.0.transformer_blocks.0.attn2"; a block past the first is a third number."""
    if "." not in name:
        return name
    where, *numbers = name.split("_")[0], *(part for part in name.split(".") if part.isdecimal())
    return f"{where} {'.'.join(numbers[: -1 if numbers[-1] == '0' else None])}"


# A word removed or swapped


def without(each: Scene, word: int) -> Iterator[tuple[str, str]]:
    """The caption with a word removed, and with another of its kind that the scene has nothing of in its place."""
    said = [word.text for word in words(each)]
    kind = KIND_OF[said[word]]
    there = {getattr(thing, kind) for thing in each.objects}
    other = Random(f"swap/{each.name}").choice([name for name in KINDS[kind] if name not in there])
    for way, instead in (("removed", []), ("swapped", [other])):
        yield way, " ".join([*said[:word], *instead, *said[word + 1 :]])


def inside_and_outside(change_IHW: Tensor, region_IHW: Tensor) -> tuple[Tensor, Tensor]:
    """The mean change of the pixels of each region, and of all others."""
    inside_I = (change_IHW * region_IHW).sum((1, 2)) / region_IHW.sum((1, 2)).clamp(min=1)
    outside_I = (change_IHW * ~region_IHW).sum((1, 2)) / (~region_IHW).sum((1, 2)).clamp(min=1)
    return inside_I, outside_I


def deletion(
    pipe: TextToImage, before: Kinds, measured: Kinds, scenes: dict[int, Scene], batch: int, options: dict[str, Any]
) -> str:
    """The table of each picture's first shape word and first colour word of a single object."""
    rows = []
    for kind in measured.keys() & {"shape", "colour"}:
        single = [one for one in measured[kind] if len(words(scenes[one.picture])[one.word].objects) == 1]
        chosen = [*{one.picture: one for one in reversed(single)}.values()]
        pictures_I = torch.tensor([one.picture for one in chosen])
        areas = {
            method: regions(stacked(chosen, method)[0], measure(before[kind], chosen, method).share)
            for method in ("word map", "random")
        }
        areas["judge's mask"] = torch.stack([one.mask_HW for one in chosen])
        others = [dict(without(scenes[one.picture], one.word)) for one in chosen]
        first = redrawn(pipe, [caption(scenes[one.picture]) for one in chosen], pictures_I, batch, options)
        for way in others[0]:
            second = redrawn(pipe, [each[way] for each in others], pictures_I, batch, options)
            change_IHW = (second - first).abs().mean(dim=1)
            changes = {name: inside_and_outside(change_IHW, area_IHW) for name, area_IHW in areas.items()}
            means = [f"{float(change_I.mean()):.3f}" for change_I in changes["word map"]]
            ratios = [shown(bootstrap(*change, pictures_I), 1) for change in changes.values()]
            rows.append([f"{kind} {way}", str(len(chosen)), *means, *ratios])
    heads = ["word", "n", "inside the map", "outside", "ratio", "of a random map", "of the judge's mask"]
    return table(heads, sorted(rows))


def redrawn(pipe: TextToImage, prompts: list[str], seeds_I: Tensor, batch: int, options: dict[str, Any]) -> Tensor:
    """pixels_I3HW of prompts, each from the noise of its seed."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        plan = replace(pipe.plan(Request(prompts[part], **options)), seeds=seeds_I[part].tolist())
        *_, last = pipe.run(plan)
        parts.append(last.result().pixels_BCHW)
        progress(f"redrawn {start + len(parts[-1])} of {len(prompts)}")
    return torch.cat(parts)


# A word weighted


def insertion(pipe: TextToImage, scenes: dict[int, Scene], batch: int, options: dict[str, Any]) -> str:
    """The table of one fact of each picture, the kinds in turn: how often it is right, by the weight of its word."""
    chosen: dict[str, dict[int, str]] = {kind: {} for kind in KINDS}  # prompts by seed
    for number, each in scenes.items():
        said = [word.text for word in words(each)]
        places = {KIND_OF[text]: place for place, text in enumerate(said) if text in KIND_OF}
        kind = min(places, key=lambda name: len(chosen[name]))
        said[places[kind]] = f"({said[places[kind]]}:{{weight}})"
        chosen[kind][number] = " ".join(said)
    counts = {kind: len(prompts) for kind, prompts in chosen.items() if prompts}
    rights = {
        kind: [right_facts(pipe, kind, chosen[kind], scenes, weight, batch, options) for weight in WEIGHTS]
        for kind in counts
    }
    rights["all"], counts["all"] = [sum(each) for each in zip(*rights.values(), strict=True)], len(scenes)
    rows = [
        [kind, str(counts[kind]), *(shown((right / counts[kind], *wilson(right, counts[kind]))) for right in each)]
        for kind, each in rights.items()
    ]
    return table(["fact of the word", "n", *(f"weight {weight:g}" for weight in WEIGHTS)], rows)


def right_facts(
    pipe: TextToImage, kind: str, prompts: dict[int, str], scenes: dict[int, Scene], weight: float, batch: int,
    options: dict[str, Any],
) -> int:  # fmt: skip
    """In how many pictures of the prompts, by their seeds, the fact of this kind is right."""
    weighted = [prompt.format(weight=weight) for prompt in prompts.values()]
    pixels = redrawn(pipe, weighted, torch.tensor([*prompts]), batch, {**options, "weighting": "attention"})
    broken = [check(scenes[number].facts, see(image)) for number, image in zip(prompts, to_pil(pixels), strict=True)]
    return sum(not {FACTS[kind], "count"} & {*each} for each in broken)  # what is missing has no colour


# The figure

COLORS = {"shape": "#1f77b4", "colour": "#d62728", "count": "#2ca02c", "size": "#9467bd", "relation": "#8c564b"}
LEFT, TOP, WIDTH, HEIGHT, GAP = 50, 40, 520, 260, 90


def panel(title: str, found: Courses) -> list[str]:
    """A line for each kind of word, mIoU from 0 to 1 over layers or steps."""
    along = [short(place) for place in next(iter(found.values()))]
    parts = [f'<text x="0" y="-14" font-weight="bold">{title}</text>']
    for tenth in range(0, 11, 2):
        y = round(HEIGHT * (1 - tenth / 10), 1)
        parts.append(f'<line x1="0" y1="{y}" x2="{WIDTH}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="-8" y="{y + 4}" text-anchor="end">{tenth / 10:.1f}</text>')
    across = [round(WIDTH * place / max(len(along) - 1, 1), 1) for place in range(len(along))]
    every = -(-len(along) // 13)
    for place in range(0, len(along), every):
        parts.append(f'<text x="{across[place]}" y="{HEIGHT + 18}" text-anchor="middle">{along[place]}</text>')
    for row, (kind, own) in enumerate(found.items()):
        points = " ".join(f"{x},{round(HEIGHT * (1 - y), 1)}" for x, y in zip(across, own.values(), strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[kind]}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH + 16}" y="{20 * row + 12}" fill="{COLORS[kind]}">{kind}</text>')
    return parts


def plot(layers: Courses, steps: Courses) -> str:
    """Both panels, as an SVG."""
    height = 2 * (TOP + HEIGHT) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 110} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    titles = {"mIoU of a layer's maps, all steps together": layers, "mIoU of a step's maps, all layers together": steps}
    for i, (title, found) in enumerate(titles.items()):
        moved = f"translate({LEFT},{TOP + i * (HEIGHT + GAP)})"
        parts += [f'<g transform="{moved}">', *panel(title, found), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=200, help="pictures that are measured; as many others set the shares")
    parser.add_argument("--split", default="seen", help="seen or heldout combinations")
    parser.add_argument("--steps", type=int, help="of the sampler; else the model's own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=("maps", "weights"), default=("maps", "weights"))
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    pipe = TextToImage.from_pretrained(arguments.model)
    options = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    if "maps" in arguments.only:
        maps(pipe, arguments, options)
    if "weights" in arguments.only:
        scenes = scenes_of(MEASURED, arguments.n, arguments.split)
        section("A word weighted inside attention", insertion(pipe, scenes, arguments.batch, options))


def maps(pipe: TextToImage, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    sizes = arguments.split, arguments.batch, options
    _, calibration = observed(pipe, CALIBRATION, arguments.n, *sizes)
    scenes, found = observed(pipe, MEASURED, arguments.n, *sizes)
    before, measured = alike(calibration, found)
    if not measured:
        raise SystemExit("no picture shows what its caption says, so there is nothing to hold a map against")
    section("Maps against masks (mIoU)", agreement(before, measured))
    layers, steps = (courses(before, measured, axis) for axis in ("layer", "step"))
    section("By layer", course_table("layer", layers))
    section("By step", course_table("step", steps))
    if arguments.plot is not None:
        arguments.plot.write_text(plot(layers, steps))
    section("A word removed or swapped", deletion(pipe, before, measured, scenes, arguments.batch, options))


def section(title: str, text: str) -> None:
    print(f"## {title}\n{text}", flush=True)


if __name__ == "__main__":
    main()
