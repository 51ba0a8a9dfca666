"""Maps of attention: weights of tokens -> how much of each word every pixel looks at."""

# Shapes: B pictures, N tokens of the picture (H*W), S tokens of the text, W words, H W height and width.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = 1e-12  # a map that sums to less is none


def by_word(weights_BNS: Tensor, of_S: Sequence[int] | Tensor, count: int) -> Tensor:
    """maps_BWN: the weights of each word's tokens added up, so that over the words a pixel's still sum to 1.

    of_S: of each token the number of its word, as `Words.of_S`; or of_BS, where pictures have words of their own.
    count: how many words, W. Linear, so gradients pass.
    """
    of_S = torch.as_tensor(of_S, device=weights_BNS.device)
    is_of_WS = of_S.unsqueeze(-2) == torch.arange(count, device=weights_BNS.device)[:, None]
    return is_of_WS.to(weights_BNS.dtype) @ weights_BNS.transpose(-2, -1)


def spread(maps_BWN: Tensor, size_here: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """maps_BWHW: maps of an attention whose pixels lie size_here (height, width), brought to another size, bilinear.

    Every pixel is a mean of its neighbours, so what sums to 1 over the words still does. Linear, so gradients pass.
    """
    return F.interpolate(maps_BWN.unflatten(-1, size_here), size=size, mode="bilinear", align_corners=False)


def entropy(maps_BWHW: Tensor) -> Tensor:
    """entropy_BW of each map over its pixels, in nats: 0 where all of it is in one pixel, or where there is nothing of
    it, log(H*W) where it is the same everywhere. However large a map is, its shape alone counts. Gradients pass and
    are finite."""
    maps_BWN = maps_BWHW.flatten(-2)
    share_BWN = maps_BWN / maps_BWN.sum(dim=-1, keepdim=True).clamp(min=NOTHING)
    return -(share_BWN * share_BWN.clamp(min=torch.finfo(share_BWN.dtype).tiny).log()).sum(dim=-1)
