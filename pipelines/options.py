"""What the commands of `gaze` share: options, and what reads their values. Imports nothing heavy."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion.errors import GazeError


def _set_debug(wanted: bool) -> None:
    if wanted:
        os.environ["GAZE_DEBUG"] = "1"


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelFolder = Annotated[
    str | None, typer.Option("--model", metavar="FOLDER", help="A diffusers model folder. [default: the shipped model]")
]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH", help="Model folder or .safetensors file. [default: the shipped model]"),
]
TokenizerFolder = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="FOLDER", help="For a single file, which has none. [default: the one beside]"),
]
PredictionType = Annotated[
    str | None,
    typer.Option("--prediction-type", metavar="NAME", help="epsilon, v_prediction or sample. [default: the model's]"),
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="NAME", help="NAME, or NAME:KEY=VALUE,...; gaze schedulers lists them."),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing", metavar="NAME", help="Of the noise levels: karras, exponential, beta, linear, trailing, leading."
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", min=1, metavar="N", help="Steps of the scheduler.")
]
Cfg = Annotated[
    float | None,
    typer.Option("--cfg", "--guidance-scale", metavar="X", help="Weight of the prompt; 1 turns guidance off."),
]
Size = Annotated[str | None, typer.Option("--size", metavar="W[xH]", help="Pixels: 64, or 64x96 (width x height).")]


@contextmanager
def no_collection() -> Iterator[None]:
    """For imports: they make a million objects that stay, and the collector would look through all of them for garbage
    again and again, also at the end of the process."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def lines_of(file: str | None) -> list[str]:
    """The prompts of a text file: its lines that are not blank."""
    if file is None:
        return []
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise GazeError(
            f"prompts file {file!r} cannot be read: {error}", "a UTF-8 text file, one prompt a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def size_of(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "64" or "64x96"; None where the model decides."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", size.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{size!r} is not a size such as 64 or 64x96 (width x height)", param_hint="'--size'")
    return int(match[1]), int(match[2] or match[1])


def interval_of(levels: str | None) -> tuple[float, float] | None:
    """The two noise levels of "0.2:5"; an end that is left out is the schedule's."""
    if levels is None:
        return None
    low, colon, high = levels.partition(":")
    try:
        if colon:
            return float(low or 0), float(high or "inf")
    except ValueError:
        pass
    raise typer.BadParameter(f"{levels!r} is not two noise levels such as 0.2:5", param_hint="'--guidance-interval'")


@contextmanager
def progress() -> Iterator[Any]:
    """A function that moves a bar on stderr to a fraction of the whole; on anything but a terminal it does nothing."""
    if not sys.stderr.isatty():
        yield lambda fraction: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)
