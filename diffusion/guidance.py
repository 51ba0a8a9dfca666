"""Two predictions into one: away from the empty (or negative) prompt, towards the prompt.

Any shape whose first dimension counts pictures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GazeError


@dataclass(frozen=True)
class Guidance:
    """What is done with the two predictions, and where.

    scale: 1 is the prompt alone, 0 the empty prompt alone.
    rescale: share, 0 to 1, of the result whose spread is brought back to the prompt's prediction's; see `rescaled`.
    interval: noise levels, from above the first to the second, at which there is guidance; elsewhere the prompt alone,
        at half the cost (Kynkäänniemi et al. 2024, eq. 5).
    projected: adaptive projected guidance instead; see `projected`. eta, norm, momentum are its numbers.
    Raises GazeError for a value outside its range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)
    projected: bool = False
    eta: float = 0.0
    norm: float = 15.0
    momentum: float = -0.5

    def __post_init__(self) -> None:
        low, high = self.interval
        if not math.isfinite(self.scale):
            raise GazeError(f"guidance scale is {self.scale}", "a number such as 7.5; 1 turns guidance off")
        if not 0 <= self.rescale <= 1:
            raise GazeError(f"guidance rescale is {self.rescale}", "a share from 0 to 1; 0.7 is usual")
        if not 0 <= low <= high:
            raise GazeError(
                f"guidance interval is {low} to {high}", "two noise levels, the lower first, such as 0.2 to 5"
            )
        if not (math.isfinite(self.eta) and self.norm > 0 and -1 < self.momentum < 1):
            raise GazeError(
                f"projected guidance has eta {self.eta}, norm {self.norm}, momentum {self.momentum}",
                "a number, a number above 0, a number between -1 and 1",
            )
        if self.projected and self.rescale:
            raise GazeError("projected guidance and rescale do the same thing twice", "one of the two")

    def acts(self, sigma: float) -> bool:
        """Whether there is anything to do at this noise level."""
        return self.scale != 1 and self.interval[0] < sigma <= self.interval[1]


def classifier_free(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, in which scale is 1 + w). Scale 1 is the prompt
    alone, 0 the empty prompt alone."""
    return uncond + scale * (cond - uncond)


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """guided, with `share` of it brought back to the standard deviation of cond, picture by picture: a large scale else
    overexposes (Lin et al. 2024, eq. 15 and 16)."""
    dims = tuple(range(1, cond.ndim))
    back = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * back + (1 - share))


def projected(cond: Tensor, difference: Tensor, scale: float, eta: float, norm: float) -> Tensor:
    """cond + (scale - 1) * the difference cond - uncond, which is made no longer than `norm` and counts only `eta`
    times along cond, where it does little but saturate (Sadat et al. 2024, algorithm 1). For clean pictures.

    difference: with momentum, a running sum of it.
    """
    dims = tuple(range(1, cond.ndim))
    length = difference.square().sum(dims, keepdim=True).sqrt()
    difference = difference * (norm / length.clamp(min=1e-30)).clamp(max=1)  # a difference of 0 stays 0
    along = torch.nn.functional.normalize(cond.flatten(1), dim=1).view_as(cond)
    parallel = (difference * along).sum(dims, keepdim=True) * along
    return cond + (scale - 1) * (difference - parallel + eta * parallel)
