"""Does the model draw what the prompt says? Measured on data where the right answer exists.

Shapes: B pictures, N true pictures, P pooled values of a picture.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError, nearest
from diffusion.prompts import escape

from .images import to_rgb, to_tensor

FOLDERS = {"seen": "train", "heldout": "heldout"}
SEEN_PROMPTS = 200
POOLED = 32
OF_ONE_PICTURE = ("prompt", "negative_prompt", "seed")
Z_95 = 1.959963984540054


class Truth(NamedTuple):
    """A true picture: what it is called, a hash of its pixels, and these mean-pooled."""

    name: str
    pixels: bytes
    pooled_P: Tensor


def wilson(right: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a proportion, `right` of n, at z standard deviations (Wilson 1927, Brown et al. 2001)."""
    share, shrink = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def evaluate_retrieval(
    pipe: Any,
    data: str | Path,
    split: str = "heldout",
    n: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Retrieval accuracy: of all true pictures, is the one nearest to the generated picture the one asked for?

    Each prompt is a picture's name alone; picture i has seed + i, so the batch size changes nothing. Generated and true
    pictures (on white, of both splits) are mean-pooled to 32x32 and compared in squared error. A true picture
    that is pixel for pixel the right one under another name counts as right.

    pipe: a TextToImage. data: a folder with train/ and heldout/, each with pictures and metadata.jsonl.
    split: "seen" (train) or "heldout". n: prompts, a choice fixed by the seed; None: 200 seen or all held-out ones.
    steps, guidance_scale: None takes the model's. progress: called with (done, total) after each batch.
    Returns score, low, high (a Wilson 95 % interval), n, right, split, right_under_another_name, settings and misses
    (prompt and the name of the nearest picture). Raises GazeError.
    """
    truths, asked = choose_truths(data, split, n, seed)
    nearest_to = nearest_of(truths)
    found: list[Truth] = []
    settings: dict[str, Any] = {}
    prompts = [escape(truth.name) for truth in asked]
    for result in in_batches(pipe, prompts, seed, steps, guidance_scale, batch, progress):
        settings = in_common(result)
        found += nearest_to(result.images)

    twins = sum(a.name != f.name and a.pixels == f.pixels for a, f in zip(asked, found, strict=True))
    misses = [{"prompt": a.name, "nearest": f.name} for a, f in zip(asked, found, strict=True) if a.pixels != f.pixels]
    right = len(asked) - len(misses)
    low, high = wilson(right, len(asked))
    return {
        "score": right / len(asked),
        "low": low,
        "high": high,
        "n": len(asked),
        "right": right,
        "right_under_another_name": twins,
        "split": split,
        "settings": {"seed": seed, "true_pictures": len(truths), **settings},
        "misses": misses,
    }


def choose_truths(data: str | Path, split: str, n: int | None, seed: int) -> tuple[list[Truth], list[Truth]]:
    """The true pictures of both splits, and those of one that are asked for; arguments and errors as above."""
    if split not in FOLDERS:
        raise GazeError(f"unknown split {split!r}", nearest(split, FOLDERS))
    folders = {key: read_truths(Path(data) / folder) for key, folder in FOLDERS.items()}
    return [truth for folder in folders.values() for truth in folder], _choose(folders[split], split, n, seed)


def nearest_of(truths: Sequence[Truth]) -> Callable[[Sequence[Image.Image]], list[Truth]]:
    """Pictures -> the true picture nearest to each."""
    true_NP = torch.stack([truth.pooled_P for truth in truths])

    def nearest_to(images: Sequence[Image.Image]) -> list[Truth]:
        made_BP = torch.stack([pool(image) for image in images])
        return [truths[i] for i in torch.cdist(made_BP, true_NP).argmin(dim=1).tolist()]

    return nearest_to


def in_batches(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Any]:
    """What the pipe returns for the prompts, batch by batch; picture i has seed + i.

    progress: called with (done, total) after each batch. Raises GazeError: batch is less than 1, or the pipe's own.
    """
    if batch < 1:
        raise GazeError(f"the batch size is {batch}", "at least 1")
    for start in range(0, len(prompts), batch):
        asked = list(prompts[start : start + batch])
        yield pipe(asked, seed=seed + start, num_inference_steps=steps, guidance_scale=guidance_scale)
        if progress is not None:
            progress(start + len(asked), len(prompts))


def in_common(result: Any) -> dict[str, Any]:
    """The settings that all pictures of a result have in common."""
    return {key: value for key, value in result.settings[0].items() if key not in OF_ONE_PICTURE}


def pool(image: Image.Image) -> Tensor:
    """A picture on white, mean-pooled to 32x32: its values [P] in [-1, 1], float64."""
    return F.adaptive_avg_pool2d(to_tensor(image).double(), POOLED).flatten()


def read_truths(folder: Path) -> list[Truth]:
    """The pictures of a folder with metadata.jsonl; the name is the key "name", else the first caption."""
    metadata = folder / "metadata.jsonl"
    hint = "python -m train data emoji FOLDER builds one"
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise GazeError(f"{metadata} cannot be read: {error.strerror or error}", hint) from error
    truths = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            caption = entry["text"] if isinstance(entry["text"], str) else entry["text"][0]
            with Image.open(folder / entry["file_name"]) as image:
                picture = to_rgb(image)
            truths.append(Truth(str(entry.get("name", caption)), _identity(picture), pool(picture)))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise GazeError(f"{metadata}, line {number}: {error}", hint) from error
    if not truths:
        raise GazeError(f"{metadata} names no picture", hint)
    return truths


def _identity(picture: Image.Image) -> bytes:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()


def _choose(truths: list[Truth], split: str, n: int | None, seed: int) -> list[Truth]:
    if n is None:
        n = min(SEEN_PROMPTS, len(truths)) if split == "seen" else len(truths)
    if not 1 <= n <= len(truths):
        raise GazeError(f"{n} prompts were asked for; the {split} split has {len(truths)}", f"1 to {len(truths)}")
    return truths if n == len(truths) else random.Random(seed).sample(truths, n)
