"""Is the judge of scenes of emoji right? True scenes, and scenes that break one fact of their caption; prints figures.

    python benchmarks/scene_judge.py DATA [-n 300] [--seed 0]

DATA: a folder of scenes, for its glyphs. A true scene is right when the judge sees each emoji within 3 of 64 pixels of
its place, nothing else, the background, and no broken fact; a broken one when exactly that fact is named. Each way to
break a fact is tried on half of the scenes, as drawn. Times are the processor's.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image

from benchmarks.judge import BLUR, NOISE, QUALITY, Disturb, blurred, compressed, noisy
from pipelines.evaluation import wilson
from pipelines.places import SIDE, SPLITS, apart, box_at_random, centre
from pipelines.scenes.judge import Shown, Templates, check, see, templates
from pipelines.scenes.things import read_things
from pipelines.scenes.world import BACKGROUNDS, Object, Scene, draw, scene

SIZES = (64, 128)
NEAR = 3  # pixels between true and seen centres
DISTURBANCES: dict[str, Disturb] = {
    "plain": list,
    f"noise, {NOISE} of 255 levels": noisy,
    f"blur, {BLUR:g} pixel": blurred,
    f"JPEG, quality {QUALITY}": compressed,
}


def breaks(scene: Scene, kinds: Sequence[str], random: Random) -> Iterator[tuple[str, Scene]]:
    """The scene changed so that exactly one fact, which comes first, is no longer true."""
    objects, facts = scene.objects, scene.facts
    at = random.randrange(len(objects))
    stranger = random.choice([kind for kind in kinds if all(kind != each.kind for each in objects)])

    def moved(places: Sequence[tuple[int, ...]]) -> Scene:
        pairs = [(each, left, top, _side(each)) for each, (left, top) in zip(objects, places, strict=True)]
        boxes = ((each, (left, top, left + side, top + side)) for each, left, top, side in pairs)
        return replace(scene, objects=tuple(replace(each, box=box) for each, box in boxes))

    yield "kind", replace(scene, objects=(*objects[:at], replace(objects[at], kind=stranger), *objects[at + 1 :]))
    yield "count", replace(scene, objects=(*objects[:at], *objects[at + 1 :]))
    for name, kind in (("count", objects[at].kind), ("nothing else", stranger)):
        for box in _room(objects, random):
            yield name, replace(scene, objects=(*objects, Object(kind, box)))
    if facts["relation"]:
        across = facts["relation"] in ("left of", "right of")
        mirrored = [
            (SIDE - right, top) if across else (left, SIDE - bottom)
            for left, top, right, bottom in (each.box for each in objects)
        ]
        yield "position", moved(mirrored)
        yield "position", moved([each.box[1::-1] for each in objects])
    if facts["background"]:
        colour = random.choice([name for name in BACKGROUNDS if name != facts["background"]])
        yield "background", replace(scene, background=colour)


def _side(each: Object) -> int:
    return each.box[2] - each.box[0]


def _room(objects: Sequence[Object], random: Random) -> list[tuple[int, int, int, int]]:
    """A place for one more that does not touch the others; none where there is little room."""
    tried = [box_at_random(random, 18) for _ in range(100)]
    return [box for box in tried if all(apart(box, each.box) for each in objects)][:1]


def is_right(scene: Scene, shown: Shown) -> bool:
    """Whether the judge sees what there is, where it is."""
    left = [*shown.objects]
    for each in scene.objects:
        near = [f for f in left if f.kind == each.kind and math.dist(centre(f.box), centre(each.box)) <= NEAR]
        if not near:
            return False
        left.remove(near[0])
    return not left and shown.background == scene.background and not check(scene.facts, shown)


def true_scenes(scenes: Sequence[Scene], glyphs: Mapping[str, Image.Image], known: Templates) -> list[bool]:
    """Which are right, at both sizes and however disturbed; prints a line for each."""
    all_right: list[bool] = []
    print(f"{'true scenes':<28}{'size':>6}{'right':>9}{'of':>7}{'a minute':>10}")
    for size in SIZES:
        for name, disturb in DISTURBANCES.items():
            images = disturb([draw(each, glyphs, size) for each in scenes])
            begin = time.process_time()
            right = [is_right(each, see(image, known)) for each, image in zip(scenes, images, strict=True)]
            speed = 60 * len(right) / (time.process_time() - begin)
            print(f"{name:<28}{size:>6}{np.mean(right):>9.2%}{len(right):>7}{speed:>10,.0f}", flush=True)
            all_right += right
    return all_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of scenes")
    parser.add_argument("-n", type=int, default=300, help="scenes, half of each split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    glyphs = {thing.name: thing.glyph for thing in read_things(arguments.data)}
    known, kinds = templates(glyphs), [*glyphs]
    scenes = [scene(kinds, arguments.seed, index // 2, SPLITS[index % 2]) for index in range(arguments.n)]
    right = true_scenes(scenes, glyphs, known)
    low, high = wilson(sum(right), len(right))
    print(f"all: {np.mean(right):.2%} of {len(right)} (95 % interval {low:.2%} to {high:.2%})\n")

    found: dict[str, list[bool]] = defaultdict(list)
    for each in scenes[: len(scenes) // 2]:
        for fact, other in breaks(each, kinds, Random(each.name)):
            found[fact].append(check(each.facts, see(draw(other, glyphs), known)) == [fact])
    print(f"{'one fact broken':<28}{'named':>9}{'of':>7}")
    for fact, named in sorted(found.items()):
        print(f"{fact:<28}{np.mean(named):>9.2%}{len(named):>7}", flush=True)


if __name__ == "__main__":
    main()
