"""What `gaze attend` writes: the picture, its overlays, one sheet, the arrays, and a page."""

# Shapes: W maps, H W height and width, T steps.

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.files import replacing, save_tensors
from diffusion.words import END, PADDING, START, words_of

from .attention_page import Entry, render
from .batch import draw, open_model, request
from .files import slug
from .overlays import legend, overlay
from .parameters import write_parameters
from .png import save_png
from .request import Request
from .sheet import grid, scale_of
from .text_to_image import Preview
from .word_maps import Maps, PixelMaps, WordMaps

PAGE, PICTURE, SHEET, ARRAYS = "index.html", "picture.png", "sheet.png", "maps.safetensors"
OURS = (PAGE, PICTURE, SHEET, ARRAYS, "word-*.png", "pixel-*.png")
COLUMNS = 6  # of the sheet
SPECIAL = (START, END, PADDING)


def write_attention(
    folder: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    chosen: Sequence[str] | None,
    advance: Callable[[float, str], None],
) -> dict[str, Any]:
    """Draws a picture and writes it with its maps into a folder, in the place of what an earlier call wrote there; the
    folder is there whole or not at all. Returns what was written.

    settings: of the picture. options: those of a `Request` that say what is recorded. chosen: words that have overlays,
    None: all. advance: as of `draw`. Raises GazeError before anything is drawn, where something asked for is not there.
    """
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise GazeError(f"{str(folder)!r} is the folder that you are in", "a new one: -o attention")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not any(fnmatchcase(path.name, ours) for ours in OURS):
            raise GazeError(f"{str(path)!r} would be lost: it is not of an earlier run", "another folder with -o")
    pipe = open_model(settings)
    wanted = {**settings, **options, "word_maps": True, "map_each_step": True}
    pipe.plan(Request(**request(wanted)))
    named = words_of(pipe.model.read(settings["prompt"])[0], pipe.model.text.window)
    for word in chosen or ():
        named.numbers(word)
    last: deque[Preview] = deque(maxlen=1)
    with replacing(folder, (ARRAYS,), "maps of an earlier run") as aside:
        (picture,) = draw(pipe, [wanted], 1, advance, last.append)
        (words,) = last[0].word_maps
        pixels = next(iter(last[0].pixel_maps), None)
        save_png(picture.image, aside / PICTURE, picture.settings, write_parameters(picture.settings))
        overlays = _overlays(picture.image, words, pixels, chosen)
        for row, drawn in overlays:
            save_png(drawn, aside / row["overlay"])
        labels = [settings["prompt"], *(f"{row['name']} ({percent(row['most'])})" for row, _ in overlays)]
        shown = [picture.image, *(drawn for _, drawn in overlays), legend(picture.image.size)]
        sheet = grid(shown, COLUMNS, [*labels, "colours: 0 to (the most)"], scale_of(shown))
        save_png(sheet, aside / SHEET)
        _write_arrays(aside / ARRAYS, words, pixels, picture.settings)
        page = _page(picture.image, picture.settings, words, pixels)
        (aside / PAGE).write_bytes(page.encode("utf-8", "replace"))  # a prompt may hold single surrogates
    paths = {"page": PAGE, "picture": PICTURE, "sheet": SHEET, "arrays": ARRAYS}
    return {
        **{name: str(folder / path) for name, path in paths.items()},
        "overlays": [{**row, "overlay": str(folder / row["overlay"])} for row, _ in overlays],
        "seconds": picture.seconds,
        "settings": picture.settings,
    }


def _overlays(
    image: Image.Image, words: WordMaps, pixels: PixelMaps | None, chosen: Sequence[str] | None
) -> list[tuple[dict[str, Any], Image.Image]]:
    """Of each word, of the special tokens where there is none, and of each pixel: name, file, largest and mean value at
    the latents' size, and the picture under its map."""
    plain = [number for number, name in enumerate(words.words) if name not in SPECIAL]
    numbers = plain or range(len(words.words))
    if chosen is not None:
        numbers = sorted({number for word in chosen for number in words.named.numbers(word)})
    rows, maps_WHW = [], words.maps
    for number in numbers:
        name = words.words[number]
        ending = f"-{slug(name)}" if any(letter.isalnum() for letter in name) else ""
        row = _row(name, f"word-{number + 1}{ending}.png", words.held_WHW[number])
        rows.append((row, overlay(image, maps_WHW[number])))
    if pixels is not None:
        for (x, y), held_HW, map_HW in zip(pixels.pixels, pixels.held_WHW, pixels.maps, strict=True):
            row = _row(f"pixel {x},{y}", f"pixel-{x}-{y}.png", held_HW)
            rows.append((row, overlay(image, map_HW, (x, y))))
    return rows


def percent(share: float) -> str:
    """In percent, of two digits."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def _row(name: str, file: str, held_HW: Tensor) -> dict[str, Any]:
    return {"name": name, "overlay": file, "most": held_HW.max().item(), "mean": held_HW.mean().item()}


def _write_arrays(path: Path, words: WordMaps, pixels: PixelMaps | None, settings: dict[str, Any]) -> None:
    """maps: W x H x W at the picture's size; steps: T x W x H x W at the latents'; the same of pixels. What the W and T
    are is in the metadata, as JSON."""
    tensors = {"maps": words.maps, "steps": words.held_TWHW}
    if pixels is not None:
        tensors |= {"pixel_maps": pixels.maps, "pixel_steps": pixels.held_TWHW}
    metadata = {
        "words": json.dumps(words.words),
        "steps": json.dumps(words.steps),
        "pixels": json.dumps([] if pixels is None else pixels.pixels),
        "settings": json.dumps(settings),
    }
    save_tensors({name: value.contiguous() for name, value in tensors.items() if value is not None}, path, metadata)
    path.chmod(path.with_name(PICTURE).stat().st_mode)  # safetensors makes files that only their owner can read


def _page(image: Image.Image, settings: dict[str, Any], words: WordMaps, pixels: PixelMaps | None) -> str:
    kinds = ["special" if name in SPECIAL else "word" for name in words.words]
    entries = [Entry(name, kind, frames) for name, kind, frames in zip(words.words, kinds, _frames(words), strict=True)]
    if pixels is not None:
        entries += [
            Entry(f"{x}, {y}", "pixel", frames, ((x + 0.5) / image.width, (y + 0.5) / image.height))
            for (x, y), frames in zip(pixels.pixels, _frames(pixels), strict=True)
        ]
    about = f"{settings['scheduler']}, {settings['num_inference_steps']} steps, seed {settings['seed']}"
    return render(settings["prompt"] or "(the empty prompt)", [about], image, entries, words.steps)


def _frames(maps: Maps) -> list[Tensor]:
    """Of each map the mean over the steps and then every step's, at the latents' size."""
    each = [] if maps.held_TWHW is None else [maps.held_TWHW]
    return [*torch.cat([maps.held_WHW[None], *each]).transpose(0, 1)]
