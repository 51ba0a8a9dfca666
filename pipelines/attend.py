"""`gaze attend`: a picture, what each of its words lights in it, and a page to look at both."""

import json
import random
import re
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, Json, PictureOptions, no_collection, progress, with_picture_options


@with_picture_options
def attend(
    *,
    prompt: Annotated[str | None, typer.Argument(help='What to show. "": anything.')] = None,
    out: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="A folder, new or of an earlier run.")
    ] = "attention",
    options: PictureOptions,
    words: Annotated[
        str | None, typer.Option(metavar="W,W", help="Draw the overlays of these. [default: every word]")
    ] = None,
    pixel: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A pixel whose self-attention is drawn too; several may be.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Attentions to read, as 'up_blocks.*'. [default: all]")
    ] = None,
    record_steps: Annotated[
        str | None, typer.Option(metavar="N,N:N", help="Steps to read, such as 1:10 or 1,5,9. [default: all]")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(metavar="N,N:N", help="Heads to read, counted from 1. [default: all]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which pixels look at which word: overlays, one labelled sheet, raw arrays, and a page where a word that is
    pointed at lights its pixels and a slider walks through the steps. DIR is written whole or not at all."""
    from .files import check_writable

    settings = options.settings() | ({} if prompt is None else {"prompt": prompt})
    if "prompt" not in settings:
        raise typer.BadParameter("no prompt was given", param_hint="'PROMPT'")
    asked = {
        "map_layers": layers or None,
        "map_steps": numbers_of(record_steps, "'--record-steps'"),
        "map_heads": numbers_of(heads, "'--heads'"),
        "pixel_maps": [pixel_of(text) for text in pixel or []],
    }
    check_writable(Path(out).absolute().parent)
    with no_collection():
        from .attention_files import percent, write_attention
        from .sheet import printable

    wanted = {"seed": random.SystemRandom().randrange(2**32), **settings}
    chosen = None if words is None else [word.strip() for word in words.split(",")]
    with progress() as advance:
        report = write_attention(Path(out), wanted, asked, chosen, advance)
    if as_json:
        print(json.dumps(report))
        return
    print(f"{report['page']}  seed {report['settings']['seed']}  {report['seconds']:.2f} s")
    for name in ("picture", "sheet", "arrays"):
        print(report[name])
    for row in report["overlays"]:
        print(f"{row['overlay']}  {printable(row['name'])}  most {percent(row['most'])}  mean {percent(row['mean'])}")


def numbers_of(text: str | None, option: str) -> list[int] | None:
    """The numbers of "1,3:5", where 3:5 is 3, 4, 5."""
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}(:\d{1,5})?(,\d{1,5}(:\d{1,5})?)*", text):
        raise typer.BadParameter(f"{text!r} is not numbers such as 1:10 or 1,5,9", param_hint=option)
    ends = [(int(low), int(high or low)) for low, _, high in (part.partition(":") for part in text.split(","))]
    if any(low > high for low, high in ends):
        raise typer.BadParameter(f"{text!r} counts down; the lower number comes first", param_hint=option)
    return [number for low, high in ends for number in range(low, high + 1)]


def pixel_of(text: str) -> tuple[int, int]:
    """The pixel of "12,40"."""
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a pixel such as 12,40 (from left, from top)", param_hint="'--pixel'")
    return int(match[1]), int(match[2])
