"""Is what is held out really absent from what is trained on? Counted by reading captions, and by looking at objects.

    python -m tests.long.heldout [--shapes 40000] [--scenes FOLDER] [--emoji FOLDER]

FOLDER: what `python -m train data scenes` and `python -m train data emoji` built. Ends with 1 where something is there.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from pipelines.shapes.captions import caption
from pipelines.shapes.evaluation import exam
from pipelines.shapes.world import Object, scene
from tests import test_scenes_world as emoji_scenes
from tests import test_shapes_world as plain_shapes
from train.judges import SCENES


def hashed(text: str, parts: int) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % parts == 0


def said_of_shapes(things: Iterable[dict[str, Any]]) -> Iterator[str]:
    """All that the rule may hold out of things, as a caption says them or as they are."""
    shapes = []
    for thing in things:
        shapes.append(thing["shape"])
        yield f"{thing['count']} {thing['shape']}"
        if "colour" in thing:
            yield f"{thing['colour']} {thing['shape']}"
    yield from map(" and ".join, combinations(sorted(shapes), 2))


def objects(found: Iterable[Object]) -> list[dict[str, Any]]:
    counts = Counter((each.shape, each.colour) for each in found)
    return [{"shape": shape, "colour": colour, "count": count} for (shape, colour), count in counts.items()]


def shapes(count: int) -> int:
    """Of the first scenes that are trained on, and of the exams, how many are what they must not be?"""
    captions, met, bad = set(), set(), 0
    for each in (scene(0, index) for index in range(count)):
        captions.add(caption(each))
        found = {*said_of_shapes(objects(each.objects)), *said_of_shapes(plain_shapes.parse(caption(each))[0])}
        met |= found
        bad += any(hashed(text, 7) for text in found if not text.startswith("1 "))
    asked = [caption(each) for seed in (-1, SCENES) for each in exam("heldout", 3000, seed)]
    known = sum(text in captions for text in asked)
    met = {text for text in met if not text.startswith("1 ")}
    print(f"shapes: {bad} of {count} scenes have what is held out; they have {len(met)} other combinations")
    print(f"shapes: {known} of {len(asked)} prompts of the exams are captions of theirs")
    return bad + known


def scenes(folder: Path) -> int:
    rows = [json.loads(line) for line in (folder / "glyphs" / "metadata.jsonl").read_text("utf-8").splitlines()]
    nouns = {row["name"]: (*row["nouns"]["en"], *row["nouns"]["fr"]) for row in rows}
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    captions = [(text, language) for line in lines for text, language in zip(line["text"], ("en", "fr"), strict=True)]
    met, bad = set(), 0
    for text, language in captions:
        things, _, background = emoji_scenes.parse(text, language, nouns)
        counts = {thing["kind"]: thing["count"] for thing in things}
        found = {f"{count} {kind}" for kind, count in counts.items() if count > 1}
        found |= {f"{kind} on {background}" for kind in counts if background not in (None, "white")}
        found |= {*map(" and ".join, combinations(sorted(counts), 2))}
        met |= found
        bad += any(hashed(one, 7) for one in found)
    print(f"scenes: {bad} of {len(captions)} captions say what is held out; they say {len(met)} other combinations")
    return bad


def emoji(folder: Path) -> int:
    trained, kept = (
        [json.loads(line) for line in (folder / part / "metadata.jsonl").read_text("utf-8").splitlines()]
        for part in ("train", "heldout")
    )
    bad = sum(row["name"].count("skin tone") == 1 and hashed(row["name"], 10) for row in trained)
    secret = {text.casefold() for row in kept for text in row["text"]}
    known = sum(text.casefold() in secret for row in trained for text in row["text"])
    print(f"emoji: {bad} of {len(trained)} pictures are held out, {known} captions are of the {len(kept)} that are")
    return bad + known


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=40_000, help="scenes, the first of seed 0")
    parser.add_argument("--scenes", type=Path)
    parser.add_argument("--emoji", type=Path)
    given = parser.parse_args()
    bad = shapes(given.shapes)
    bad += scenes(given.scenes) if given.scenes else 0
    bad += emoji(given.emoji) if given.emoji else 0
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
