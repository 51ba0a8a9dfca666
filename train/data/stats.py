"""Figures of captioned pictures: how many, how large, of which shapes, with what captions, and which occur twice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from .source import Source

RATIOS = (0, 1 / 2, 2 / 3, 4 / 5, 1, 5 / 4, 3 / 2, 2, np.inf)  # of width to height; a square counts to the right
NAMED = 10  # groups of equal pictures


def stats(source: Source) -> dict[str, Any]:
    """JSON values. Memory: some 60 bytes a picture; equal pictures are told by 64 bits of their hash."""
    count = len(source)
    rows = np.empty((count, 6), np.int64)  # height, width, visits, captions, their characters, empty ones
    keys = np.empty(count, np.uint64)
    for index in range(count):
        record = source[index]
        lengths = [len(caption) for caption in record.captions]
        rows[index] = record.height, record.width, record.repeats, len(lengths), sum(lengths), lengths.count(0)
        keys[index] = int(record.key[:16], 16)
    heights, widths, visits, captions, characters, empty = rows.T
    groups = list(_equal(keys))
    return {
        "pictures": count,
        "visits per epoch": int(visits.sum()),
        "height": _spread(heights),
        "width": _spread(widths),
        "megapixels": _spread(heights * widths / 1e6),
        "width / height": _histogram(widths / heights),
        "captions per picture": _spread(captions),
        "characters per caption": _spread(characters / captions),
        "empty captions": int(empty.sum()),
        "pictures that another one equals": sum(len(group) - 1 for group in groups),
        "equal pictures": [[source[int(index)].name for index in group] for group in groups[:NAMED]],
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.quantile(values, at)), 3) for name, at in (("least", 0), ("median", 0.5), ("most", 1))}


def _histogram(ratios: np.ndarray) -> dict[str, int]:
    counts, _ = np.histogram(ratios, RATIOS)
    names = (f"{least:.2f} to {most:.2f}" for least, most in pairwise(RATIOS))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _equal(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices of each group of equal keys."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    yield from (group for group in np.split(order, starts[1:]) if len(group) > 1)
