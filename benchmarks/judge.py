"""Is the judge of the shapes world right? True scenes, and scenes that break one fact of their caption; prints figures.

    python benchmarks/judge.py [-n 10000] [--seed 0]

A true scene is right when the judge sees each object's shape, colour and size, nothing else, and no broken fact; a
broken one when exactly that fact is named. Each way to break a fact is tried on every scene, after the autoencoder on
an eighth of them. IoU: of the true masks with those seen, where the scene was right. Times are the processor's.
"""

import argparse
import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter

from diffusion.autoencoder import Autoencoder
from pipelines.images import to_pil, to_tensor
from pipelines.places import SPLITS, apart, box_at_random
from pipelines.shapes.judge import check, see
from pipelines.shapes.world import COLOURS, SHAPES, SIZES, Object, Scene, draw, masks, scene
from pipelines.shipped import DEFAULT_MODEL

NOISE, BLUR, QUALITY = 25, 1.0, 40  # standard deviation of 255 levels, pixels, of JPEG
BATCH = 50
Disturb = Callable[[list[Image.Image]], list[Image.Image]]


def noisy(images: list[Image.Image]) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray((np.asarray(image) + random.normal(0, NOISE, (*image.size, 3))).clip(0, 255).astype(np.uint8))
        for image in images
    ]


def blurred(images: list[Image.Image]) -> list[Image.Image]:
    return [image.filter(ImageFilter.GaussianBlur(BLUR)) for image in images]


def compressed(images: list[Image.Image]) -> list[Image.Image]:
    found = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        found.append(Image.open(file).convert("RGB"))
    return found


def encoded() -> Disturb:
    """To the latents of the shipped autoencoder and back."""
    autoencoder = Autoencoder.from_pretrained(DEFAULT_MODEL / "vae")

    def disturb(images: list[Image.Image]) -> list[Image.Image]:
        with torch.inference_mode():
            return to_pil(autoencoder.decode(autoencoder.encode(torch.cat([to_tensor(image) for image in images]))[0]))

    return disturb


def breaks(scene: Scene, random: Random) -> Iterator[tuple[str, Scene]]:
    """The scene with its objects changed so that exactly one fact, which comes first, is no longer true."""
    things, objects = scene.facts["objects"], scene.objects
    at = random.randrange(len(objects))
    thing, each = things[min(at, len(things) - 1)], objects[at]
    others = (*objects[:at], *objects[at + 1 :])
    stated = {other["shape"] for other in things}

    def changed(*found: Object) -> Scene:
        return replace(scene, objects=(*found, *objects[len(found) :]))

    def instead(found: Object) -> Scene:
        return replace(scene, objects=(*objects[:at], found, *objects[at + 1 :]))

    stranger = random.choice([shape for shape in SHAPES if shape not in stated])
    yield "shape", instead(replace(each, shape=stranger))
    if "colour" in thing:
        colour = random.choice([name for name in COLOURS if name not in {other["colour"] for other in things}])
        yield "colour", instead(replace(each, colour=colour))
    if "colour" in thing and len(things) == 2:
        one, other = objects
        yield "colour", changed(replace(one, colour=other.colour), replace(other, colour=one.colour))
    if "size" in thing:
        size = next(size for size in SIZES if size != each.size)
        yield "size", instead(replace(each, size=size, box=box_at_random(random, random.choice(SIZES[size]))))
    yield "count", replace(scene, objects=others)
    for twin in islice(_more(each, objects, random), 1):
        yield "count", replace(scene, objects=(*objects, twin))
    for stray in islice(_more(replace(each, shape=stranger, size="small"), objects, random), 1):
        yield "nothing else", replace(scene, objects=(*objects, stray))
    if scene.facts["relation"] is not None:
        one, other = objects
        yield (
            "position",
            changed(replace(one, size=other.size, box=other.box), replace(other, size=one.size, box=one.box)),
        )
        yield "position", changed(*(replace(found, box=_transposed(found.box)) for found in objects))


def _more(each: Object, objects: Sequence[Object], random: Random) -> Iterator[Object]:
    """More objects like one, each where it does not touch the others; few or none where there is little room."""
    for _ in range(200):
        box = box_at_random(random, random.choice(SIZES[each.size]))
        if all(apart(box, other.box) for other in objects):
            yield replace(each, box=box)


def _transposed(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return top, left, bottom, right


def kinds(objects: Iterable[Object]) -> Counter[tuple[str, str, str]]:
    return Counter((each.shape, each.colour, each.size) for each in objects)


def measure(scenes: Sequence[Scene], disturb: Disturb) -> tuple[list[bool], list[float], float]:
    """Of true scenes: which are right, the IoU of their objects' masks, and the processor's seconds of judging."""
    right, overlaps, seconds = [], [], 0.0
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        for each, image in zip(part, disturb([draw(each) for each in part]), strict=True):
            begin = time.process_time()
            seen = see(image)
            broken = check(each.facts, seen)
            seconds += time.process_time() - begin
            right.append(not broken and kinds(seen) == kinds(each.objects))
            if right[-1]:
                overlaps += [max(iou(mask_HW, found.mask_HW) for found in seen) for mask_HW in masks(each)]
    return right, overlaps, seconds


def iou(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    return (one_HW & other_HW).sum() / (one_HW | other_HW).sum()


def named(scenes: Sequence[Scene], seed: int, disturb: Disturb) -> dict[str, list[bool]]:
    """Of scenes that break one fact, by fact: whether the judge names exactly that one."""
    found: dict[str, list[bool]] = defaultdict(list)
    for each in scenes:
        facts, others = zip(*breaks(each, Random(f"{seed}/{each.name}")), strict=True)
        for fact, image in zip(facts, disturb([draw(other) for other in others]), strict=True):
            found[fact].append(check(each.facts, see(image)) == [fact])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000, help="scenes, half of each split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenes = [scene(arguments.seed, index // 2, SPLITS[index % 2]) for index in range(arguments.n)]
    disturbances: dict[str, Disturb] = {
        "plain": list,
        f"noise, {NOISE} of 255 levels": noisy,
        f"blur, {BLUR:g} pixel": blurred,
        f"JPEG, quality {QUALITY}": compressed,
        "autoencoder": encoded(),
    }
    print(f"{'true scenes':<28}{'right':>8}{'of':>8}{'IoU of masks':>15}{'a minute':>10}")
    for name, disturb in disturbances.items():
        right, overlaps, seconds = measure(scenes, disturb)
        speed = 60 * len(right) / seconds
        print(f"{name:<28}{np.mean(right):>8.2%}{len(right):>8}{np.mean(overlaps):>15.4f}{speed:>10,.0f}", flush=True)
    few = scenes[: len(scenes) // 8]
    for name in ("plain", "autoencoder"):
        found = named(scenes if name == "plain" else few, arguments.seed, disturbances[name])
        print(f"\n{f'one fact broken, {name}':<28}{'named':>8}{'of':>8}")
        for fact, right in sorted(found.items()):
            print(f"{fact:<28}{np.mean(right):>8.2%}{len(right):>8}", flush=True)


if __name__ == "__main__":
    main()
