"""The commands of `gaze` that make pictures and read what is in them. Each imports what it needs when it runs."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.errors import GazeError

from .options import (
    BatchSize,
    Debug,
    Expand,
    ExpandTemperature,
    ExpandTokens,
    Json,
    PictureOptions,
    PreviewEvery,
    PreviewFile,
    no_collection,
    progress,
    with_picture_options,
)

if TYPE_CHECKING:
    from .batch import Picture


@with_picture_options
def generate(
    *,
    prompt: Annotated[
        list[str] | None, typer.Argument(help='What to show; several give a picture each. "": anything.')
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="PNG or folder; {i} is the picture's number. [default: from the prompt]",
        ),
    ] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="More prompts, one a line.")] = None,
    n: Annotated[
        int, typer.Option("-n", "--num-images", min=1, max=100_000, metavar="N", help="Pictures of each prompt.")
    ] = 1,
    options: PictureOptions,
    expand: Expand = None,
    expand_tokens: ExpandTokens = 40,
    expand_temperature: ExpandTemperature = 1.0,
    sheet: Annotated[str | None, typer.Option(metavar="FILE", help="All pictures, labelled, in one PNG.")] = None,
    columns: Annotated[int, typer.Option(min=1, metavar="N", help="Columns of the sheet.")] = 8,
    batch_size: BatchSize = 8,
    preview: PreviewFile = None,
    preview_every: PreviewEvery = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make pictures from prompts. Prints each file with its seed and seconds; the PNG holds prompt and settings."""
    from .files import check_writable, lines_of, plan_paths, png_path
    from .png import save_png
    from .processes import processes

    settings = options.settings()
    asked = [*(prompt or []), *lines_of(prompts)] or [settings[name] for name in ("prompt",) if name in settings]
    texts = [text for text in asked for _ in range(n)]
    if not texts:
        raise typer.BadParameter("no prompt was given", param_hint="'PROMPT'")
    first = settings.get("seed", random.SystemRandom().randrange(2**32))
    out_sheet = None if sheet is None else png_path(sheet)

    def plan() -> tuple[list[dict[str, Any]], list[str] | None]:
        wanted = [{**settings, "prompt": text, "seed": first + index} for index, text in enumerate(texts)]
        paths: list[Path] = []
        if out_sheet is not None:
            check_writable(out_sheet.parent)
        if out_sheet is None or out is not None:  # a sheet alone is enough
            paths = plan_paths(out, texts, range(first, first + len(texts)))
        if out_sheet in paths:
            raise GazeError(f"{str(out_sheet)!r} is to be a picture and the sheet", "another name for one of them")
        if expand is not None:
            wanted = expanded(expand, wanted, expand_tokens, expand_temperature)
        return wanted, [str(path) for path in paths] or None

    with processes() as group:
        wanted, paths = group.agree(plan)
        with no_collection():
            from .batch import make, previewer
            from .sheet import grid, scale_of

        with progress(group.rank == 0) as advance:
            show = previewer(preview, preview_every) if group.rank == 0 else None
            pictures = make(group, wanted, paths, out_sheet is not None, batch_size, advance, show)
    if pictures is None:
        return
    if out_sheet is not None:
        images = [picture.image for picture in pictures]
        save_png(
            grid(images, columns, texts, scale_of(images)), out_sheet, {"pictures": [p.settings for p in pictures]}
        )
    show_report(pictures, out_sheet, as_json)


@with_picture_options
def grid(
    *,
    prompt: Annotated[str | None, typer.Argument(help="What to show in every cell.")] = None,
    x: Annotated[str | None, typer.Option("--x", metavar="NAME=V,V", help="What varies from left to right.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="NAME=V,V", help="What varies from top to bottom.")] = None,
    z: Annotated[str | None, typer.Option("--z", metavar="NAME=V,V", help="What varies from block to block.")] = None,
    out: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The sheet, a PNG.")] = "grid.png",
    options: PictureOptions,
    expand: Expand = None,
    expand_tokens: ExpandTokens = 40,
    expand_temperature: ExpandTemperature = 1.0,
    batch_size: BatchSize = 8,
    preview: PreviewFile = None,
    preview_every: PreviewEvery = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw one prompt under varying settings, as a sheet with labelled axes. Axes: steps, cfg, seed, scheduler,
    spacing, negative-prompt, size, guidance-rescale, guidance-interval, apg, weighting, strength, prompt, and
    replace=WORD,OTHER in the prompt. Values with commas: separate by ; instead, or quote them."""
    from .axes import cells, describe, read_axis
    from .files import check_writable, png_path
    from .png import save_png
    from .processes import processes

    axes = {name: read_axis(text) for name, text in (("z", z), ("y", y), ("x", x)) if text is not None}
    if not axes:
        raise typer.BadParameter("at least one of --x, --y, --z is needed", param_hint="'--x'")
    settings = options.settings() | ({} if prompt is None else {"prompt": prompt})
    if "prompt" not in settings and not any(axis.name == "prompt" for axis in axes.values()):
        raise typer.BadParameter("no prompt was given", param_hint="'PROMPT'")
    sheet = png_path(out)

    def plan() -> list[dict[str, Any]]:
        check_writable(sheet.parent)
        made = cells({"seed": random.SystemRandom().randrange(2**32), **settings}, list(axes.values()))
        return made if expand is None else expanded(expand, made, expand_tokens, expand_temperature)

    with processes() as group:
        wanted = group.agree(plan)
        with no_collection():
            from .batch import make, previewer
            from .sheet import table

        with progress(group.rank == 0) as advance:
            show = previewer(preview, preview_every) if group.rank == 0 else None
            names = describe(list(axes.values()))
            pictures = make(group, wanted, None, True, batch_size, advance, show, names)
    if pictures is None:
        return
    labels = {name: [axis.label(value) for value in axis.values] for name, axis in axes.items()}
    drawn = table([picture.image for picture in pictures], *(labels.get(name, [""]) for name in "xyz"))
    varied = {name: {"name": axis.name, "values": list(axis.values)} for name, axis in axes.items()}
    save_png(drawn, sheet, {"grid": varied, "pictures": [picture.settings for picture in pictures]})
    show_report(pictures, sheet, as_json, grid=varied)


def expanded(model: str, pictures: list[dict[str, Any]], tokens: int, temperature: float) -> list[dict[str, Any]]:
    """See `expand_each`, which imports much."""
    with no_collection():
        from .expand import expand_each
    return expand_each(model, pictures, tokens, temperature)


def show_report(pictures: "Sequence[Picture]", sheet: Path | None, as_json: bool, **more: Any) -> None:
    """Prints what was drawn and where it is."""
    if as_json:
        rows = [picture.row() for picture in pictures]
        print(json.dumps({"pictures": rows, "sheet": None if sheet is None else str(sheet), **more}))
        return
    from .recall import EXPANDED

    shown = None
    for picture in pictures:
        if picture.path is not None:
            print(f"{picture.path}  seed {picture.settings['seed']}  {picture.seconds:.2f} s")
        if EXPANDED in picture.settings and picture.settings["prompt"] != shown:
            shown = picture.settings["prompt"]
            print(f"  {shown if shown.isprintable() else json.dumps(shown)}")
    if sheet is not None:
        seeds = [picture.settings["seed"] for picture in pictures]
        seconds = sum(picture.seconds for picture in pictures)
        print(f"{sheet}  seeds {min(seeds)} to {max(seeds)}  {seconds:.2f} s")


def info(
    png: Annotated[str, typer.Argument(metavar="PNG", help="A picture or a sheet.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the settings inside a PNG: ours, else those of the AUTOMATIC1111 web UI by their names here."""
    from .recall import describe

    settings, unknown = describe(png)
    if unknown:
        print(f"warning: without a counterpart here: {'; '.join(unknown)}", file=sys.stderr)
    if as_json:
        print(json.dumps(settings))
        return
    pictures = settings.get("pictures")
    for part in pictures if isinstance(pictures, list) else [settings]:
        for name, value in part.items() if isinstance(part, dict) else [("", part)]:
            plain = isinstance(value, str) and value.isprintable()
            print(f"{name:<21}{value if plain else json.dumps(value)}")
        print(end="" if part is settings else "\n")
