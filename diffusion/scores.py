"""Score functions of an attention beside the scaled dot product: how much a token of the text matters to a place of the
picture, of which the softmax is taken.

Each kind is an `Attention` with parameters of its own. It begins with the same projections as every other kind, drawn
alike, because what it adds begins as constants.

Shapes: B batch, N tokens of the picture, S tokens of the text, L heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, unrounded

AT_ONCE = 2**20  # numbers of the additive score's N x S x D that exist at a time
SHARPEST = 100.0  # of the cosine's factor (Liu et al. 2022, section 3.3)


class Transformed(Attention):
    """A score that is the dot product of something made of q and something made of k, which the fused kernel takes."""

    def pair(self, q_BLND: Tensor, k_BLSD: Tensor) -> tuple[Tensor, Tensor]:
        """What the dot product is taken of, in the shapes and dtypes of q and k."""
        raise NotImplementedError

    def scores(self, q_BLND: Tensor, k_BLSD: Tensor) -> Tensor:
        q_BLND, k_BLSD = self.pair(q_BLND, k_BLSD)
        with unrounded(q_BLND.device):
            return q_BLND.float() @ k_BLSD.float().transpose(-2, -1)

    def attend(self, q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*self.pair(q_BLND, k_BLSD), v_BLSD, bias_B11S, scale=1.0)


class Bilinear(Transformed):
    """q^T W k, with a W for each head (Luong et al. 2015, section 3.1, "general"). Begins as the scaled dot product."""

    def __init__(self, channels: int, heads: int, source_channels: int | None = None, bias: bool = False) -> None:
        super().__init__(channels, heads, source_channels, bias)
        width = channels // heads
        self.between = nn.Parameter(torch.eye(width).repeat(heads, 1, 1) / math.sqrt(width))  # LDD

    def pair(self, q_BLND: Tensor, k_BLSD: Tensor) -> tuple[Tensor, Tensor]:
        return q_BLND, k_BLSD @ self.between.transpose(1, 2).to(k_BLSD.dtype)

    def flops(self, places: int, source: int) -> int:
        return super().flops(places, source) + 2 * source * self.between.numel()


class Cosine(Transformed):
    """The cosine of the angle between q and k over a temperature, learned for each head (Liu et al. 2022, section 3.3;
    Henry et al. 2020). It begins at 0.1 and stays above 0.01."""

    def __init__(self, channels: int, heads: int, source_channels: int | None = None, bias: bool = False) -> None:
        super().__init__(channels, heads, source_channels, bias)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(10)))  # L; the temperature's inverse

    def pair(self, q_BLND: Tensor, k_BLSD: Tensor) -> tuple[Tensor, Tensor]:
        scale_L11 = self.log_scale.float().clamp(max=math.log(SHARPEST)).exp()[:, None, None]
        q_unit, k_unit = (F.normalize(x.float(), dim=-1) for x in (q_BLND, k_BLSD))
        return (q_unit * scale_L11).to(q_BLND.dtype), k_unit.to(k_BLSD.dtype)


class Additive(Attention):
    """v^T tanh(W q + U k), with a v for each head (Bahdanau et al. 2014, appendix A.1.2). W and U are to_q and to_k:
    the paper has no projections before them."""

    def __init__(self, channels: int, heads: int, source_channels: int | None = None, bias: bool = False) -> None:
        super().__init__(channels, heads, source_channels, bias)
        width = channels // heads
        self.combine = nn.Parameter(torch.full((heads, width), width**-0.5))  # LD

    def scores(self, q_BLND: Tensor, k_BLSD: Tensor) -> Tensor:
        scores_BLNS: Tensor = _InPieces.apply(q_BLND.float(), k_BLSD.float(), self.combine.float())
        return scores_BLNS

    def attend(self, q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
        return self.weights(q_BLND, k_BLSD, bias_B11S).to(v_BLSD.dtype) @ v_BLSD


class _InPieces(torch.autograd.Function):
    """The additive scores_BLNS of q_BLND, k_BLSD and v_LD. Nothing as large as N x S x D is ever there or kept: tanh is
    computed for some of N at a time, and again on the way back."""

    @staticmethod
    def forward(ctx: Any, q_BLND: Tensor, k_BLSD: Tensor, v_LD: Tensor) -> Tensor:
        ctx.save_for_backward(q_BLND, k_BLSD, v_LD)
        with unrounded(q_BLND.device):
            parts = [tanh.flatten(2, 3) @ v_LD[:, :, None] for tanh in _tanh(q_BLND, k_BLSD)]  # each B L nS 1
        return torch.cat([part.unflatten(2, (-1, k_BLSD.shape[2])).squeeze(-1) for part in parts], dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q_BLND, k_BLSD, v_LD = ctx.saved_tensors
        of_q, of_k, of_v = [], torch.zeros_like(k_BLSD), torch.zeros_like(v_LD)
        left_BLNS = gradients[0]
        for tanh in _tanh(q_BLND, k_BLSD):
            here_BLnS, left_BLNS = left_BLNS[:, :, : tanh.shape[2]], left_BLNS[:, :, tanh.shape[2] :]
            with unrounded(q_BLND.device):
                of_v += (here_BLnS.flatten(2)[:, :, None] @ tanh.flatten(2, 3)).sum(0)[:, 0]
            inner = tanh.square_().neg_().add_(1).mul_(v_LD[:, None, None]).mul_(here_BLnS[..., None])
            of_q.append(inner.sum(3))
            of_k += inner.sum(2)
        return torch.cat(of_q, dim=2), of_k, of_v


def _tanh(q_BLND: Tensor, k_BLSD: Tensor) -> Iterator[Tensor]:
    """tanh(q + k) of every place and token, B L n S D, for so many places n at a time as AT_ONCE has room for."""
    for some_BLnD in q_BLND.split(max(1, AT_ONCE // max(k_BLSD.numel(), 1)), dim=2):
        yield (some_BLnD[:, :, :, None] + k_BLSD[:, :, None]).tanh_()


KINDS: dict[str, type[Attention]] = {"dot": Attention, "additive": Additive, "bilinear": Bilinear, "cosine": Cosine}
