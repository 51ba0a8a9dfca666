"""Sizes of samples: squares, or rectangles near the shapes of the pictures, so that little is cropped.

Aspect-ratio buckets as in NovelAI's "Improvements on Stable Diffusion" (2022).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np

from diffusion.errors import GazeError

from ..config import Data
from .decode import Size
from .source import Record, Source

Part = Literal["train", "held_out"]


class Bucket(NamedTuple):
    """The pictures of one size. ends: visits per epoch of each and all before it together. blocks: visits per shard."""

    size: Size
    pictures: Sequence[int]
    ends: Sequence[int]
    blocks: Sequence[int]


class Shapes:
    """sizes: those there are, widest first. With data.bucket_step 0 the one square."""

    def __init__(self, data: Data):
        size, step = data.size, data.bucket_step
        if step and size % step:
            raise GazeError(
                f"data.size {size} is no multiple of data.bucket_step {step}", f"data.size={-(-size // step) * step}"
            )
        self.sizes = sizes(size, step, data.longest) if step else [(size, size)]
        self._between = [((a / b) * (c / d)) ** 0.5 for (a, b), (c, d) in pairwise(self.sizes)]

    def nearest(self, record: Record) -> int:
        """The number of the size whose ratio of sides is nearest to the picture's, on a logarithmic scale."""
        return bisect_right(self._between, record.height / record.width)


def sizes(size: int, step: int, longest: float) -> list[Size]:
    """Every (height, width) in multiples of `step` that has at most size x size pixels, of which neither side can grow,
    and whose long side is at most `longest` times the short one; widest first."""
    most = size * size // step**2
    sides = ((height, most // height) for height in range(1, most + 1))
    fitting = [(h, w) for h, w in sides if w and most // w == h and max(h, w) <= longest * min(h, w)]
    return [(h * step, w * step) for h, w in fitting]


def held_out(key: str, share: float) -> bool:
    """Whether the picture of this content is one of the share that is not trained on."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64


def buckets_of(source: Source, data: Data, part: Part) -> list[Bucket]:
    """The buckets that have pictures. A held-out picture is visited once per epoch, whatever its repeats are.

    Takes 4 to 12 bytes per picture, or nothing where all count once in one bucket. Raises GazeError without a picture.
    """
    shapes, count = Shapes(data), len(source)
    whole = part == "train" and not data.bucket_step and not data.held_out
    if whole and count and all(source[index].repeats == 1 for index in range(count)):
        return [Bucket(shapes.sizes[0], range(count), range(1, count + 1), source.blocks)]

    def row(index: int) -> tuple[int, int]:
        record = source[index]
        if held_out(record.key, data.held_out) == (part == "train"):
            return 0, 0
        return shapes.nearest(record), record.repeats if part == "train" else min(record.repeats, 1)

    rows = np.fromiter(map(row, range(count)), [("bucket", np.uint16), ("visits", np.uint32)], count)
    shards = [slice(end - block, end) for block, end in zip(source.blocks, accumulate(source.blocks), strict=True)]
    found = []
    for number, size in enumerate(shapes.sizes):
        visits = np.where(rows["bucket"] == number, rows["visits"], 0)
        pictures = np.flatnonzero(visits)
        if not len(pictures):
            continue
        blocks = [int(visits[shard].sum(dtype=np.int64)) for shard in shards]
        once = visits.max() == 1
        ends = range(1, len(pictures) + 1) if once else np.cumsum(visits[pictures], dtype=np.int64)
        found.append(Bucket(size, pictures.astype(np.min_scalar_type(count)), ends, blocks))  # type: ignore[arg-type]
    if not found:
        raise _nothing(data, part)
    return found


def _nothing(data: Data, part: Part) -> GazeError:
    if part == "held_out":
        return GazeError(f"data.held_out {data.held_out} holds no picture back", "a larger share, or more pictures")
    if data.held_out:
        return GazeError(f"data.held_out {data.held_out} leaves no picture to train on", "a smaller share")
    return GazeError("every picture has repeats 0", "give at least one picture repeats 1")
