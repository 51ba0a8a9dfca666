"""The command `gaze edit`. It imports what it needs when it runs."""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, Json, PictureOptions, no_collection, progress, with_picture_options


@with_picture_options
def edit(
    *,
    source: Annotated[str, typer.Argument(help="What the picture shows.")],
    target: Annotated[str, typer.Argument(help="What it shall show: some words of the source replaced or added.")],
    out: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Both side by side, a PNG; a folder: each alone too.")
    ] = "edit.png",
    cross: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="Share of the steps with the source's attention to words.")
    ] = 0.8,
    itself: Annotated[
        float, typer.Option("--self", min=0, max=1, metavar="X", help="Share with its attention to itself.")
    ] = 0.4,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="WORD:X", help="Multiply the attention to a word of the target.")
    ] = None,
    options: PictureOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a picture, and the same one with other words (prompt-to-prompt). With --init the first is a real picture,
    whose noise is found. Prints which word became which."""
    from .files import check_writable, png_path, unused
    from .png import save_png
    from .recall import OF_MODEL, SHIPPED

    settings = options.settings()
    weights = dict(_weight(text) for text in weight or [])
    folder = out.endswith("/") or os.path.isdir(out)
    paths = unused(Path(out), ("edit", "source", "target")) if folder else [png_path(out)]
    check_writable(paths[0].parent)
    with no_collection():
        from . import edit as editing
        from .batch import open_model, request
        from .sheet import grid, scale_of

    begin = time.perf_counter()
    asked = {name: value for name, value in request(settings).items() if name != "prompt"}
    with progress() as advance:
        made = editing.edit(
            open_model(settings),
            source,
            target,
            cross,
            itself,
            weights,
            show=lambda preview: advance(preview.index / preview.total, f"step {preview.index}/{preview.total}"),
            **asked,
        )
    images = [made.source, made.target]
    both = grid(images, 2, [source, target], scale_of(images))
    noted = {name: value for name, value in made.settings[1].items() if name != "prompt"}
    noted |= {"source": source, "target": target, "cross_steps": cross, "self_steps": itself}
    noted |= {"weights": weights} if weights else {}
    noted |= {"image": asked["image"]} if "image" in asked else {}
    noted |= {"model": SHIPPED, **{name: settings[name] for name in OF_MODEL if name in settings}}
    for path, image in zip(paths, [both, *images], strict=False):
        save_png(image, path, {"edit": noted})
    seconds = round(time.perf_counter() - begin, 3)
    report: dict[str, Any] = {
        "paths": [str(path) for path in paths],
        "seconds": seconds,
        "alignment": [pair._asdict() for pair in made.alignment],
        **({} if made.psnr is None else {"psnr": made.psnr}),
        **noted,
    }
    if as_json:
        print(json.dumps(report))
        return
    for pair in made.alignment:
        print(pair)
    if made.psnr is not None:
        print(f"source redrawn: PSNR {made.psnr['picture']:.1f} dB against the picture,"
              f" {made.psnr['autoencoder']:.1f} dB against it after the autoencoder")  # fmt: skip
    print(f"{', '.join(report['paths'])}  seed {noted['seed']}  {seconds:.2f} s")


def _weight(text: str) -> tuple[str, float]:
    word, _, weight = text.rpartition(":")
    try:
        return word, float(weight)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a word and a number, such as hat:2", param_hint="'--weight'"
        ) from None
