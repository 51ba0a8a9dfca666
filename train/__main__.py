"""`python -m train CONFIG [key.path=value ...]`, `accelerate launch -m train CONFIG ...`, `python -m train data emoji OUT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffusion.errors import GazeError, nearest

USAGE = """\
python -m train CONFIG [key.path=value ...]          train on one process; resumes by itself
accelerate launch -m train CONFIG [key.path=value ...]  the same on many
python -m train export RUN                           write RUN/model from RUN's newest checkpoint (averaged weights)
python -m train data emoji OUT [--size 64]           build the emoji data

CONFIG is a recipe in YAML (see configs/); its keys and their meanings stand in train/config.py.
Example: python -m train configs/smoke.yaml out=runs/smoke optimizer.learning_rate=3e-4"""


def main() -> int:
    """Exit codes: 0 done, 1 bad input, 70 loss or gradient not finite, 130 stopped by a signal after a checkpoint."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if words[0] == "data":
            return data(words[1:])
        if words[0] == "export":
            return export(words[1:])
        return run(words)
    except GazeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 70 if type(error).__name__ == "NotFinite" else 1


def run(words: list[str]) -> int:
    from .config import load_recipe

    config, *overrides = words
    if overrides[:1] == ["--resume"]:
        overrides = [f"resume={overrides[1]}", *overrides[2:]] if len(overrides) > 1 else ["resume=auto"]
    recipe = load_recipe(config, overrides)
    from .loop import Stopped, train

    try:
        folder = train(recipe)
    except Stopped as stopped:
        print(f"stopped after {stopped} pictures; the same command goes on from there", file=sys.stderr)
        return 130
    print(folder)
    return 0


def export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train export")
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args(words)
    from .config import load_recipe
    from .loop import export_newest

    print(export_newest(load_recipe(arguments.run / "recipe.yaml", [f"out={arguments.run}"])))
    return 0


def data(words: list[str]) -> int:
    if words[:1] != ["emoji"]:
        raise GazeError("python -m train data needs the name of a data set", nearest(" ".join(words[:1]), ["emoji"]))
    parser = argparse.ArgumentParser(prog="python -m train data emoji")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    arguments = parser.parse_args(words[1:])
    from .data.emoji import build_emoji

    for key, value in build_emoji(arguments.out, arguments.size).items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
