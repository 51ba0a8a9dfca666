"""What judges that look for objects have in common: a picture's levels, and what is connected in it.

Shapes of arrays: H, W height and width in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .images import to_rgb
from .places import SIDE, Box

FLOOR = 40  # pixels: what is smaller is a speck, a third of the smallest object
DIRT = 80  # pixels of specks that together count as one more object


def levels_of(image: Image.Image) -> np.ndarray:
    """The levels of red, green and blue, 0 to 255, float [H, W, 3], both SIDE: a picture of another size is resized."""
    image = to_rgb(image)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image, float)


def regions(mask_HW: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The connected parts of a mask that are large enough for an object, bool [H, W] each; and all specks as one more
    where they are many, else nothing."""
    numbers_HW = connected(mask_HW)
    parts = [numbers_HW == number for number in range(1, numbers_HW.max() + 1)]
    specks = [part_HW for part_HW in parts if part_HW.sum() < FLOOR]
    dirt_HW = np.any(specks, axis=0) if specks else np.zeros_like(numbers_HW, dtype=bool)
    return [part_HW for part_HW in parts if part_HW.sum() >= FLOOR], [dirt_HW] if dirt_HW.sum() >= DIRT else []


def box_of(mask_HW: np.ndarray) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def connected(kinds_HW: np.ndarray) -> np.ndarray:
    """Numbers the parts of one kind that are connected by sides or corners, from 1 on; kind 0 is nothing, and stays 0.

    Runs of a row are joined with those they touch in the next (Rosenfeld & Pfaltz 1966).
    """
    begins_HW = np.ones(kinds_HW.shape, dtype=bool)
    begins_HW[:, 1:] = kinds_HW[:, 1:] != kinds_HW[:, :-1]
    runs_HW = begins_HW.cumsum().reshape(kinds_HW.shape) - 1  # the number of each pixel's run within its row
    parents = list(range(int(runs_HW[-1, -1]) + 1))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    whole, left, right = slice(None), slice(None, -1), slice(1, None)
    for upper, lower in ((whole, whole), (left, right), (right, left)):
        same = (kinds_HW[:-1, upper] == kinds_HW[1:, lower]) & (kinds_HW[:-1, upper] > 0)
        for above, below in set(
            zip(runs_HW[:-1, upper][same].tolist(), runs_HW[1:, lower][same].tolist(), strict=True)
        ):
            parents[root(below)] = root(above)
    roots_HW = np.array([root(run) for run in range(len(parents))])[runs_HW]
    return np.where(kinds_HW > 0, np.searchsorted(np.unique(roots_HW[kinds_HW > 0]), roots_HW) + 1, 0)
