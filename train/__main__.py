"""The command: `python -m train CONFIG [key.path=value ...]`, the same under `accelerate launch`, and its helpers."""

from __future__ import annotations

import argparse
import errno
import json
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
--resume auto, --resume never, --resume PATH are short for resume=auto, ...; --debug shows the traceback of an error.
Example: python -m train configs/smoke.yaml out=runs/smoke optimizer.learning_rate=3e-4"""

RANK = int(os.environ.get("RANK", "0"))  # of several processes, the first speaks for all


def main() -> int:
    """Exit codes: 0 done, 1 bad input, 70 gradient not finite, 74 disk full or broken, 130 stopped by a signal."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or {"-h", "--help"} & set(words[:1]):
        print(USAGE)
        return 0
    if not debug:
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return ask(words)
    except (GazeError, OSError) as caught:
        if debug:
            raise
        error = refused(caught) if isinstance(caught, OSError) else caught
        print(f"error: {error}" if RANK == 0 else f"error in process {RANK}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130


def ask(words: list[str]) -> int:
    """The exit code of the command that the words name, which is to train unless it is another."""
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


def run(words: list[str]) -> int:
    from .config import load_recipe

    config, *overrides = words
    recipe = load_recipe(config, as_keys(overrides))
    start_the_others("train", words)
    import torch

    from .allocator import keep_memory
    from .loop import Stopped, train
    from .memory import is_lack_of_memory
    from .signals import interruptible

    if not torch.accelerator.is_available():
        keep_memory()
    try:
        with interruptible():
            folder = train(recipe)
    except (Stopped, KeyboardInterrupt) as stopped:
        where = f"after {stopped} pictures" if isinstance(stopped, Stopped) else "while preparing or exporting"
        if RANK == 0:
            print(f"stopped {where}; the same command goes on from there", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker"):
            raise WorkerGone(
                f"a process that decodes pictures is gone: {error}",
                "the same command goes on from the last checkpoint; where memory was short, with fewer data.workers",
            ) from error
        if not is_lack_of_memory(error):
            raise
        raise GazeError(
            f"memory does not suffice: {error}",
            f"gradient_checkpointing=true, or more gradient_accumulation_steps; python -m train plan {config} tells "
            "what a step takes",
        ) from error
    if RANK == 0:
        print(folder)
    return 0


class WorkerGone(GazeError):
    """A worker of the data was killed, most often by the system for want of memory."""

    exit_code = 75


class DiskFailed(GazeError):
    """A file could not be read or written, because the disk is full or broken; a run's checkpoints are untouched."""

    exit_code = 74


def refused(error: OSError) -> GazeError:
    """What is said of something that the system refused."""
    says = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return DiskFailed(says, "free some space or repair the disk, then the same command")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GazeError(says, "another place, or its permissions")
    return GazeError(says, "the same command with --debug tells what was being done")


def as_keys(words: list[str]) -> list[str]:
    """The same with `--resume`, `--resume VALUE` and `--resume=VALUE` as key=value."""
    keys: list[str] = []
    for word in words:
        if keys and keys[-1] == "--resume" and "=" not in word:
            keys[-1] = f"--resume={word}"
        else:
            keys.append(word)
    values = {key: key.partition("=")[2] or "auto" for key in keys if key.partition("=")[0] == "--resume"}
    return [f"resume={json.dumps(values[key])}" if key in values else key for key in keys]


def export(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train export")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ema-width", type=float, help="average by this width instead, from the run's snapshots")
    arguments = parser.parse_args(words)
    from .config import load_recipe
    from .run import export as write

    resolved = arguments.run / "recipe.yaml"
    if not resolved.is_file():
        raise GazeError(f"{str(arguments.run)!r} is no run: it holds no recipe.yaml", "the folder of a run, its `out`")
    print(write(load_recipe(resolved, [f"out={json.dumps(str(arguments.run))}"]), arguments.ema_width))
    return 0


def data(words: list[str]) -> int:
    from .data.command import main

    return main(words)


if __name__ == "__main__":
    sys.exit(main())
