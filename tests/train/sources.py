"""Sources of captioned pictures without files."""

import functools
import hashlib
import io
from collections.abc import Sequence

from PIL import Image

from train.config import Recipe
from train.data.source import Record


@functools.lru_cache(maxsize=4096)
def png(number: int, height: int, width: int) -> bytes:
    """A slope from one grey to another, another one for each number."""
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    picture.putpixel((number % width, 0), (number % 256, number // 256 % 256, 255))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


class Pictures:
    """Picture i is `png(numbers[i], *shapes[i])`; with no content nothing can be read, and keys are of the number."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        repeats: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        captions: int = 1,
        content: bool = True,
    ):
        self.files = [png(number, *shape) if content else b"%d" % number for number, shape in enumerate(shapes)]
        self.blocks = blocks or [len(shapes)]
        self.records = [
            Record(f"{number}.png", tuple(f"{number} {c}" for c in range(captions)), key(file), *shape, times)
            for number, (file, shape, times) in enumerate(
                zip(self.files, shapes, repeats or [1] * len(shapes), strict=True)
            )
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def read(self, index: int) -> bytes:
        return self.files[index]

    def edit(self, index: int, content: bytes) -> None:
        self.files[index] = content
        self.records[index] = self.records[index]._replace(key=key(content))

    def fingerprint(self) -> str:
        return ""


def key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def recipe_of(batch_size: int = 8, accumulation: int = 1, seed: int = 0, **data: object) -> Recipe:
    return Recipe.model_validate(
        {"phase": "diffusion", "out": "none", "pictures": 1000, "seed": seed, "batch_size": batch_size,
         "gradient_accumulation_steps": accumulation,
         "data": {"folder": "none", "size": 16, "caption_dropout": 0, "cache_latents": False} | data}
    )  # fmt: skip
