"""Are the maps of words true? Asked of a model of the shapes world, where the judge knows every object's pixels.

    python benchmarks/truth.py MODEL [-n 200] [--split seen] [--plot docs/attention-truth.svg]

Four questions: does a word's map lie on its object in the generated picture, does removing the word change what lies
under its map, does more weight make what it says more likely, and which layers and steps carry which kind of word.
Prints tables in Markdown. docs/attention-truth.md says how each figure is measured, and what came out.

A map becomes a mask where it reaches a share of its largest value. That share is chosen for each method and kind of
word on other pictures, of other scenes and noise, than the figures are of. Intervals are 95 % of a bootstrap
over pictures.
"""

# Shapes: B pictures of a call, I instances of words over all pictures, H W height and width, K shares of a maximum.

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.attention_maps import Recorder, read_words, spread
from diffusion.attention_sites import sites
from diffusion.denoiser import Denoiser
from pipelines import TextToImage
from pipelines.evaluation import wilson
from pipelines.shapes.captions import SYNONYMS, Word, words
from pipelines.shapes.judge import Seen, check, see
from pipelines.shapes.world import COLOURS, RELATIONS, SHAPES, SIZES, Scene, scene
from pipelines.text_to_image import Request

CALIBRATION, MEASURED = -2, -3  # seeds of scenes, which neither training nor `gaze evaluate shapes` has
SHARES = torch.arange(1, 20) / 20  # of a map's largest value
RESAMPLES = 2000
NUDGE = 0.05  # of a word's weight, for the derivative
NUDGED_STEPS = 5  # of all, evenly
WEIGHTS = (0.5, 1.0, 1.5, 2.0)
KINDS = {"shape": SHAPES, "colour": COLOURS, "count": ("2", "3", "4"), "size": SIZES, "relation": RELATIONS}
FACTS = {kind: {"relation": "position"}.get(kind, kind) for kind in KINDS}  # as the judge names them
LITTLE = {"to", "the", "of"}  # inside a relation


def kinds_of_words() -> dict[str, str]:
    """Of each word that the captions may use for a fact, which kind of fact."""
    said = {kind: [word for name in names for word in SYNONYMS.get(name, (name,))] for kind, names in KINDS.items()}
    said["shape"] += [word + ("es" if word.endswith("s") else "s") for word in said["shape"]]
    return {part: kind for kind, each in said.items() for word in each for part in word.split() if part not in LITTLE}


KIND_OF = kinds_of_words()


# Masks, and how well maps agree with them


def mask_of(word: Word, facts: dict[str, Any], seen: Sequence[Seen]) -> np.ndarray | None:
    """mask_HW of the objects in a picture that a word speaks of; a relation speaks of all. None where the picture
    does not show exactly as many of such objects as the caption says."""
    masks, first = [], 0
    for thing in facts["objects"]:
        own = set(range(first, first + thing["count"]))
        first += thing["count"]
        if KIND_OF[word.text] == "relation" or own & set(word.objects):
            stated = [key for key in ("shape", "colour", "size") if key in thing]
            alike = [each.mask_HW for each in seen if all(getattr(each, key) == thing[key] for key in stated)]
            if len(alike) != thing["count"]:
                return None
            masks += alike
    return reduce(np.logical_or, masks)


def enlarged(maps_IHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps at the latents' size, brought to the picture's."""
    return spread(maps_IHW.flatten(1)[None], (maps_IHW.shape[1], maps_IHW.shape[2]), size)[0]


def regions(maps_IHW: Tensor, share: Tensor) -> Tensor:
    """bool_IHW: where each map reaches this share of its largest value."""
    return maps_IHW >= share * maps_IHW.amax(dim=(1, 2), keepdim=True)


def ious(maps_IHW: Tensor, masks_IHW: Tensor, shares_K: Tensor) -> Tensor:
    """iou_IK: intersection over union of each mask with its map's region at each share."""
    found = []
    for share in shares_K:
        region_IHW = regions(maps_IHW, share)
        both_I, either_I = ((op(region_IHW, masks_IHW)).sum((1, 2)) for op in (torch.logical_and, torch.logical_or))
        found.append(both_I / either_I.clamp(min=1))
    return torch.stack(found, dim=1)


def bootstrap(above_I: Tensor, below_I: Tensor, pictures_I: Tensor) -> tuple[float, float, float]:
    """sum(above) / sum(below), and the ends of a 95 % interval: the percentiles of the same ratio when pictures are
    drawn anew with replacement, each with all of its words."""
    _, numbers_I = pictures_I.unique(return_inverse=True)
    count = int(numbers_I.max()) + 1
    sums_2P = torch.zeros(2, count, dtype=torch.float64)
    sums_2P.index_add_(1, numbers_I, torch.stack([above_I, below_I]).double())
    generator = torch.Generator().manual_seed(0)
    drawn_RP = torch.randint(count, (RESAMPLES, count), generator=generator)
    above_R, below_R = sums_2P[:, drawn_RP].sum(dim=2)
    low, high = (above_R / below_R).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    above, below = sums_2P.sum(dim=1).tolist()
    return above / below, low, high


# What is drawn and taken down


class Instance(NamedTuple):
    """A word of a picture. maps: by method, at the latents' size."""

    picture: int
    word: int
    kind: str
    mask_HW: Tensor
    maps: dict[str, Tensor]


def draw(pipe: TextToImage, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    """pixels_BCHW of these prompts, each from the noise of its seed."""
    plan = replace(pipe.plan(Request(prompts, **options)), seeds=seeds)
    *_, last = pipe.run(plan)
    return last.result().pixels_BCHW


def instances(pipe: TextToImage, scenes: dict[int, Scene], **options: Any) -> list[Instance]:
    """The words of the facts of some pictures, by their seeds, with all maps; without the words of objects that the
    pictures do not show."""
    said = {number: words(each) for number, each in scenes.items()}
    prompts = [" ".join(word.text for word in each) for each in said.values()]
    plan = replace(pipe.plan(Request(prompts, word_maps=True, map_each_step=True, **options)), seeds=[*scenes])
    layers = sites(pipe.model.unet, cross=True)
    recorders: list[Recorder] = []
    inputs: list[tuple[Tensor, float]] = []
    total = len(plan.trajectory.sigmas) - 1

    def around(denoiser: Denoiser, rows: list[int]) -> Any:
        words_BS = [pipe.model.text.plain(prompt).chunks[0].words for prompt in prompts]
        of_BS = torch.full((len(prompts), pipe.model.text.window), -1)
        for row, own in enumerate(words_BS):
            of_BS[row, 1 : 1 + len(own)] = torch.tensor(own)
        read = read_words(of_BS, max(map(len, said.values())))
        recorders.extend(Recorder([site], read, range(1, total + 1)) for site in layers)

        def noted(x_BCHW: Tensor, sigma: float) -> Tensor:
            inputs.append((x_BCHW, sigma))
            return denoiser(x_BCHW, sigma)

        return reduce(lambda inner, recorder: recorder.around(inner), recorders, noted)

    for preview in pipe.run(plan, around):
        recorded = [recorder.end_step() for recorder in recorders]
        last = preview
    result = last.result()
    seen = [see(image) for image in result.images]
    found: list[tuple[int, int, Instance]] = []
    random = torch.Generator().manual_seed(next(iter(scenes)))
    for row, (number, each) in enumerate(scenes.items()):
        maps = result.word_maps[row]
        if list(maps.words[: len(said[number])]) != [word.text for word in said[number]]:
            raise SystemExit(
                f"{prompts[row]!r} does not fit into this model's window of {pipe.model.text.window} tokens"
            )
        for place, word in enumerate(said[number]):
            mask_HW = mask_of(word, each.facts, seen[row]) if word.text in KIND_OF else None
            if mask_HW is None:
                continue
            own = {
                "word map": maps.held_WHW[place],
                "uniform": torch.ones_like(maps.held_WHW[place]),
                "random": torch.rand(maps.held_WHW[place].shape, generator=random),
                **{f"layer {site.name}": of.mean_BWHW[row, place] for site, of in zip(layers, recorded, strict=True)},
                **{f"step {step}": maps.held_TWHW[step - 1, place] for step in maps.steps},
            }
            kind = KIND_OF[word.text]
            found.append((row, place, Instance(number, place, kind, torch.from_numpy(mask_HW), own)))
    chosen = [inputs[round(place * (len(inputs) - 1) / (NUDGED_STEPS - 1))] for place in range(NUDGED_STEPS)]
    slopes_IHW = saliency(pipe, prompts, [(row, place) for row, place, _ in found], chosen, plan.sizes)
    for (_, _, instance), slope_HW in zip(found, slopes_IHW, strict=True):
        size = slope_HW.shape
        instance.maps["saliency"] = slope_HW
        mask_1HW = instance.mask_HW[None].float()
        instance.maps["the mask itself"] = torch.nn.functional.adaptive_avg_pool2d(mask_1HW, tuple(size))[0]
    return [instance for _, _, instance in found]


@torch.inference_mode()
def saliency(
    pipe: TextToImage, prompts: list[str], places: list[tuple[int, int]], inputs: list[tuple[Tensor, float]], sizes: Any
) -> Tensor:
    """map_IHW of each (picture, word): how fast the predicted clean latents change with the word's weight in the
    prompt, |d clean / d weight| at weight 1, by a forward difference, summed over channels and over some inputs of the
    sampler. It is gradient times input, taken forward: the derivative along the way from an empty prompt's states, at
    the word's tokens, to the word's own."""
    model = pipe.model
    readings = [model.text.read(prompt) for prompt in prompts]
    nudged = []
    for row, word in places:
        (chunk,) = readings[row].chunks
        weights = [1 - NUDGE if own == word else 1.0 for own in chunk.words]
        nudged.append(readings[row]._replace(chunks=(chunk._replace(weights=weights),)))
    rows = [row for row, _ in places]
    plain, other = (
        Denoiser(model.unet, model.schedule, model.encode([(reading,) for reading in each], sizes, 1))
        for each in (readings, nudged)
    )
    return sum((plain(x, sigma)[rows] - other(x[rows], sigma)).abs().sum(dim=1) for x, sigma in inputs) / NUDGE


# (a) and (d): maps against masks


class Measured(NamedTuple):
    """How far a method's maps agree with the masks of a kind of word. share: the threshold, chosen elsewhere."""

    share: Tensor
    n: int
    pictures: int
    miou: tuple[float, float, float]


def stacked(found: Sequence[Instance], method: str) -> tuple[Tensor, Tensor]:
    """Maps at the masks' size, and the masks, each IHW."""
    masks_IHW = torch.stack([each.mask_HW for each in found])
    maps_IHW = torch.stack([each.maps[method].float() for each in found])
    return enlarged(maps_IHW, (masks_IHW.shape[1], masks_IHW.shape[2])), masks_IHW


def measure(calibration: Sequence[Instance], measured: Sequence[Instance], method: str) -> Measured:
    """Both of one kind of word."""
    share = SHARES[ious(*stacked(calibration, method), SHARES).mean(dim=0).argmax()]
    iou_I = ious(*stacked(measured, method), share[None])[:, 0]
    pictures_I = torch.tensor([each.picture for each in measured])
    miou = bootstrap(iou_I, torch.ones_like(iou_I), pictures_I)
    return Measured(share, len(measured), len(pictures_I.unique()), miou)


# (b) deletion


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


# Tables


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [heads, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]]) + "\n"


def shown(figures: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = figures
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def by_kind(found: Sequence[Instance]) -> dict[str, list[Instance]]:
    return {kind: each for kind in KINDS if (each := [one for one in found if one.kind == kind])}


METHODS = ("word map", "saliency", "random", "uniform", "the mask itself")


def agreement(calibration: Sequence[Instance], measured: Sequence[Instance]) -> str:
    """Table (a)."""
    rows, before = [], by_kind(calibration)
    for kind, own in by_kind(measured).items():
        found = [measure(before[kind], own, method) for method in METHODS]
        rows.append([kind, f"{found[0].n} in {found[0].pictures}", f"{float(found[0].share):.2f}",
                     *(shown(each.miou) for each in found)])  # fmt: skip
    return table(["words", "n", "share", *METHODS], rows)


def courses(calibration: Sequence[Instance], measured: Sequence[Instance], axis: str) -> dict[str, dict[str, float]]:
    """mIoU of each kind of word along the layers or the steps: (d)."""
    before, along = by_kind(calibration), [name for name in measured[0].maps if name.startswith(f"{axis} ")]
    return {
        kind: {name.removeprefix(f"{axis} "): measure(before[kind], own, name).miou[0] for name in along}
        for kind, own in by_kind(measured).items()
    }


def course_table(axis: str, found: dict[str, dict[str, float]]) -> str:
    along = [*next(iter(found.values()))]
    rows = [[short(place), *(f"{own[place]:.2f}" for own in found.values())] for place in along]
    return table([axis, *found], rows)


def short(name: str) -> str:
    """ "up 1.0" for "up_blocks.1.attentions.0.transformer_blocks.0.attn2"; a block past the first is a third number."""
    if "." not in name:
        return name
    where, *numbers = name.split("_")[0], *(part for part in name.split(".") if part.isdecimal())
    return f"{where} {'.'.join(numbers[: -1 if numbers[-1] == '0' else None])}"


def deletion(
    pipe: TextToImage, calibration: Sequence[Instance], measured: Sequence[Instance], scenes: dict[int, Scene],
    batch: int, options: dict[str, Any],
) -> str:  # fmt: skip
    """Table (b): of each picture's first colour word and first shape word of a single object."""
    rows, before = [], by_kind(calibration)
    for kind in ("shape", "colour"):
        single = [one for one in measured if one.kind == kind and words(scenes[one.picture])[one.word].objects]
        single = [one for one in single if len(words(scenes[one.picture])[one.word].objects) == 1]
        chosen = [*{one.picture: one for one in reversed(single)}.values()][::-1]
        if not chosen:
            continue
        own = {method: stacked(chosen, method)[0] for method in ("word map", "random")}
        areas = {method: regions(maps, measure(before[kind], chosen, method).share) for method, maps in own.items()}
        areas["judge's mask"] = torch.stack([one.mask_HW for one in chosen])
        prompts = [dict(without(scenes[one.picture], one.word)) for one in chosen]
        first = redrawn(pipe, [caption_of(scenes[one.picture]) for one in chosen], chosen, batch, options)
        for way in ("removed", "swapped"):
            second = redrawn(pipe, [each[way] for each in prompts], chosen, batch, options)
            change_IHW = (second - first).abs().mean(dim=1)
            pictures_I = torch.tensor([one.picture for one in chosen])
            cells = []
            for area_IHW in areas.values():
                inside_I, outside_I = inside_and_outside(change_IHW, area_IHW)
                cells.append(shown(bootstrap(inside_I, outside_I, pictures_I), 1))
            inside_I, outside_I = inside_and_outside(change_IHW, areas["word map"])
            means = [f"{float(values.mean()):.3f}" for values in (inside_I, outside_I)]
            rows.append([f"{kind} {way}", str(len(chosen)), *means, *cells])
    heads = ["word", "n", "inside the map", "outside", "ratio", "of a random map", "of the judge's mask"]
    return table(heads, rows)


def caption_of(each: Scene) -> str:
    return " ".join(word.text for word in words(each))


def redrawn(
    pipe: TextToImage, prompts: Sequence[str], chosen: Sequence[Instance], batch: int, options: dict[str, Any]
) -> Tensor:
    """pixels_IHW3 of other prompts, each from the noise of its instance's picture."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        parts.append(draw(pipe, [*prompts[part]], [one.picture for one in chosen[part]], **options))
        progress(f"redrawn {start + len(parts[-1])} of {len(prompts)}")
    return torch.cat(parts)


def insertion(pipe: TextToImage, scenes: dict[int, Scene], batch: int, options: dict[str, Any]) -> str:
    """Table (c): one fact of each picture, the kinds in turn; whether it is right, by the weight of its word."""
    chosen: dict[str, list[tuple[int, str]]] = {kind: [] for kind in KINDS}
    for number, each in scenes.items():
        said = words(each)
        places = {KIND_OF[word.text]: place for place, word in enumerate(said) if word.text in KIND_OF}
        kind = min(places, key=lambda name: len(chosen[name]))
        told = [f"({word.text}:{{weight}})" if place == places[kind] else word.text for place, word in enumerate(said)]
        chosen[kind].append((number, " ".join(told)))
    rows = []
    for kind, own in chosen.items():
        cells = []
        for weight in WEIGHTS:
            right = 0
            for start in range(0, len(own), batch):
                numbers, prompts = zip(*own[start : start + batch], strict=True)
                plan = pipe.plan(Request([each.format(weight=weight) for each in prompts],
                                         weighting="attention", **options))  # fmt: skip
                *_, last = pipe.run(replace(plan, seeds=[*numbers]))
                for number, image in zip(numbers, last.result().images, strict=True):
                    right += FACTS[kind] not in check(scenes[number].facts, see(image))
            cells.append((right / len(own), *wilson(right, len(own))) if own else None)
            progress(f"{kind} at weight {weight}")
        if own:
            rows.append([kind, str(len(own)), *map(shown, cells)])
    return table(["fact of the word", "n", *(f"weight {weight:g}" for weight in WEIGHTS)], rows)


# The figure

COLORS = {"shape": "#1f77b4", "colour": "#d62728", "count": "#2ca02c", "size": "#9467bd", "relation": "#8c564b"}
LEFT, TOP, WIDTH, HEIGHT, GAP = 50, 40, 520, 260, 90


def panel(title: str, found: dict[str, dict[str, float]]) -> list[str]:
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


def plot(layers: dict[str, dict[str, float]], steps: dict[str, dict[str, float]]) -> str:
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


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def observed(
    pipe: TextToImage, seed: int, count: int, split: str, batch: int, options: dict[str, Any]
) -> tuple[dict[int, Scene], list[Instance]]:
    """The first scenes of a seed, by the seeds of their noise, and the words of their pictures."""
    scenes = {abs(seed) * 10**6 + index: scene(seed, index, split) for index in range(count)}
    found = []
    for start in range(0, count, batch):
        found += instances(pipe, dict([*scenes.items()][start : start + batch]), **options)
        progress(f"seed {seed}: {min(start + batch, count)} of {count} pictures, {len(found)} words")
    return scenes, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-n", type=int, default=200, help="pictures that are measured; as many others set the shares")
    parser.add_argument("--split", default="seen", help="seen or heldout combinations")
    parser.add_argument("--steps", type=int, help="of the sampler; else the model's own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    pipe = TextToImage.from_pretrained(arguments.model)
    options = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    sizes = arguments.split, arguments.batch, options
    _, calibration = observed(pipe, CALIBRATION, arguments.n, *sizes)
    scenes, measured = observed(pipe, MEASURED, arguments.n, *sizes)
    print(f"## Maps against masks (mIoU)\n{agreement(calibration, measured)}", flush=True)
    layers, steps = (courses(calibration, measured, axis) for axis in ("layer", "step"))
    print(f"## By layer\n{course_table('layer', layers)}\n## By step\n{course_table('step', steps)}", flush=True)
    if arguments.plot is not None:
        arguments.plot.write_text(plot(layers, steps))
    print(f"## A word removed or swapped\n{deletion(pipe, calibration, measured, scenes, arguments.batch, options)}")
    print(f"## A word weighted inside attention\n{insertion(pipe, scenes, arguments.batch, options)}")


if __name__ == "__main__":
    main()
