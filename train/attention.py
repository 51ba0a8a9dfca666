"""A network's attention to words while it learns: its weights, as they are computed, and figures of them."""

# Shapes: B pictures, N tokens of the picture at one attention, S tokens of the text, W words, H W size of the latents.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion.attention_maps import NOTHING, by_word, entropy, spread
from diffusion.attention_sites import Site, attending, sites
from diffusion.errors import GazeError
from diffusion.unet import UNet
from diffusion.words import END, PADDING, START, Words

from .config import Recipe

SPECIAL = {START: "start", END: "end", PADDING: "padding"}
Weights = list[tuple[Site, Tensor]]  # of each cross-attention that was called: weights_BNS, the mean over its heads


def check_attends(unet: UNet, recipe: Recipe) -> None:
    """Raises GazeError where the recipe asks for attention to the text and the U-Net has none."""
    asked = {"validation.attention": recipe.validation.attention, "objective.grounding": recipe.objective.grounding}
    for option, value in asked.items():
        if value and not sites(unet, cross=True):
            raise GazeError(f"{option} is of attention to the text, and this U-Net has none", "leave it out")


@contextmanager
def weighed(unet: UNet) -> Iterator[Weights]:
    """Within, and in this thread, each attention to the text adds its weights to the list, in float32 and with
    gradients where they are kept. What it computes stays the same to the bit."""
    found: Weights = []

    def attend(site: Site, usual: Any, q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor, *bias: Tensor) -> Tensor:
        with torch.autocast(q_BLND.device.type, enabled=False):
            found.append((site, site.layer.weights(q_BLND, k_BLSD, *bias).mean(dim=1)))
        return usual(q_BLND, k_BLSD, v_BLSD, *bias)

    with attending(sites(unet, cross=True), attend):
        yield found


def mean_maps(weights: Weights, words: Words, size: tuple[int, int]) -> Tensor:
    """maps_BWHW, the mean over the layers at the latents' size: over words and special tokens a pixel's sum to 1."""
    each = [
        spread(by_word(weights_BNS, words.of_S, len(words.names)), site.size(*size), size)
        for site, weights_BNS in weights
    ]
    return torch.stack(each).mean(dim=0)


def attention_figures(maps_BWHW: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Means over the pictures, all of one caption. names: those of `Words`.

    attention_entropy: of the words' maps over the pixels, in nats, the mean over the words; attention_spread: the same
    as a share of a uniform map's, log(H*W). attention_overlap: of two words that stand side by side in the caption, as
    an adjective and its noun do, and of all that do not: the intersection over the union of their maps, sum min(p, q) /
    sum max(p, q), p and q each summing to 1. attention_share: what a pixel gives to all words together, and to each
    kind of special token. What a caption has nothing for is left out.
    """
    count = sum(name not in SPECIAL for name in names)
    share_W = maps_BWHW.mean(dim=(0, 2, 3))
    shares = dict(zip(names[count:], share_W[count:].tolist(), strict=True))
    found = {"attention_share/words": float(share_W[:count].sum())}
    found |= {f"attention_share/{kind}": shares.get(name, 0.0) for name, kind in SPECIAL.items()}
    if not count:
        return found
    words_BWHW = maps_BWHW[:, :count]
    nats = float(entropy(words_BWHW).mean())
    most = math.log(words_BWHW[0, 0].numel())
    overlap_WW = overlaps(words_BWHW).mean(dim=0)
    beside_P = overlap_WW.diagonal(1)
    apart_P = overlap_WW[tuple(torch.triu_indices(count, count, 2))]
    pairs = {"neighbours": beside_P, "others": apart_P}
    return {
        "attention_entropy": nats,
        **({"attention_spread": nats / most} if most else {}),
        **{f"attention_overlap/{name}": float(overlap_P.mean()) for name, overlap_P in pairs.items() if len(overlap_P)},
        **found,
    }


def overlaps(maps_BWHW: Tensor) -> Tensor:
    """overlap_BWW of each two maps: 1 for maps of one shape, 0 for those that share no pixel."""
    maps_BWN = maps_BWHW.flatten(2)
    share_BWN = maps_BWN / maps_BWN.sum(dim=-1, keepdim=True).clamp(min=NOTHING)
    apart_BWW = torch.cdist(share_BWN, share_BWN, p=1.0)  # 2 - 2 sum min = 2 sum max - 2
    return (2 - apart_BWW) / (2 + apart_BWW)
