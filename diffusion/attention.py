"""Attention and the transformer of a latent diffusion U-Net.

Shapes: B batch, C channels, N tokens of the picture (H*W), S tokens of the text, E width of the text embedding,
L heads, D width of a head (C = L*D).

Vaswani et al. 2017 (attention, eq. 1), Shazeer 2020 (GEGLU), Rombach et al. 2022 (the spatial transformer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# k_BLSD, v_BLSD and, where tokens of the text are hidden or weigh more or less than others, bias_B11S: added to scores
KeysValues = tuple[Tensor, ...]


def same_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the tensor with fewer rows along the batch until both have as many.

    Classifier-free guidance asks for two predictions from one x. Until text first enters, both are one computation on
    B rows; where it meets the 2B rows of text (negative first, then positive) it becomes 2B rows here.
    """
    rows = max(len(a), len(b))
    if len(a) < rows:
        a = a.repeat(rows // len(a), *[1] * (a.ndim - 1))
    elif len(b) < rows:
        b = b.repeat(rows // len(b), *[1] * (b.ndim - 1))
    return a, b


def unrounded(device: torch.device) -> AbstractContextManager[object]:
    """Within, products of float32 are float32 under autocast too."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)  # which has none


class Attention(nn.Module):
    """Multi-head attention: of the picture to itself, or to a text of another width. Its score function is the scaled
    dot product (Vaswani et al. 2017, eq. 1); `scores` has the others.

    `attend` is the one seam: (q_BLND, k_BLSD, v_BLSD) -> out_BLND, with bias_B11S as a fourth argument where tokens of
    the text are hidden or weighted. Setting it on an instance replaces the kernel of that layer; deleting it there
    restores the fused kernel of the class. `attention_sites.attending` does both.
    """

    attend: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, heads: int, source_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        source_channels = channels if source_channels is None else source_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(source_channels, channels, bias)
        self.to_v = nn.Linear(source_channels, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because diffusers' name is to_out.0

    def split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source_BSE: Tensor) -> KeysValues:
        """What can be computed once for a source that does not change: k_BLSD, v_BLSD."""
        return self.split(self.to_k(source_BSE)), self.split(self.to_v(source_BSE))

    def scores(self, q_BLND: Tensor, k_BLSD: Tensor) -> Tensor:
        """scores_BLNS, float32: what the softmax is taken of."""
        with unrounded(q_BLND.device):
            return (q_BLND.float() / math.sqrt(q_BLND.shape[-1])) @ k_BLSD.float().transpose(-2, -1)

    def weights(self, q_BLND: Tensor, k_BLSD: Tensor, bias_B11S: Tensor | None = None) -> Tensor:
        """weights_BLNS, float32: what `attend` multiplies v by and does not show. Each row sums to 1."""
        scores_BLNS = self.scores(q_BLND, k_BLSD)
        return (scores_BLNS if bias_B11S is None else scores_BLNS + bias_B11S).softmax(dim=-1)

    def flops(self, places: int, source: int) -> int:
        """Of the matrix products of `attend` for one row: N places that attend to S of a source."""
        return 4 * places * source * self.to_q.out_features

    def forward(self, x_BNC: Tensor, keys_values: KeysValues) -> Tensor:
        out_BLND = self.attend(self.split(self.to_q(x_BNC)), *keys_values)
        return self.to_out[0](out_BLND.transpose(1, 2).flatten(2))


MakeAttention = Callable[[int, int], Attention]  # channels, heads


class GEGLU(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x_BNC: Tensor) -> Tensor:
        value, gate = self.proj(x_BNC).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # The identity stands where diffusers has a dropout, so that the names agree (net.0.proj, net.2).
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.net(x_BNC)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised before and added after.

    cross: makes the attention to the text of channels and heads; None: there is none.
    """

    def __init__(self, channels: int, heads: int, cross: MakeAttention | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.attn2 = None
        if cross is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = cross(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x_BNC: Tensor, text: KeysValues) -> Tensor:
        normed_BNC = self.norm1(x_BNC)
        x_BNC = x_BNC + self.attn1(normed_BNC, self.attn1.keys_values(normed_BNC))
        if self.attn2 is not None:
            x_BNC, _ = same_rows(x_BNC, text[0])
            x_BNC = x_BNC + self.attn2(self.norm2(x_BNC), text)
        return x_BNC + self.ff(self.norm3(x_BNC))


class TokenConv(nn.Conv2d):
    """A 1x1 convolution applied to tokens: Stable Diffusion 1.x stores its projections so, later models as linear."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return F.linear(x_BNC, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of a feature map, as a residual (Rombach et al. 2022, section 3.3)."""

    def __init__(
        self, channels: int, heads: int, cross: MakeAttention | None, depth: int, groups: int, linear: bool
    ) -> None:
        super().__init__()

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear else TokenConv(channels, channels, 1)

        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # not the 1e-5 of the residual blocks
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, cross) for _ in range(depth))
        self.proj_out = projection()

    def forward(self, x_BCHW: Tensor, texts: Iterator[KeysValues]) -> Tensor:
        """`texts` gives the text's keys and values of each transformer block; rows as in `same_rows`."""
        x_BNC = self.proj_in(self.norm(x_BCHW).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            x_BNC = block(x_BNC, next(texts))
        out_BCHW = self.proj_out(x_BNC).transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        x_BCHW, out_BCHW = same_rows(x_BCHW, out_BCHW)
        return x_BCHW + out_BCHW
