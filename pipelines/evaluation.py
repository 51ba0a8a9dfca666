"""Does the model draw what the prompt says? Measured on data where the right answer exists.

Shapes: B pictures, N true pictures, P pooled values of a picture.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError, nearest
from diffusion.prompts import escape

from .images import FORMATS, to_rgb, to_tensor
from .judges.pictures import picture_of, read_lines
from .judges.verdict import Judge, Verdict

ENGLISH = "en"
FOLDERS = {"seen": "train", "heldout": "heldout"}
SEEN_PROMPTS = 200
POOLED = 32
OF_ONE_PICTURE = ("prompt", "negative_prompt", "seed")
Z_95 = 1.959963984540054
T = TypeVar("T")


class Truth(NamedTuple):
    """A true picture: what it is called, what asks for it (None in a language without a name for it), a hash of its
    pixels, and these mean-pooled."""

    name: str
    prompt: str | None
    pixels: bytes
    pooled_P: Tensor


def wilson(right: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """The interval of a proportion, `right` of n, at z standard deviations (Wilson 1927, Brown et al. 2001)."""
    share, shrink = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # of none and of all the ends are 0 and 1, but for their last bits
    return max(0.0, round(middle - reach, 15)), min(1.0, round(middle + reach, 15))


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
    language: str = ENGLISH,
) -> dict[str, Any]:
    """Retrieval accuracy: of all true pictures, is the one nearest to the generated picture the one asked for?

    Each prompt is a picture's name alone; picture i has seed + i, so the batch size changes nothing. Generated and true
    pictures (on white, of both splits) are mean-pooled to 32x32 and compared in squared error. A true picture
    that is pixel for pixel the right one under another name counts as right.

    pipe: a TextToImage. data: a folder with train/ and heldout/, each with pictures and metadata.jsonl.
    split: "seen" (train) or "heldout". n: prompts, a choice fixed by the seed; None: 200 seen or all held-out ones.
    steps, guidance_scale: None takes the model's. progress: called with (done, total) after each batch.
    language: of the names. The choice does not depend on it; a picture without a name in it is not asked for.
    Returns score, low, high (a Wilson 95 % interval), n, right, split, language, right_under_another_name, settings
    and misses (prompt and the name of the nearest picture). Raises GazeError.
    """
    exam = ask(data, split, n, seed, language)
    verdicts: list[Verdict] = []
    settings: dict[str, Any] = {}
    prompts = [escape(prompt) for prompt in exam.prompts]
    for result in in_batches(pipe, prompts, seed, steps, guidance_scale, batch, progress):
        settings = in_common(result)
        verdicts += exam.judge(exam.prompts[len(verdicts) :][: len(result.images)], result.images)
    return sum_up(exam, [*zip(exam.prompts, verdicts, strict=True)], {"seed": seed, **settings})


class Exam(NamedTuple):
    """What retrieval asks. prompts: names, brackets and all. judge: of pictures of these prompts. truths: how many true
    pictures it compares with."""

    split: str
    language: str
    prompts: list[str]
    judge: Judge
    truths: int


def ask(data: str | Path, split: str, n: int | None, seed: int, language: str) -> Exam:
    """The exam of `evaluate_retrieval`, whose arguments and errors these are; a judge of a prompt that is none of the
    exam's raises GazeError too."""
    if split not in FOLDERS:
        raise GazeError(f"unknown split {split!r}", nearest(split, FOLDERS))
    folders = {key: read_truths(Path(data) / folder, language) for key, folder in FOLDERS.items()}
    truths = [truth for folder in folders.values() for truth in folder]
    asked = [truth for truth in _choose(folders[split], split, n, seed) if truth.prompt is not None]
    if not asked:
        raise GazeError(
            f"no picture of the {split} split of {data} that is asked for has a name in {language!r}",
            f"python -m train data emoji FOLDER --languages en {language} builds them, where CLDR has that language",
        )
    true_NP = torch.stack([truth.pooled_P for truth in truths])

    def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Verdict]:
        made_BP = torch.stack([pool(image) for image in images])
        found = [truths[place] for place in torch.cdist(made_BP, true_NP).argmin(dim=1).tolist()]
        return [_verdict(prompt, asked, each) for prompt, each in zip(prompts, found, strict=True)]

    return Exam(split, language, [str(truth.prompt) for truth in asked], judge, len(truths))


def _verdict(prompt: str, asked: Sequence[Truth], found: Truth) -> Verdict:
    """Of several pictures that are asked for by one prompt each is right."""
    true = [truth for truth in asked if truth.prompt == prompt]
    if not true:
        raise GazeError(
            f"a picture has the prompt {prompt!r:.200}, which is no name that is asked for",
            "the split and the data that the pictures were made for, and -n where there are more of them",
        )
    right = any(truth.pixels == found.pixels for truth in true)
    under_another_name = right and all(truth.name != found.name for truth in true)
    return Verdict(float(right), {"nearest": found.name, "under_another_name": under_another_name})


def sum_up(exam: Exam, judged: Sequence[tuple[str, Verdict]], settings: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate_retrieval` returns. judged: prompt and verdict of each picture."""
    missed = [(prompt, verdict) for prompt, verdict in judged if not verdict.score]
    right, n = len(judged) - len(missed), len(judged)
    low, high = wilson(right, n)
    return {
        "score": right / n,
        "low": low,
        "high": high,
        "n": n,
        "right": right,
        "right_under_another_name": sum(verdict.said["under_another_name"] for _, verdict in judged),
        "split": exam.split,
        "language": exam.language,
        "settings": {"true_pictures": exam.truths, **settings},
        "misses": [{"prompt": prompt, "nearest": verdict.said["nearest"]} for prompt, verdict in missed],
    }


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


def read_truths(folder: Path, language: str = ENGLISH) -> list[Truth]:
    """The pictures of a folder with metadata.jsonl; the name is the key "name", else the first caption. In a language
    other than English the picture is asked for by "name_fr", for example."""

    def truth(entry: dict[str, Any], picture: Image.Image) -> Truth:
        caption = entry["text"] if isinstance(entry["text"], str) else entry["text"][0]
        name = str(entry.get("name", caption))
        prompt = name if language == ENGLISH else entry.get(f"name_{language}")
        return Truth(name, prompt, _identity(picture), pool(to_rgb(picture)))

    return read_each(folder, truth, "python -m train data emoji FOLDER builds one")


def read_each(folder: Path, make: Callable[[dict[str, Any], Image.Image], T], hint: str) -> list[T]:
    """What `make` makes of each line of folder/metadata.jsonl and the picture that it names, which is still open.

    Raises GazeError with file, line and hint, also where `make` raises for a key that is not there or of another kind.
    """
    metadata, found = folder / "metadata.jsonl", []
    for where, row in read_lines(metadata, hint):
        try:
            with Image.open(picture_of(where, row, folder), formats=FORMATS) as image:
                found.append(make(row, image))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise GazeError(f"{where}: {error}", hint) from error
    if not found:
        raise GazeError(f"{metadata} names no picture", hint)
    return found


def _identity(picture: Image.Image) -> bytes:
    return hashlib.sha256(f"{picture.size}".encode() + to_rgb(picture).tobytes()).digest()


def _choose(truths: list[Truth], split: str, n: int | None, seed: int) -> list[Truth]:
    if n is None:
        n = min(SEEN_PROMPTS, len(truths)) if split == "seen" else len(truths)
    if not 1 <= n <= len(truths):
        raise GazeError(f"{n} prompts were asked for; the {split} split has {len(truths)}", f"1 to {len(truths)}")
    return truths if n == len(truths) else random.Random(seed).sample(truths, n)
