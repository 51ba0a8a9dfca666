"""What a picture of a scene of emoji shows, and which facts of a caption it breaks: found by matching the known glyphs.

Shapes of arrays: H, W height and width in pixels, both SIDE; h, w those of the transform of real values;
T templates, one of each thing at each size; 3 colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..facts import Facts, broken_by
from ..places import MARGIN, SIDE
from ..regions import box_of, levels_of, regions
from .world import BACKGROUNDS, Object, scaled

TRIED = range(16, 33, 2)  # sides of the box in which a thing is looked for
LEAST_EXPLAINED = 0.5  # of what differs from the background in a box; with less it is none of the things
OVERLAP = 3  # pixels by which two boxes may
NEAR = 40  # levels, the greatest distance of a background from its colour
DIFFERENT = 50  # levels, the least distance from the background of what belongs to something
REACH = 2  # pixels around a box that blur and compression may change
UNKNOWN = "unknown"
BORDER_HW = np.pad(np.zeros((SIDE - 2 * MARGIN, SIDE - 2 * MARGIN), bool), MARGIN, constant_values=True)
WEIGHT = {"kind": 1}
FACTS = ("kind", "count", "position", "background", "nothing else")


class Templates(NamedTuple):
    """Things at all sizes. A template is the glyph times its alpha, and the alpha, at the top left, both smoothed."""

    kinds_T: list[str]
    sides_T: np.ndarray
    glyphs_T3hw: np.ndarray  # Fourier transforms, conjugate
    alphas_Thw: np.ndarray
    energies_T: np.ndarray  # sums over the pixels: of the squares of glyph times alpha,
    cross_T3: np.ndarray  # of the same times alpha,
    squares_T: np.ndarray  # and of alpha squared


class Shown(NamedTuple):
    """background: of BACKGROUNDS, or UNKNOWN. objects: the best matched first; of kind UNKNOWN what matches nothing."""

    background: str
    objects: list[Object]


def templates(glyphs: Mapping[str, Image.Image]) -> Templates:
    """What `see` looks for. glyphs: by kind, RGBA and square."""
    pairs = [(kind, side) for kind in glyphs for side in TRIED]
    pixels_THW4 = np.zeros((len(pairs), SIDE, SIDE, 4), np.float32)
    for pixels_HW4, (kind, side) in zip(pixels_THW4, pairs, strict=True):
        pixels_HW4[:side, :side] = np.asarray(scaled(glyphs[kind], side))
    pixels_THW4[..., :3] *= pixels_THW4[..., 3:] / 255
    smooth_T4HW = np.moveaxis(smoothed(pixels_THW4, (1, 2)), 3, 1)
    glyph_T3HW, alpha_THW = smooth_T4HW[:, :3], smooth_T4HW[:, 3] / 255
    return Templates(
        [kind for kind, _ in pairs],
        np.array([side for _, side in pairs]),
        np.fft.rfft2(glyph_T3HW).conj(),
        np.fft.rfft2(alpha_THW).conj(),
        (glyph_T3HW**2).sum((1, 2, 3)),
        np.einsum("tchw,thw->tc", glyph_T3HW, alpha_THW),
        (alpha_THW**2).sum((1, 2)),
    )


def see(image: Image.Image, known: Templates) -> Shown:
    """The background and the objects of a picture; one of another size than SIDE x SIDE is resized to that.

    The background is the median of the border's pixels. All is smoothed. At each place each template is laid over it,
    and what differs from the background in the picture becomes less by so much as it explains (squared error). The
    template and place that explain most are an object, where that is half of what differs in their box or more. So on
    with what does not overlap it. What still differs and is connected is an object of kind UNKNOWN.
    """
    pixels_HW3 = levels_of(image).astype(np.float32)
    background_3 = np.median(pixels_HW3[BORDER_HW], axis=0)
    distance, name = min(
        (float(np.linalg.norm(np.subtract(level_3, background_3))), name) for name, level_3 in BACKGROUNDS.items()
    )
    difference_HW3 = smoothed(pixels_HW3 - background_3, (0, 1))
    objects = [*_matches(difference_HW3, background_3, known)]
    return Shown(name if distance <= NEAR else UNKNOWN, [*objects, *_strangers(difference_HW3, objects)])


def smoothed(pixels: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """Means of 3 x 3 pixels, around the borders too: noise becomes less, and blur makes less of a difference."""
    for axis in axes:
        pixels = (np.roll(pixels, -1, axis) + pixels + np.roll(pixels, 1, axis)) / 3
    return pixels


def check(facts: Facts, shown: Shown) -> list[str]:
    """Which of FACTS the picture breaks, as `broken_by` tells; an empty list when all of them hold."""
    broken = broken_by(facts, shown.objects, WEIGHT)
    if facts["background"] not in (None, shown.background):
        broken.add("background")
    return [fact for fact in FACTS if fact in broken]


def _matches(difference_HW3: np.ndarray, background_3: np.ndarray, known: Templates) -> Iterator[Object]:
    """The things that explain most, one after another."""
    gains_THW = _gains(difference_HW3, background_3, known)
    while gains_THW.any():
        number, top, left = (int(place) for place in np.unravel_index(gains_THW.argmax(), gains_THW.shape))
        side = int(known.sides_T[number])
        yield Object(known.kinds_T[number], (left, top, left + side, top + side))
        for other in TRIED:
            first_y, first_x = (max(0, start - other + OVERLAP + 1) for start in (top, left))
            rows, columns = slice(first_y, top + side - OVERLAP), slice(first_x, left + side - OVERLAP)
            gains_THW[known.sides_T == other, rows, columns] = 0


def _gains(difference_HW3: np.ndarray, background_3: np.ndarray, known: Templates) -> np.ndarray:
    """[T, H, W]: by how much a template with its top left there makes the squared difference less, where that is
    LEAST_EXPLAINED of what there is in its box or more; else 0."""
    seen_3hw = np.fft.rfft2(np.moveaxis(difference_HW3, 2, 0))
    through_hw = np.tensordot(background_3, seen_3hw, 1)
    products_Thw = np.einsum("chw,tchw->thw", seen_3hw, known.glyphs_T3hw) - through_hw * known.alphas_Thw
    own_T = known.energies_T - 2 * known.cross_T3 @ background_3 + known.squares_T * (background_3 @ background_3)
    gains_THW = 2 * np.fft.irfft2(products_Thw, (SIDE, SIDE)) - own_T[:, None, None]
    sums_HW = np.pad((difference_HW3**2).sum(2).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for side in TRIED:
        within_HW = np.full((SIDE, SIDE), np.inf, np.float32)
        end = SIDE - side + 1
        within_HW[:end, :end] = (
            sums_HW[side:, side:] - sums_HW[:-side, side:] - sums_HW[side:, :-side] + sums_HW[:-side, :-side]
        )
        of_side_T = known.sides_T == side
        gains_THW[of_side_T] *= gains_THW[of_side_T] >= LEAST_EXPLAINED * within_HW
    return gains_THW.clip(0)


def _strangers(difference_HW3: np.ndarray, objects: Sequence[Object]) -> list[Object]:
    """What differs beside the objects."""
    strange_HW = np.linalg.norm(difference_HW3, axis=2) >= DIFFERENT
    for left, top, right, bottom in (each.box for each in objects):
        strange_HW[max(0, top - REACH) : bottom + REACH, max(0, left - REACH) : right + REACH] = False
    wholes, dirt = regions(strange_HW)
    return [Object(UNKNOWN, box_of(mask_HW)) for mask_HW in wholes + dirt]
