"""Spacings: which timesteps or noise levels the steps of a run visit.

Shape letters: N points asked for, K terms of a series.
"""

import math

import torch
from torch import Tensor

from .errors import GazeError, nearest

SPACINGS = ("leading", "linspace", "trailing")
# Levels between the ends of the spaced timesteps, in place of those that belong to the timesteps.
LEVEL_SPACINGS = ("beta", "exponential", "karras")


def spaced_timesteps(spacing: str, total: int, count: int, offset: int = 0) -> Tensor:
    """`count` timesteps [N] out of `total`, float64, descending (Lin et al. 2024, table 2).

    "leading": multiples of total // count, plus offset; "linspace": both ends included, fractional; "trailing":
    counted down from the last. Always exactly `count`. One point of linspace is the last timestep, where all noise is
    (numpy's linspace, and so diffusers, gives timestep 0 there).
    """
    down_N = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    if spacing == "leading":
        return down_N * (total // count) + offset
    if spacing == "trailing":
        return ((down_N + 1) * (total / count)).round() - 1
    if spacing == "linspace":
        # Clamped, because rounding can pass the last timestep by its last digit.
        return (down_N * ((total - 1) / (count - 1))).clamp(max=total - 1) if count > 1 else down_N + total - 1
    raise GazeError(f"unknown timestep_spacing {spacing!r}", nearest(spacing, SPACINGS))


def spaced_sigmas(spacing: str, sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Tensor:
    """`count` levels [N], float64, from sigma_max down to sigma_min; one alone is sigma_max.

    "karras": even in sigma^(1/rho) (Karras et al. 2022, eq. 5); "exponential": even in log sigma; "beta": sigma at the
    quantiles of the beta distribution with both shapes 0.6, close together at both ends (Lee et al. 2024).
    """
    ramp_N = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "karras":
        return (sigma_max ** (1 / rho) + ramp_N * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    if spacing == "exponential":
        return (math.log(sigma_max) + ramp_N * math.log(sigma_min / sigma_max)).exp()
    if spacing == "beta":
        return sigma_max + beta_quantile(ramp_N) * (sigma_min - sigma_max)
    raise GazeError(f"unknown spacing {spacing!r}", nearest(spacing, (*LEVEL_SPACINGS, *SPACINGS)))


def beta_quantile(share_N: Tensor, shape: float = 0.6) -> Tensor:
    """The quantiles, float64 [N], of shares in [0, 1] of the symmetric beta distribution with both shapes `shape`.

    Its distribution function is a power series that converges fast up to 1/2 (Abramowitz & Stegun 26.5.4), and
    symmetric around that; it is inverted by bisection.
    """
    order_K = torch.arange(60, dtype=torch.float64)
    factors_K = ((order_K[1:] - shape) / order_K[1:]).cumprod(0)
    terms_K = torch.cat([torch.ones(1, dtype=torch.float64), factors_K]) / (shape + order_K)
    norm = math.gamma(2 * shape) / math.gamma(shape) ** 2
    lower_N = torch.minimum(share_N, 1 - share_N)
    low_N, high_N = torch.zeros_like(lower_N), torch.full_like(lower_N, 0.5)
    for _ in range(60):
        middle_N = (low_N + high_N) / 2
        below = norm * middle_N**shape * (middle_N[:, None] ** order_K @ terms_K) < lower_N
        low_N, high_N = torch.where(below, middle_N, low_N), torch.where(below, high_N, middle_N)
    return torch.where(share_N < 0.5, high_N, 1 - high_N).where((share_N > 0) & (share_N < 1), share_N)
