"""Which picture stands at position n of a run: a closed form of (seed, n), so nothing of an order is stored.

Any number of processes and workers therefore sees one stream, and a run goes on anywhere in it. Memory does not grow
with the number of pictures where all count once, are of one shape and of one part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from ..randomness import randomness

ROUNDS = 10
WORD = 2**64 - 1


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """The image of `index` under a pseudorandom permutation of 0, ..., size - 1 that the keys choose.

    A Feistel network over pairs of nearly equal ranges, walked on until it comes back below `size`, which takes 1 + 1 /
    sqrt(size) rounds of all keys on average: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5.
    """
    left_size = isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    while True:
        right, left = divmod(index, left_size)
        sizes = left_size, right_size
        for key in keys:
            left, right = right, (left + _mixed(right ^ key)) % sizes[0]
            sizes = sizes[1], sizes[0]
        index = left + sizes[0] * right
        if index < size:
            return index


def _mixed(word: int) -> int:
    """64 bits -> 64 bits, each a function of all (the end of splitmix64: Steele et al. 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


@lru_cache(maxsize=1024)
def _keys(seed: int, epoch: int, purpose: str) -> tuple[int, ...]:
    return tuple(randomness(seed, epoch, purpose).bit_generator.random_raw(ROUNDS).tolist())


class Shuffled:
    """The endless order of some pictures, each epoch in another one: item n is the picture at position n.

    pictures: their numbers. ends: visits per epoch of each and all before it together, so its last is the length.
    blocks: visits in each shard, in order. In each epoch the shards are shuffled, and each `window` of them, in their
    new order, holds its pictures shuffled; 0: all shards together. name: what else the order depends on.
    """

    def __init__(
        self, pictures: Sequence[int], ends: Sequence[int], blocks: Sequence[int], window: int, seed: int, name: str
    ):
        self.pictures, self.ends, self.seed, self.name = pictures, ends, seed, name
        self.blocks = np.array(blocks if window else [sum(blocks)], np.int64)
        self.first = np.cumsum(self.blocks) - self.blocks  # visit of each shard
        self.window = window or 1
        self._epoch, self._shards, self._starts = -1, self.blocks, self.first

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._shards = randomness(self.seed, epoch, "shards").permutation(len(self.blocks))
            self._starts = np.concatenate([[0], np.cumsum(self.blocks[self._shards])])
            self._epoch = epoch
        window = (bisect_right(self._starts, place) - 1) // self.window
        start = int(self._starts[window * self.window])
        end = int(self._starts[min((window + 1) * self.window, len(self.blocks))])
        place = start + permuted(place - start, end - start, _keys(self.seed, epoch, f"order {self.name} {window}"))
        slot = bisect_right(self._starts, place) - 1
        visit = int(self.first[self._shards[slot]] + place - self._starts[slot])
        return int(self.pictures[bisect_right(self.ends, visit)])


@dataclass(frozen=True)
class Turns:
    """Which bucket each global batch is of, so that a bucket of c pictures per epoch has had floor(e * c / batch_size)
    batches after e epochs, and what is left over waits for the next one.

    lengths: c of each bucket. parts: of an epoch, after which the same holds. Shuffled within each.
    """

    lengths: tuple[int, ...]
    batch_size: int
    parts: int
    seed: int

    def __getitem__(self, batch: int) -> tuple[int, int]:
        """The bucket, and which of its own batches this is."""
        if len(self.lengths) == 1:  # then no sample depends on the batch size
            return 0, batch
        total, per_batch = sum(self.lengths), self.parts * self.batch_size
        # All buckets together have had at most part * total / per_batch batches, and at most one each fewer.
        least, most = batch * per_batch // total, (batch + len(self.lengths)) * per_batch // total + 1
        part = least + bisect_right(range(least, most + 1), batch, key=lambda part: sum(self._before(part))) - 1
        before, after = self._before(part), self._before(part + 1)
        slot = permuted(batch - sum(before), sum(after) - sum(before), _keys(self.seed, part, "turns"))
        for bucket, (first, end) in enumerate(zip(before, after, strict=True)):
            if slot < end - first:
                return bucket, first + slot
            slot -= end - first
        raise AssertionError("a slot lies in one of the buckets")

    def _before(self, part: int) -> list[int]:
        """Batches of each bucket before this part."""
        return [part * length // (self.parts * self.batch_size) for length in self.lengths]
