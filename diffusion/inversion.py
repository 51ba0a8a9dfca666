"""The way back: from a clean picture to the noise that a deterministic sampler draws it from.

Dhariwal & Nichol 2021, appendix F: DDIM's step (Song et al. 2021, eq. 14) run towards more noise. The step's own noise
estimate is that of the point looked for, so each step back is an equation, solved by iteration as in Pan et al. 2023
and Garibi et al. 2024; its first round is their starting point, the estimate at the point that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .methods import Denoise

ROUNDS = 3


def invert(
    denoise: Denoise,
    x_BCHW: Tensor,
    sigmas: Tensor | Sequence[float],
    sigma_data: float = 1.0,
    rounds: int = ROUNDS,
) -> Tensor:
    """x_BCHW at level sigmas[0] from which Euler's method along the falling sigmas comes to this one at sigmas[-1].

    denoise: (x_BCHW, sigma) -> clean_BCHW, called `rounds` times a step. Each round takes the step down from the point
    it has and corrects it by what that misses, divided by the step's slope for normal data of deviation sigma_data; so
    for such data no round is needed, and in the frame of any model the first guess is of the right size.
    """
    for lower, sigma in pairwise(reversed(torch.as_tensor(sigmas, dtype=torch.float64).tolist())):
        ratio = lower / sigma
        slope = ratio + (1 - ratio) / (1 + (sigma / sigma_data) ** 2)
        end_BCHW, x_BCHW = x_BCHW, x_BCHW / slope
        for _ in range(rounds):
            x_BCHW = x_BCHW + (end_BCHW - torch.lerp(denoise(x_BCHW, sigma), x_BCHW, ratio)) / slope
    return x_BCHW
