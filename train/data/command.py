"""`python -m train data ...`: building, packing, checking and describing captioned pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError, nearest

MOST_WORKERS = 1024  # as data.workers of a recipe

USAGE = """\
python -m train data emoji OUT [--languages en fr]           build the emoji data
python -m train data scenes OUT --count 10000 [--size 128]   draw scenes of emoji, captioned in English and French
python -m train data shapes OUT --count 10000 [--masks]      draw scenes of plain shapes
python -m train data caption FOLDER --model ID               say by a model what the pictures show
python -m train data pack SOURCE OUT [--shard-size 10000]    tar shards of the pictures that decode
python -m train data check SOURCE                            verify all of it, name what is wrong
python -m train data stats SOURCE [--json]                   sizes, shapes, captions, duplicates

SOURCE is a folder of pictures, a folder or URL of shards, a parquet file or a folder of them, or a folder that the
`datasets` library saved. --help after each shows its options; docs/data.md tells more."""


def main(words: list[str]) -> int:
    """Exit codes: 0 done and sound, 1 bad input, or `check` has found something."""
    commands = {
        "emoji": _emoji,
        "scenes": _scenes,
        "shapes": _shapes,
        "caption": _caption,
        "pack": _pack,
        "check": _check,
        "stats": _stats,
    }
    if {"-h", "--help"} & set(words[:1]):
        print(USAGE)
        return 0
    if not words or words[0] not in commands:
        raise GazeError("python -m train data needs one of its commands", nearest(" ".join(words[:1]), commands))
    return commands[words[0]](words[1:])


def _emoji(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train data emoji")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--languages", nargs="+", default=["en"], help="of the captions: en, fr or others of CLDR's")
    arguments = parser.parse_args(words)
    from .emoji import build_emoji

    for key, value in build_emoji(arguments.out, arguments.size, languages=arguments.languages).items():
        print(f"{key}: {value}")
    return 0


def _scenes(words: list[str]) -> int:
    parser = _drawing("scenes")
    parser.add_argument("--languages", nargs="+", default=["en", "fr"], help="of the captions: en, fr")
    parser.add_argument("--emoji", action="store_true", help="every emoji alone too, but those that are held out")
    arguments = parser.parse_args(words)
    from .scenes import build_scenes

    build_scenes(
        arguments.out, arguments.count, arguments.seed, arguments.split, arguments.size, arguments.languages,
        with_masks=arguments.masks, with_emoji=arguments.emoji,
    )  # fmt: skip
    print(f"{arguments.count} scenes in {arguments.out}")
    return 0


def _shapes(words: list[str]) -> int:
    parser = _drawing("shapes")
    arguments = parser.parse_args(words)
    from .drawn import build_shapes

    build_shapes(
        arguments.out, arguments.count, arguments.seed, arguments.split, arguments.size, with_masks=arguments.masks
    )
    print(f"{arguments.count} pictures in {arguments.out}")
    return 0


def _caption(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train data caption")
    parser.add_argument("folder", type=Path, help="of pictures; its metadata.jsonl is written, or added to")
    parser.add_argument("--model", required=True, help="captioning model of transformers: folder, or id on the hub")
    parser.add_argument("--prompt", help="what the model answers, or goes on from (default: the model's kind decides)")
    parser.add_argument("--captions", type=int, default=1, help="of each picture")
    parser.add_argument("--tokens", type=int, default=40, help="of a caption at most")
    parser.add_argument("--beams", type=int, default=1, help="texts followed at once, for a likelier one")
    parser.add_argument("--temperature", type=float, default=0.0, help="draws the words; 0 takes the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature, another gives other captions")
    parser.add_argument("--existing", default="keep", help="captions that are there: keep, replace or add")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at once")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode the next pictures meanwhile")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    given = parser.parse_args(words)
    _check_workers(given.workers)
    # For libraries that are imported below. Tokenizers would warn of the workers that are forked after their use.
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.update({**quiet, **os.environ})
    from diffusion.placement import dtype_of
    from pipelines.processes import processes

    from ..signals import interruptible
    from .caption import Asked, caption

    asked = Asked(
        given.model, given.prompt, given.captions, given.tokens, given.beams, given.temperature, given.seed,
        given.existing,
    )  # fmt: skip
    dtype = None if given.dtype is None else dtype_of(given.dtype)
    try:
        with processes("train") as group, interruptible():
            report = caption(given.folder, asked, given.batch_size, given.workers, given.device, dtype, group)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the next picture", file=sys.stderr)
        return 130
    if report is not None:
        print(f"{report.captioned} pictures captioned, {report.kept} keep theirs, in {given.folder / 'metadata.jsonl'}")
        for name, reason in report.skipped:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    return 0


def _pack(words: list[str]) -> int:
    parser = _parser("pack")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard-size", type=int, default=10_000, help="pictures in a shard")
    arguments = parser.parse_args(words)
    from .pack import pack

    with _opened(arguments) as place:
        manifest, skipped = pack(place, arguments.out, arguments.shard_size, arguments.workers)
    pictures = sum(shard.pictures for shard in manifest.shards)
    print(f"{pictures} pictures in {len(manifest.shards)} shards in {arguments.out}")
    if skipped:
        print(f"{len(skipped)} are left out, see {arguments.out / 'skipped.txt'}", file=sys.stderr)
    return 0


def _check(words: list[str]) -> int:
    arguments = _parser("check").parse_args(words)
    from .check import check

    count = 0
    with _opened(arguments) as place:
        for problem in check(place, arguments.workers):
            print(problem)
            count += 1
        print(f"{len(place)} pictures, {count or 'no'} problem{'' if count == 1 else 's'}", file=sys.stderr)
    return int(count > 0)


def _stats(words: list[str]) -> int:
    parser = _parser("stats")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args(words)
    from .look import look
    from .shards import Shards
    from .stats import stats

    with _opened(arguments) as place:
        source, skipped = (place, []) if isinstance(place, Shards) else look(place, arguments.workers)
        if not len(source):
            raise GazeError(f"{arguments.source} holds no picture that decodes", "python -m train data check")
        figures: dict[str, Any] = {**stats(source), "left out": len(skipped)}
    if arguments.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    return 0


def _drawing(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m train data {command}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, required=True, help="pictures")
    parser.add_argument("--seed", type=int, default=0, help="another gives other pictures")
    parser.add_argument("--split", default="seen", help="seen or heldout combinations")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--masks", action="store_true", help="also the pixels of each object, and its words")
    return parser


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m train data {command}")
    parser.add_argument("source", help="folder, shards, parquet file or folder of them, or saved data set")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--image-column", default="image", help="of a table or data set")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--split", default="train", help="of a data set")
    return parser


def _check_workers(count: int) -> None:
    if not 0 <= count <= MOST_WORKERS:
        raise GazeError(f"--workers is {count}", f"0 to {MOST_WORKERS} processes")


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Any]:
    """The place that the command line names. What is fetched from a URL is kept for as long as the command runs."""
    from ..config import Data
    from .open import data_at, open_place

    _check_workers(arguments.workers)
    options = {name: getattr(arguments, name) for name in ("image_column", "text_column", "split")}
    with tempfile.TemporaryDirectory() as cache:
        yield open_place(Data.model_validate({**options, **data_at(arguments.source)}), Path(cache))
