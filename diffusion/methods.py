"""The methods of sampling: from noise to a picture along falling noise levels, as generators that yield every step.

All work in the variance exploding frame x = clean + sigma * noise, where DDIM without added noise is Euler's method,
and ask a denoiser (x, sigma) -> clean only. A method's memory is its local variables, so any number of pictures may be
under way at once. Steps are means of clean and x: these lose no digits from a high sigma to a low one, slopes do.

Shape letters: B batch, C channels, H W latent size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Method = Callable[[Denoise, Tensor, Sequence[float], Noise], Iterator["Step"]]


class Step(NamedTuple):
    """x_BCHW after a step, the picture clean_BCHW that the denoiser last saw in it, and the noise level sigma of x."""

    x_BCHW: Tensor
    clean_BCHW: Tensor
    sigma: float


def churned(
    x: Tensor, sigma: float, steps: int, noise: Noise, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Tensor, float]:
    """x and its level after fresh noise that raises the level by s_churn / steps of itself, at most by sqrt(2) - 1, if
    it is within s_tmin to s_tmax (Karras et al. 2022, algorithm 2). s_noise: standard deviation of that noise."""
    rise = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    if rise == 0:
        return x, sigma
    higher = sigma * (1 + rise)
    return x + s_noise * (higher**2 - sigma**2) ** 0.5 * noise(), higher


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """First order: Karras et al. 2022, algorithm 2 without its correction; DDIM of eta 0 (Song et al. 2021, eq. 13).
    The options: see `churned`."""
    for sigma, lower in pairwise(sigmas):
        x, sigma = churned(x, sigma, len(sigmas) - 1, noise, s_churn, s_tmin, s_tmax, s_noise)
        clean = denoise(x, sigma)
        x = torch.lerp(clean, x, lower / sigma)
        yield Step(x, clean, lower)


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """Euler to below the next level, then fresh noise up to it. eta 1 is DDPM's variance (Ho et al. 2020, eq. 7;
    k-diffusion's sample_euler_ancestral), 0 is Euler; in between it is DDIM's (Song et al. 2021, eq. 16). `noise` is
    called at every step but one that ends at level 0, and never for eta 0."""
    for sigma, lower in pairwise(sigmas):
        clean = denoise(x, sigma)
        up = lower * min(1.0, eta * (1 - (lower / sigma) ** 2) ** 0.5)
        x = torch.lerp(clean, x, (lower**2 - up**2) ** 0.5 / sigma)
        if up > 0:
            x = x + up * noise()
        yield Step(x, clean, lower)


def heun_in(frame: Callable[[float], float]) -> Method:
    """Heun's method in the frame x / frame(sigma), where its two slopes are averaged: other than Euler's it depends on
    the frame."""

    def heun(
        denoise: Denoise,
        x: Tensor,
        sigmas: Sequence[float],
        noise: Noise,
        *,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> Iterator[Step]:
        """Second order with two calls a step, one where the step ends at level 0 (Karras et al. 2022, algorithm 2). The
        options: see `churned`."""
        for sigma, lower in pairwise(sigmas):
            x, sigma = churned(x, sigma, len(sigmas) - 1, noise, s_churn, s_tmin, s_tmax, s_noise)
            clean = denoise(x, sigma)
            x = torch.lerp(clean, x, lower / sigma)
            if lower > 0:
                # The algorithm's mean of two slopes, written as a correction of Euler's step.
                again = denoise(x, lower)
                x = x + (sigma / lower - 1) / 2 * (frame(lower) / frame(sigma)) * (again - clean)
                clean = again
            yield Step(x, clean, lower)

    return heun


heun = heun_in(lambda sigma: 1.0)
flow_heun = heun_in(lambda sigma: 1 + sigma)  # in (1 - t) * clean + t * noise, the frame of flow-matching models


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Iterator[Step]:
    """DPM-Solver++(2M), second order with one call a step (Lu et al. 2022b, algorithm 2, midpoint form). The first step
    is Euler's; so is the last where it ends at level 0, or where there are fewer than 15 steps, as in diffusers.

    eta 1 solves the stochastic equation instead (SDE-DPM-Solver++(2M), appendix B); in between, k-diffusion's form."""
    steps = len(sigmas) - 1
    earlier, before = None, 0.0
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        clean = ahead = denoise(x, sigma)
        if earlier is not None and lower > 0 and not (i == steps - 1 and steps < 15):
            ratio = math.log(sigma / lower) / math.log(before / sigma)
            ahead = clean + ratio / 2 * (clean - earlier)
        x = torch.lerp(ahead, x, (lower / sigma) ** (1 + eta))
        if lower > 0 and eta > 0:
            x = x + lower * (1 - (lower / sigma) ** (2 * eta)) ** 0.5 * noise()
        yield Step(x, clean, lower)
        earlier, before = clean, sigma


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(3M) for the stochastic equation, from three guesses with one call a step (k-diffusion's
    sample_dpmpp_3m_sde; for eta 0 the authors' multistep code, and diffusers'). It begins with one and two guesses, and
    with fewer than 15 steps ends so, as in diffusers; a step that ends at level 0 is Euler's.

    Of second order, as everywhere: its second difference stands for the second derivative, but is half of it."""
    steps = len(sigmas) - 1
    past: list[tuple[Tensor, float]] = []  # what the denoiser saw, latest first, and the length of the step after it
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        clean = denoise(x, sigma)
        order = min(3, i + 1, steps - i if steps < 15 else 3)
        x = torch.lerp(clean, x, (lower / sigma) ** (1 + eta))
        if lower > 0:
            length = math.log(sigma / lower)
            span = (1 + eta) * length
            phi_2 = math.expm1(-span) / span + 1
            if order > 1:
                slope = (clean - past[0][0]) * (length / past[0][1])
                if order == 3:
                    bend = slope - (past[0][0] - past[1][0]) * (length / past[1][1])
                    both = past[0][1] + past[1][1]
                    slope = slope + bend * (past[0][1] / both)
                    x = x - (phi_2 / span - 0.5) * (length / both) * bend
                x = x + phi_2 * slope
            if eta > 0:
                x = x + lower * (1 - (lower / sigma) ** (2 * eta)) ** 0.5 * noise()
            past = [(clean, length), *past[:1]]
        yield Step(x, clean, lower)


def unipc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """UniPC of order 2 in its B2 form (Zhao et al. 2023, algorithms 5 to 8): DPM-Solver++(2M) predicts, and the
    denoiser's next answer, needed anyway, corrects that step. The first and the last prediction are Euler's."""
    steps = len(sigmas) - 1
    start, order = x, 1
    past: list[tuple[Tensor, float]] = []  # what the denoiser saw and its level, latest first
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        clean = denoise(x, sigma)
        if past:
            before, level = past[0]
            ahead = (before + clean) / 2
            if order == 2:
                # Eq. 5 for two points, solved by hand: their places are ratio and 1, in units of this step's length.
                length, decay = math.log(level / sigma), sigma / level - 1
                ratio = math.log(level / past[1][1]) / length
                first = -1 / length - 1 / decay
                second = -2 * first / length - 1 / decay
                weight = (second - first) / (ratio - 1)
                ahead = before + weight / ratio * (past[1][0] - before) + (first - weight) * (clean - before)
            x = torch.lerp(ahead, start, sigma / level)
        start, order, ahead = x, min(2, i + 1, steps - i), clean
        if order == 2:
            ahead = clean + math.log(sigma / lower) / math.log(past[0][1] / sigma) / 2 * (clean - past[0][0])
        x = torch.lerp(ahead, x, lower / sigma)
        yield Step(x, clean, lower)
        past = [(clean, sigma), *past[:1]]


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Sampling of latent consistency models: fresh noise on the clean picture at every level (Luo et al. 2023,
    algorithm 3). For networks distilled for it; from others it is blurred."""
    for sigma, lower in pairwise(sigmas):
        x = clean = denoise(x, sigma)
        if lower > 0:
            x = clean + lower * noise()
        yield Step(x, clean, lower)
