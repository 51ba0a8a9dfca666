"""The endless stream of samples. Sample n, with its caption, crop and mirroring, is a pure function of (seed, n)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion.errors import GazeError

from ..config import Recipe
from ..randomness import randomness
from .buckets import Part, Shapes, buckets_of
from .decode import Size, colour, crop_of, decode
from .order import Shuffled, Turns
from .source import Source

CENTRE = (0.5, 0.5)


class Sample(NamedTuple):
    """Position n of the stream. Sizes and places are (vertical, horizontal), in pixels."""

    position: int
    index: int  # type: ignore[assignment]  # of the picture in its source; a tuple has a method of that name
    key: str  # the picture's content
    caption: str  # "" where dropped
    dropped: bool
    flipped: bool  # left and right
    pixels_CHW: Tensor | None  # in [-1, 1]; None where latents are cached
    original: Size  # of the upright picture
    crop: tuple[int, int]  # top and left of the sample in the picture, after resizing
    size: Size  # of the sample: its bucket


def stack(samples: Sequence[Sample]) -> Tensor:
    """The pixels of samples that carry them, BCHW."""
    return torch.stack([sample.pixels_CHW for sample in samples if sample.pixels_CHW is not None])


class Stream(Dataset[Sample]):
    """Item n is sample n. An epoch holds each picture `repeats` times, and each global batch samples of one size.

    part: the pictures that train, or those that data.held_out keeps back. These have neither dropped captions nor
    random crops nor mirroring, each item may be of another size, and the first len(self) are each picture once.
    sizes: of all samples. with_pixels: False where latents are cached, so that nothing is decoded.
    Raises GazeError when there is no picture, or the size does not fit the buckets.
    """

    def __init__(self, source: Source, recipe: Recipe, part: Part = "train", with_pixels: bool = True):
        data, trains = recipe.data, part == "train"
        buckets = buckets_of(source, data, part)
        self.source, self.recipe, self.with_pixels = source, recipe, with_pixels
        self.shapes = Shapes(data)
        self.sizes = [bucket.size for bucket in buckets]
        self.batch_size = recipe.batch_size if trains else 1
        self.dropout, self.flip = (data.caption_dropout, data.flip) if trains else (0.0, 0.0)
        self.random_crop = trains and data.crop == "random"
        self.background = colour(data.background)
        self.orders = [
            Shuffled(bucket.pictures, bucket.ends, bucket.blocks, data.window, recipe.seed, f"{number}")
            for number, bucket in enumerate(buckets)
        ]
        parts = -(-len(source.blocks) // data.window) if data.window else 1
        self.turns = Turns(tuple(map(len, self.orders)), self.batch_size, parts, recipe.seed)

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(self.turns.lengths)

    def __getitem__(self, position: int) -> Sample:
        batch, place = divmod(position, self.batch_size)
        bucket, turn = self.turns[batch]
        index, size = self.orders[bucket][turn * self.batch_size + place], self.sizes[bucket]
        record = self.source[index]
        drop, which, mirror, top, left = randomness(self.recipe.seed, position, "visit").random(5).tolist()
        dropped, flipped = drop < self.dropout, mirror < self.flip
        crop_at = (top, left) if self.random_crop else CENTRE
        original = record.height, record.width
        return Sample(
            position,
            index,
            record.key,
            "" if dropped else record.captions[int(which * len(record.captions))],
            dropped,
            flipped,
            self.pixels(index, size, crop_at, flipped) if self.with_pixels else None,
            original,
            crop_of(original, size, crop_at, flipped),
            size,
        )

    def pixels(self, index: int, size: Size, crop_at: tuple[float, float] = CENTRE, flipped: bool = False) -> Tensor:
        """A picture of the source as CHW. Raises GazeError that names it when it is not what it was."""
        try:
            return decode(self.source.read(index), size, crop_at, flipped, self.background)[0]
        except Exception as error:
            name, reason = self.source[index].name, getattr(error, "problem", f"{type(error).__name__}: {error}")
            raise GazeError(
                f"{name} has changed since the run began: {reason}",
                "put it back; the same command goes on from the last checkpoint",
            ) from None

    def size_of(self, index: int) -> Size:
        """The size of a picture's samples."""
        return self.shapes.sizes[self.shapes.nearest(self.source[index])]

    def captions(self) -> Iterator[str]:
        """Those of all pictures of the source."""
        return (caption for index in range(len(self.source)) for caption in self.source[index].captions)

    def batches(self, start: int, rank: int, processes: int) -> Iterator[list[int]]:
        """The positions of this process, a list per micro-batch, from picture `start` on, without end.

        Process r of R takes every R-th position, so all together see 0, 1, 2, ... in order. Raises GazeError when the
        global batch does not divide.
        """
        batch_size, accumulation = self.recipe.batch_size, self.recipe.gradient_accumulation_steps
        if batch_size % (accumulation * processes):
            raise GazeError(
                f"batch_size {batch_size} does not divide by {processes} processes x {accumulation} accumulation steps",
                f"batch_size={-(-batch_size // (accumulation * processes)) * accumulation * processes}",
            )
        micro = batch_size // accumulation
        return ([*range(first + rank, first + micro, processes)] for first in count(start, micro))
