"""A large picture in overlapping tiles, so that memory follows the tile and not the picture."""

# Shapes: B pictures, C channels, H W height and width.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], x_BCHW: Tensor, tile: int, overlap: int) -> Tensor:
    """function(x_BCHW), picture by picture, each in tiles of at most `tile` x `tile` that share `overlap` rows or
    columns with the next, where one fades into the other linearly. A picture within one tile stays whole.

    function: BCHW -> B'HW, where H and W may become larger or smaller by one whole factor, of which tile and overlap
    are multiples. What it takes from the whole picture (means, attention), it takes from a tile instead.
    """
    return torch.cat([_along((2, 3), function, x_1CHW, tile, overlap) for x_1CHW in x_BCHW.split(1)])


def _along(dims: Sequence[int], function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """Strips along the first of the dims, each of them in tiles along the others: where four tiles meet, the weights
    of rows and columns are multiplied."""
    if not dims:
        return function(x)
    dim, size = dims[0], x.shape[dims[0]]
    starts = range(0, max(size - overlap, 1), tile - overlap)  # a last tile within the overlap would add nothing
    strips = [x.narrow(dim, start, min(tile, size - start)) for start in starts]
    return _joined([_along(dims[1:], function, strip, tile, overlap) for strip in strips], dim, overlap / tile)


def _joined(pieces: Sequence[Tensor], dim: int, share: float) -> Tensor:
    """The pieces one after the other; `share` of the first one's length is what each has in common with the next."""
    whole = pieces[0]
    overlap = round(whole.shape[dim] * share)
    for piece in pieces[1:]:
        kept = whole.shape[dim] - overlap
        shape = [overlap if d == dim else 1 for d in range(piece.ndim)]
        ramp = (torch.arange(overlap, device=piece.device) / overlap).to(piece.dtype).view(shape)
        seam = torch.lerp(whole.narrow(dim, kept, overlap), piece.narrow(dim, 0, overlap), ramp)
        rest = piece.narrow(dim, overlap, piece.shape[dim] - overlap)
        whole = torch.cat([whole.narrow(dim, 0, kept), seam, rest], dim)
    return whole
