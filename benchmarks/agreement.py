"""Maps of words against the masks of what they speak of, in pictures that a model of the shapes world has drawn: what
truth.py and grounding.py share.

A map becomes a mask where it reaches a share of its largest value. That share is chosen for each method and kind of
word on other pictures, of other scenes and noise, than the figures are of. Intervals are 95 % of a bootstrap over
pictures.
"""

# Shapes: B pictures of a call, I instances of words over all pictures, H W height and width, K shares of a maximum.

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.attention_maps import Recorder, read_words, spread
from diffusion.attention_sites import sites
from diffusion.denoiser import Denoiser
from diffusion.samplers import Denoise
from pipelines import TextToImage
from pipelines.places import RELATIONS
from pipelines.shapes.captions import SYNONYMS, Word, caption, words
from pipelines.shapes.judge import Seen, see
from pipelines.shapes.world import COLOURS, SHAPES, SIZES, Scene, scene
from pipelines.text_to_image import Request, Result

CALIBRATION, MEASURED = -2, -3  # seeds of scenes, which neither training nor `gaze evaluate shapes` has
SHARES = torch.arange(1, 20) / 20  # of a map's largest value
RESAMPLES = 2000
NUDGE = 0.05  # of a word's weight, for the derivative
NUDGED_STEPS = 5  # of all, evenly
KINDS = {"shape": SHAPES, "colour": COLOURS, "count": ("2", "3", "4"), "size": SIZES, "relation": RELATIONS}
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


class Drawn(NamedTuple):
    """Pictures with the maps of their words. layers: maps_BWHW of each, of the latents' size. inputs: x_BCHW and sigma
    of each call of the network. sizes: as `Plan.sizes`."""

    result: Result
    layers: dict[str, Tensor]
    inputs: list[tuple[Tensor, float]]
    sizes: list[int]


def draw(pipe: TextToImage, prompts: list[str], seeds: list[int], **options: Any) -> Drawn:
    """Of each prompt a picture from the noise of its seed."""
    plan = replace(pipe.plan(Request(prompts, word_maps=True, map_each_step=True, **options)), seeds=seeds)
    text, inputs = pipe.model.text, []
    tokens = [text.plain(prompt).chunks[0].words for prompt in prompts]
    of_BS = torch.tensor([[-1, *own, *[-1] * (text.window - 1 - len(own))] for own in tokens])
    read, steps = read_words(of_BS, int(of_BS.max()) + 1), range(1, len(plan.trajectory.sigmas))
    recorders = {site.name: Recorder([site], read, steps) for site in sites(pipe.model.unet, cross=True)}

    def around(denoiser: Denoiser, rows: list[int]) -> Denoise:
        def noted(x_BCHW: Tensor, sigma: float) -> Tensor:
            inputs.append((x_BCHW, sigma))
            return denoiser(x_BCHW, sigma)

        return reduce(lambda inner, recorder: recorder.around(inner), recorders.values(), noted)

    for preview in pipe.run(plan, around):
        layers = {name: recorder.end_step().mean_BWHW for name, recorder in recorders.items()}
        last = preview
    return Drawn(last.result(), layers, inputs, plan.sizes)


def instances(pipe: TextToImage, scenes: dict[int, Scene], **options: Any) -> list[Instance]:
    """The words of the facts of some scenes, by the seeds of their noise, with all maps; but for the words of objects
    that the pictures do not show."""
    prompts = [caption(each) for each in scenes.values()]
    drawn = draw(pipe, prompts, [*scenes], **options)
    random = torch.Generator().manual_seed(next(iter(scenes)))
    found, rows = [], []
    for row, (number, each) in enumerate(scenes.items()):
        said, seen, maps = words(each), see(drawn.result.images[row]), drawn.result.word_maps[row]
        if list(maps.words[: len(said)]) != [word.text for word in said]:
            raise SystemExit(f"{prompts[row]!r} does not fit into the window of {pipe.model.text.window} tokens")
        for place, word in enumerate(said):
            mask_HW = mask_of(word, each.facts, seen) if word.text in KIND_OF else None
            if mask_HW is not None:
                own = {
                    "word map": maps.held_WHW[place],
                    "uniform": torch.ones_like(maps.held_WHW[place]),
                    "random": torch.rand(maps.held_WHW[place].shape, generator=random),
                    **{f"layer {name}": maps_BWHW[row, place] for name, maps_BWHW in drawn.layers.items()},
                    **{f"step {step}": maps.held_TWHW[step - 1, place] for step in maps.steps},
                }
                found.append(Instance(number, place, KIND_OF[word.text], torch.from_numpy(mask_HW), own))
                rows.append(row)
    for instance, slope_HW in zip(found, saliency(pipe, prompts, rows, found, drawn), strict=True):
        instance.maps["saliency"] = slope_HW
        cells_1HW = F.adaptive_avg_pool2d(instance.mask_HW[None].float(), (slope_HW.shape[0], slope_HW.shape[1]))
        instance.maps["the mask itself"] = cells_1HW[0]
    return found


@torch.inference_mode()
def saliency(
    pipe: TextToImage, prompts: Sequence[str], rows: list[int], found: Sequence[Instance], drawn: Drawn
) -> Sequence[Tensor]:
    """map_IHW of each word: how fast the predicted clean latents change with the word's weight in the prompt,
    |d clean / d weight| at weight 1, by a forward difference, summed over channels and over some of the inputs. It is
    gradient times input, taken forward: the derivative along the way from an empty prompt's states, at the word's
    tokens, to the word's own. rows: of the words' prompts."""
    if not found:
        return []
    model = pipe.model
    readings = [model.text.read(prompt) for prompt in prompts]
    nudged = []
    for row, instance in zip(rows, found, strict=True):
        (chunk,) = readings[row].chunks
        weights = [1 - NUDGE if own == instance.word else 1.0 for own in chunk.words]
        nudged.append(readings[row]._replace(chunks=(chunk._replace(weights=weights),)))
    plain, other = (
        Denoiser(model.unet, model.schedule, model.encode([(reading,) for reading in each], drawn.sizes, 1))
        for each in (readings, nudged)
    )
    places = [round(number * (len(drawn.inputs) - 1) / (NUDGED_STEPS - 1)) for number in range(NUDGED_STEPS)]
    slopes = []
    for x_BCHW, sigma in (drawn.inputs[place] for place in places):
        slopes.append((plain(x_BCHW, sigma)[rows] - other(x_BCHW[rows], sigma)).abs().sum(dim=1))
    return torch.stack(slopes).sum(dim=0) / NUDGE


# Maps against masks


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


Kinds = dict[str, list[Instance]]


def alike(calibration: Sequence[Instance], measured: Sequence[Instance]) -> tuple[Kinds, Kinds]:
    """Both by kind of word, the kinds of which both have some."""
    both = {kind: [[one for one in part if one.kind == kind] for part in (calibration, measured)] for kind in KINDS}
    both = {kind: parts for kind, parts in both.items() if all(parts)}
    return {kind: parts[0] for kind, parts in both.items()}, {kind: parts[1] for kind, parts in both.items()}


# The pictures of a script, its progress and its tables


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def scenes_of(seed: int, count: int, split: str) -> dict[int, Scene]:
    """The first scenes of a seed, by the seeds of their noise."""
    return {abs(seed) * 10**6 + index: scene(seed, index, split) for index in range(count)}


def observed(
    pipe: TextToImage, seed: int, count: int, split: str, batch: int, options: dict[str, Any]
) -> tuple[dict[int, Scene], list[Instance]]:
    """The first scenes of a seed, by the seeds of their noise, and the words of their pictures."""
    scenes, found = scenes_of(seed, count, split), []
    for start in range(0, count, batch):
        found += instances(pipe, dict([*scenes.items()][start : start + batch]), **options)
        progress(f"seed {seed}: {min(start + batch, count)} of {count} pictures, {len(found)} words")
    return scenes, found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [heads, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]]) + "\n"


def shown(figures: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = figures
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
