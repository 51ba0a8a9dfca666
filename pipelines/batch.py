"""Settings -> pictures on disk: what `gaze generate` and `gaze grid` have in common.

A picture's settings are those inside its PNG: the names of `Request`'s fields, one prompt and seed, and the names of
`OF_MODEL`, which say what draws it, and EXPANDED.
"""

from __future__ import annotations

import functools
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from diffusion.errors import GazeError
from diffusion.placement import dtype_of

from .files import check_writable, png_path
from .parameters import write_parameters
from .png import save_png
from .processes import Processes, own_device
from .recall import DIGESTS, EXPANDED, OF_MODEL, SHIPPED
from .sheet import grid, printable
from .sources import digests, sha256
from .text_to_image import Preview, Request, TextToImage

OF_PICTURE = ("prompt", "negative_prompt", "seed", EXPANDED)  # settings that differ within a batch
OFFLOAD = "offload"  # the one setting that says nothing about the picture
AT_ONCE = 8  # pictures in a batch on a GPU


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn. seconds: its share of its batch's time. path: where it was written. image: PIL's, or
    None where nobody needs it any more."""

    image: Any
    settings: dict[str, Any]
    seconds: float
    path: str | None = None

    def row(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"path": self.path, "seconds": self.seconds, **self.settings}


def make(
    processes: Processes,
    pictures: Sequence[dict[str, Any]],
    paths: Sequence[str] | None,
    keep: bool,
    batch_size: int = AT_ONCE,
    advance: Callable[[float, str], None] = lambda fraction, doing: None,
    show: Callable[[Preview], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Picture] | None:
    """Draws the pictures, each process its part of them, and writes each to its path as soon as it is there.

    pictures: the settings of each; the model is that of the first. keep: whether their pixels are needed afterwards.
    batch_size, advance, show: see `draw`. names: of the pictures, which are then all checked before the first is drawn,
    because their settings differ. Returns all pictures in their order, or None to all processes but the first.
    Raises GazeError for settings that cannot be met.
    """
    mine: list[Picture] = []
    drawn = draw_part(processes, pictures, batch_size, advance, show, names)
    for index, picture in zip(processes.part(len(pictures)), drawn, strict=True):
        if paths is not None:
            save_png(picture.image, paths[index], picture.settings, write_parameters(picture.settings))
            picture = replace(picture, path=paths[index])
        mine.append(picture if keep else replace(picture, image=None))
    return processes.collect(len(pictures), mine, _packed, _unpacked)


def draw_part(
    processes: Processes,
    pictures: Sequence[dict[str, Any]],
    batch_size: int = AT_ONCE,
    advance: Callable[[float, str], None] = lambda fraction, doing: None,
    show: Callable[[Preview], None] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Picture]:
    """Opens the model and draws this process's part of the pictures; arguments and errors are those of `make`."""
    part = processes.part(len(pictures))
    if part:
        pipe = open_model(pictures[0])
        for name, settings in zip(names or (), pictures, strict=False):
            _check(pipe, name, settings)
        pipe.plan(Request(**request(pictures[-1])))  # whose seed may be too large, where the first one's is not
        yield from draw(pipe, [pictures[index] for index in part], batch_size, advance, show)


def open_model(settings: dict[str, Any]) -> TextToImage:
    """The model that the settings name with its LoRAs, on this process's GPU if there is one. Raises GazeError."""
    path, tokenizer, prediction_type, dtype, tile = (settings.get(name) for name in OF_MODEL)
    weights = dtype_of("float32" if dtype is None else dtype)
    pipe = TextToImage.from_pretrained(None if path == SHIPPED else path, tokenizer, prediction_type, weights)
    pipe.tile_vae(tile)
    for lora in settings.get("lora", []):
        pipe.load_lora(lora["path"], lora["weight"])
    pipe.to(own_device())
    return pipe.offload() if settings.get(OFFLOAD) else pipe


def _check(pipe: TextToImage, name: str, settings: dict[str, Any]) -> None:
    try:
        pipe.plan(Request(**request(settings)))
    except GazeError as error:
        raise GazeError(f"{name}: {error.problem}", error.hint) from error


def draw(
    pipe: TextToImage,
    pictures: Sequence[dict[str, Any]],
    batch_size: int,
    advance: Callable[[float, str], None],
    show: Callable[[Preview], None] | None,
) -> Iterator[Picture]:
    """Draws the pictures in their order.

    pictures: the settings of each. batch_size: of neighbours that can be drawn at once, at most so many on a GPU. On a
    CPU each is drawn alone: in company it would differ in its last bits.
    advance: is told the fraction that is done and what is under way. show: is shown every step.
    """
    at_once = 1 if pipe.device.type == "cpu" else batch_size
    done, digest = 0, functools.cache(sha256)  # of each file once
    for batch in _batches(pictures, at_once):
        begin = time.perf_counter()
        for preview in pipe.steps(**_request(batch)):
            share = (done + len(batch) * preview.index / preview.total) / len(pictures)
            step = f"{done + 1}/{len(pictures)}  step {preview.index}/{preview.total}"
            advance(share, f"{step}  {printable(batch[0]['prompt'][:60])}")
            if show is not None:
                show(preview)
        result = preview.result()
        seconds = round((time.perf_counter() - begin) / len(batch), 3)
        for image, settings, asked in zip(result.images, result.settings, batch, strict=True):
            noted = {DIGESTS: found} if (found := digests(settings, digest)) else {}
            yield Picture(image, {**settings, "model": SHIPPED, **_beside(asked), **noted}, seconds)
        done += len(batch)


def previewer(path: str | None, every: int) -> Callable[[Preview], None] | None:
    """Writes what is being drawn at every so many steps and at the last, a batch as a sheet. None: nothing to show.

    Raises GazeError when the path cannot be written.
    """
    if path is None:
        return None
    file = png_path(path)
    check_writable(file.parent)

    def show(preview: Preview) -> None:
        if preview.index % every == 0 or preview.index == preview.total:
            images = preview.images()
            save_png(images[0] if len(images) == 1 else grid(images, columns=4), file)

    return show


def request(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that belong to a `Request`."""
    return {name: value for name, value in settings.items() if name not in (*OF_MODEL, OFFLOAD, EXPANDED)}


def _beside(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a picture's request does not know, and its PNG does."""
    return {name: value for name, value in settings.items() if name in (*OF_MODEL, EXPANDED)}


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OF_PICTURE}


def _batches(pictures: Sequence[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours whose seeds count up and which differ in nothing else that a batch has in common."""
    batch = [pictures[0]]
    for picture in pictures[1:]:
        alike = picture.keys() == batch[0].keys() and _common(picture) == _common(batch[0])
        if len(batch) < most and alike and picture["seed"] == batch[-1]["seed"] + 1:
            batch.append(picture)
        else:
            yield batch
            batch = [picture]
    yield batch


def _request(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One request for all pictures of a batch."""
    first = request(batch[0])
    for name in ("prompt", "negative_prompt"):
        if name in first:
            first[name] = [picture[name] for picture in batch]
    return first


def packed(row: dict[str, Any], image: Image.Image | None) -> bytes:
    """A line of JSON, then the pixels as PNG."""
    pixels = io.BytesIO()
    if image is not None:
        image.save(pixels, "PNG")
    return json.dumps(row).encode() + b"\n" + pixels.getvalue()


def unpacked(data: bytes) -> tuple[dict[str, Any], Image.Image | None]:
    """What `packed` was given."""
    line, _, pixels = data.partition(b"\n")
    return json.loads(line), Image.open(io.BytesIO(pixels), formats=["PNG"]) if pixels else None


def _packed(picture: Picture) -> bytes:
    return packed(picture.row(), picture.image)


def _unpacked(data: bytes) -> Picture:
    row, image = unpacked(data)
    return Picture(image, path=row.pop("path"), seconds=row.pop("seconds"), settings=row)
