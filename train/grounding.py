"""A loss for attention that lies beside the thing that its word speaks of, where the data say where it is."""

# Shapes: B pictures, S tokens of the text, W words, N tokens of the picture at one attention, H W size of the latents.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.attention_maps import NOTHING, by_word
from diffusion.text import TextEncoder

from .attention import Weights
from .data.masks import Masks
from .data.source import Source
from .data.stream import Sample


def grounding_loss(weights: Weights, of_BS: Tensor, masks_BWHW: Tensor) -> Tensor:
    """loss_B, in nats: KL(mask || map), where a word's map, its attention from each place, and its mask are both
    distributions over places; the mean over attentions, then over a picture's words that have a mask; 0 for a picture
    without one. It is 0 where attention is the same all over the mask and nowhere else.

    The token loss of TokenCompose (Wang et al. 2024), (1 - share inside the mask)^2, asks for attention inside but not
    for all of the inside; its pixel loss wants each word of an object at weight 1 there, which only one can have.

    of_BS: of each token the number of its word; a number without a mask, as -1, for others. masks_BWHW: how much of
    each latent pixel the mask covers, all zeros for a word without one. A pixel that is covered in part counts in part.
    """
    there_BW = masks_BWHW.sum(dim=(2, 3)) > 0
    size = masks_BWHW.shape[2], masks_BWHW.shape[3]
    apart = []
    for site, weights_BNS in weights:
        masks_BWN = F.adaptive_avg_pool2d(masks_BWHW, site.size(*size)).flatten(2)
        maps_BWN = by_word(weights_BNS, of_BS, masks_BWHW.shape[1])
        aim_BWN, found_BWN = (
            each / each.sum(dim=-1, keepdim=True).clamp(min=NOTHING) for each in (masks_BWN, maps_BWN)
        )
        apart.append(F.kl_div(found_BWN.clamp(min=NOTHING).log(), aim_BWN, reduction="none").sum(dim=-1))
    return (torch.stack(apart).mean(dim=0) * there_BW).sum(dim=1) / there_BW.sum(dim=1).clamp(min=1)


class Grounding:
    """`grounding_loss` of samples of a source that is a folder. Raises GazeError: see `Masks`."""

    def __init__(self, folder: Path, source: Source, text: TextEncoder, device: torch.device):
        self.masks, self.source, self.text, self.device = Masks(folder), source, text, device

    def loss(self, weights: Weights, samples: Sequence[Sample], size: tuple[int, int]) -> Tensor:
        """loss_B. size: of the latents. Raises GazeError: see `Masks.covered`."""
        of_BS, masks_BWHW = self.targets(samples, size)
        return grounding_loss(weights, of_BS.to(self.device), masks_BWHW.to(self.device))

    def targets(self, samples: Sequence[Sample], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """of_BS and masks_BWHW. A word has its mask as far as it has a token, so none in a dropped caption."""
        readings = [self.text.plain(sample.caption) for sample in samples]
        of_BS = torch.full((len(samples), self.text.window), -1)
        masks_BWHW = torch.zeros(len(samples), max(len(reading.words) for reading in readings) or 1, *size)
        for row, (sample, reading) in enumerate(zip(samples, readings, strict=True)):
            (chunk,) = reading.chunks
            of_BS[row, 1 : 1 + len(chunk.words)] = torch.tensor(chunk.words)
            name = self.source[sample.index].name
            if chunk.words and name in self.masks.marked:
                said = self.masks.marked[name].objects[sample.caption]
                masks_OHW = self.masks.covered(name, sample, size)
                for word in set(chunk.words):
                    masks_BWHW[row, word] = masks_OHW[[*said[word]]].sum(dim=0)
        return of_BS, masks_BWHW
