"""What the commands of `gaze` share: options, and what reads their values. Imports nothing heavy."""

import functools
import gc
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer


def _set_debug(wanted: bool) -> None:
    if wanted:
        os.environ["GAZE_DEBUG"] = "1"


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelFolder = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER", help="Folder, hub id, emoji or shapes. [default: emoji]"),
]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH", help="Folder, .safetensors file, hub id, emoji, shapes. [default: emoji]"),
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

BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Pictures made at once on a GPU; on a CPU it is one.")
]
PreviewFile = Annotated[
    str | None, typer.Option("--preview", metavar="FILE", help="A PNG of what is being drawn, step after step.")
]
PreviewEvery = Annotated[
    int, typer.Option("--preview-every", min=1, metavar="N", help="Steps from one preview to the next.")
]
Expand = Annotated[
    str | None,
    typer.Option("--expand", metavar="MODEL", help="Folder or hub id of a language model that adds to each prompt."),
]
ExpandTokens = Annotated[int, typer.Option("--expand-tokens", min=1, metavar="N", help="At most so many tokens.")]
ExpandTemperature = Annotated[
    float,
    typer.Option("--expand-temperature", min=0, metavar="X", help="0 adds the same likeliest words for every seed."),
]


@dataclass(frozen=True)
class PictureOptions:
    """What a picture is made with: the options that `generate` and `grid` share. A field is named as the setting inside
    a PNG, and None where the option was not given."""

    like: Annotated[
        str | None,
        typer.Option(metavar="PNG", help="Take the settings inside a picture; options given beside it replace them."),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Picture i has seed + i; all cells of a grid have it. [default: random]"),
    ] = None
    num_inference_steps: Steps = None
    guidance_scale: Cfg = None
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to keep away from.")] = None
    guidance_rescale: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="X", help="Share brought back to natural contrast. [default: 0]"),
    ] = None
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Noise levels with guidance, such as 0.2:5. [default: all]")
    ] = None
    projected_guidance: Annotated[
        bool | None, typer.Option("--apg/--no-apg", help="Adaptive projected guidance: less saturated. [default: no]")
    ] = None
    scheduler: Scheduler = None
    spacing: Spacing = None
    size: Size = None
    image: Annotated[str | None, typer.Option("--init", metavar="FILE", help="A picture to start from.")] = None
    strength: Annotated[
        float | None,
        typer.Option(metavar="X", help="How far to leave it: above 0, up to 1. [default: 0.8; with a mask 1]"),
    ] = None
    mask_image: Annotated[
        str | None, typer.Option("--mask", metavar="FILE", help="Of its size: only what is white is painted anew.")
    ] = None
    weighting: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What (word:1.5) acts on: embedding or attention. [default: embedding]"),
    ] = None
    excite: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="A word of the prompt that must be seen; several add up. Takes longer."),
    ] = None
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA; several add up. [default weight: 1]")
    ] = None
    model: ModelPath = None
    tokenizer: TokenizerFolder = None
    prediction_type: PredictionType = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16, or float16 on a GPU. [default: float32]"),
    ] = None
    tile: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pixels of the tiles to decode in, for large pictures.")
    ] = None
    offload: Annotated[
        bool | None, typer.Option("--offload", help="Keep all but the U-Net off the GPU while they are not used.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings asked for, as a PNG has them: those of the picture to be like, and those given."""
        settings = {field.name: getattr(self, field.name) for field in fields(PictureOptions) if field.name != "like"}
        settings["width"], settings["height"] = size_of(settings.pop("size"))
        settings["guidance_interval"] = interval_of(self.guidance_interval)
        settings["excite"] = self.excite or None
        settings["lora"] = [lora_of(text) for text in self.lora or []] or None
        given = {name: value for name, value in settings.items() if value is not None}
        if self.like is None:
            return given
        from .recall import recall

        return recall(self.like, given)


def with_picture_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer sees it: in place of its argument `options`, one option for each field of that argument's
    class, PictureOptions or one that adds keyword-only fields to it. Those come first."""
    kind = inspect.signature(command).parameters["options"].annotation
    shared = inspect.signature(kind).parameters
    added_first = sorted(shared.values(), key=lambda parameter: parameter.kind != inspect.Parameter.KEYWORD_ONLY)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += added_first if parameter.name == "options" else [parameter]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = kind(**{name: values.pop(name) for name in shared})
        command(options=options, **values)

    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


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


def size_of(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "64" or "64x96"; None where the model decides."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", size.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{size!r} is not a size such as 64 or 64x96 (width x height)", param_hint="'--size'")
    return int(match[1]), int(match[2] or match[1])


def interval_of(levels: str | None) -> list[float | None] | None:
    """The two noise levels of "0.2:5"; an end that is left out is None, the schedule's."""
    if levels is None:
        return None
    try:
        ends = [float(end) if end.strip() else None for end in levels.split(":")]
        if len(ends) == 2:
            return ends
    except ValueError:
        pass
    raise typer.BadParameter(f"{levels!r} is not two noise levels such as 0.2:5", param_hint="'--guidance-interval'")


def lora_of(text: str) -> dict[str, Any]:
    """File and weight of "FILE:0.8" or "FILE"; what follows a colon and is no number belongs to the name."""
    path, _, weight = text.rpartition(":")
    try:
        return {"path": path or text, "weight": float(weight) if path else 1.0}
    except ValueError:
        return {"path": text, "weight": 1.0}


@contextmanager
def progress(wanted: bool = True) -> Iterator[Callable[..., None]]:
    """A function that moves a bar on stderr to a fraction of the whole and says beside it what is being done; on
    anything but a terminal it does nothing."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda fraction, doing="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda fraction, doing="": bar.update(task, completed=fraction, description=doing)
