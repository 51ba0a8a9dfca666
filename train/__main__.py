"""The command: `python -m train CONFIG [key.path=value ...]`, the same under `accelerate launch`, and its helpers."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from diffusion.errors import GazeError
from pipelines.launch import start_the_others

USAGE = """\
python -m train CONFIG [key.path=value ...]          train on one process; resumes by itself
accelerate launch -m train CONFIG [key.path=value ...]  the same on many
python -m train plan CONFIG --gpu h100 --count 8     memory, speed, days and cost of a run before it begins
python -m train export RUN [--ema-width 0.1]         write RUN/model from RUN's newest checkpoint (averaged weights)
python -m train report RUN                           write RUN/report.html, one page of curves and samples
python -m train data COMMAND ...                     build, pack, check and describe pictures: data --help

CONFIG is a recipe in YAML (see configs/); its keys and their meanings stand in train/config.py.
--resume, --resume=never are short for resume=auto, resume=never; --debug shows the traceback of an error.
Example: python -m train configs/smoke.yaml out=runs/smoke optimizer.learning_rate=3e-4"""

RANK = int(os.environ.get("RANK", "0"))  # of several processes, the first speaks for all


def main() -> int:
    """Exit codes: 0 done, 1 bad input, 70 gradient not finite, 74 checkpoint not written, 130 stopped by a signal."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or {"-h", "--help"} & set(words[:1]):
        print(USAGE)
        return 0
    if not debug:
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        if words[0] == "data":
            return data(words[1:])
        if words[0] == "plan":
            from . import plan

            return plan.main(words[1:])
        if words[0] == "report":
            from . import report

            return report.main(words[1:])
        if words[0] == "export":
            return export(words[1:])
        return run(words)
    except GazeError as error:
        if debug:
            raise
        print(f"error: {error}" if RANK == 0 else f"error in process {RANK}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130


def run(words: list[str]) -> int:
    from .config import load_recipe

    flags = {"--resume": "resume=auto", "--resume=auto": "resume=auto", "--resume=never": "resume=never"}
    config, *overrides = words
    recipe = load_recipe(config, [flags.get(word, word) for word in overrides])
    start_the_others("train", words)
    import torch

    from .allocator import keep_memory
    from .loop import Stopped, train

    if not torch.accelerator.is_available():
        keep_memory()
    try:
        folder = train(recipe)
    except Stopped as stopped:
        if RANK == 0:
            print(f"stopped after {stopped} pictures; the same command goes on from there", file=sys.stderr)
        return 130
    if RANK == 0:
        print(folder)
    return 0


def export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train export")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ema-width", type=float, help="average by this width instead, from the run's snapshots")
    arguments = parser.parse_args(words)
    from .config import load_recipe
    from .run import export as write

    print(write(load_recipe(arguments.run / "recipe.yaml", [f"out={arguments.run}"]), arguments.ema_width))
    return 0


def data(words: list[str]) -> int:
    from .data.command import main

    return main(words)


if __name__ == "__main__":
    sys.exit(main())
