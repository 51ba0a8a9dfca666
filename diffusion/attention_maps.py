"""Maps of attention: which words each pixel looks at, and which other pixels; taken down while a picture is made."""

# Shapes: B pictures, N tokens of the picture (H*W), S tokens of the text, L heads, D width of a head, W maps of a
# picture (one for each word, or for each chosen pixel), H W height and width; P pixels, T steps.

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_sites import Site, attending
from .methods import Denoise

MOST = 2**22  # weights written out at once: 16 MiB
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


# Of a site, its height and width, and what its kernel is given for the pictures: q_BLND, k_BLSD and perhaps bias_B11S.
Read = Callable[..., Tensor]  # -> maps_BWN


def read_words(of_BS: Tensor, count: int, heads: Sequence[int] | None = None) -> Read:
    """How much each pixel looks at each word, in an attention to the text: the mean over its heads, or over these, by
    their numbers from 0. No more than `MOST` weights are there at once, whatever the size.

    of_BS, count: as in `by_word`, a row for each picture.
    """

    def read(site: Site, size: tuple[int, int], q_BLND: Tensor, k_BLSD: Tensor, *bias: Tensor) -> Tensor:
        pixels = max(MOST // (k_BLSD[..., 0].numel()), 1)
        parts = [_mean(site.layer.weights(part, k_BLSD, *bias), heads) for part in q_BLND.split(pixels, dim=2)]
        return torch.cat([by_word(part_BNS, of_BS, count) for part_BNS in parts], dim=-1)

    return read


def read_pixels(places: Sequence[tuple[float, float]], heads: Sequence[int] | None = None) -> Read:
    """How much each of these pixels looks at all others, in an attention of the picture to itself. The mean over a map
    is 1, whatever its size.

    places: down and right, as shares of height and width, from 0 to below 1. heads: see `read_words`.
    """

    def read(site: Site, size: tuple[int, int], q_BLND: Tensor, k_BLSD: Tensor) -> Tensor:
        height, width = size
        rows = [int(down * height) * width + int(right * width) for down, right in places]
        return _mean(site.layer.weights(q_BLND[:, :, rows], k_BLSD), heads) * (height * width)

    return read


def _mean(weights_BLNS: Tensor, heads: Sequence[int] | None) -> Tensor:
    return (weights_BLNS if heads is None else weights_BLNS[:, heads]).mean(dim=1)


class Recorded(NamedTuple):
    """Maps at the latents' size: their mean over the steps and, if they were kept, those of each, all BWHW. steps: the
    numbers of the steps that they are of."""

    mean_BWHW: Tensor
    each: tuple[Tensor, ...]
    steps: tuple[int, ...]


class Recorder:
    """Takes down, while a denoiser is called, what some attentions look at. What they compute stays the same.

    Maps are means: over heads, over layers, each brought to the latents' size, over the calls of a step, over steps.
    Of a call with guidance only the rows of the prompt count, not those of the negative prompt.
    """

    def __init__(self, sites: Sequence[Site], read: Read, steps: Container[int], each: bool = False) -> None:
        """steps: the numbers of those to take down, from 1. each: whether the maps of each are kept as well."""
        self.sites, self.read, self.steps, self.each = sites, read, steps, each
        self.step = 1
        self.size = (0, 0)
        self.sums: dict[tuple[int, int], Tensor] = {}  # of the step, by the size of an attention's picture
        self.count = 0  # of maps in these sums
        self.recorded: Recorded | None = None

    def around(self, denoise: Denoise) -> Denoise:
        """The same denoiser, watched."""

        def watched(x_BCHW: Tensor, sigma: float) -> Tensor:
            if self.step not in self.steps:
                return denoise(x_BCHW, sigma)
            self.size = (x_BCHW.shape[-2], x_BCHW.shape[-1])
            with attending(self.sites, partial(self._attend, len(x_BCHW))):
                return denoise(x_BCHW, sigma)

        return watched

    def _attend(self, pictures: int, site: Site, usual: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        self._record(site, *(each[-pictures:] for each in tensors))
        return usual(*tensors)

    @torch.no_grad()
    def _record(self, site: Site, q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor, *bias: Tensor) -> None:
        here = site.size(*self.size)
        maps_BWN = self.read(site, here, q_BLND, k_BLSD, *bias)
        self.sums[here] = self.sums[here].add_(maps_BWN) if here in self.sums else maps_BWN
        self.count += 1

    def end_step(self) -> Recorded | None:
        """Says that a step is done. What was taken down so far, which later steps leave as it is; None: nothing yet."""
        if self.count:
            sums = [spread(sum_BWN, here, self.size) for here, sum_BWN in self.sums.items()]
            maps_BWHW = torch.stack(sums).sum(dim=0) / self.count
            before, each, steps = self.recorded or (maps_BWHW, (), ())
            mean_BWHW = torch.lerp(before, maps_BWHW, 1 / (len(steps) + 1))
            self.recorded = Recorded(mean_BWHW, (*each, maps_BWHW) if self.each else (), (*steps, self.step))
        self.step, self.count, self.sums = self.step + 1, 0, {}
        return self.recorded
