"""Samplers: from noise to a picture along falling noise levels, as generators that yield every step.

All work in the variance exploding frame x = clean + sigma * noise, where DDIM without added noise is Euler's method,
and ask a denoiser (x, sigma) -> clean only. A method's memory is its local variables, so any number of pictures may be
under way at once. Steps are means of clean and x: these lose no digits from a high sigma to a low one, slopes do.

Shape letters: B batch, C channels, H W latent size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import GazeError, nearest
from .noise import NoiseSchedule, karras_sigmas, spaced_timesteps

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


class Step(NamedTuple):
    """x_BCHW after a step, the picture clean_BCHW that the denoiser last saw in it, and the noise level sigma of x."""

    x_BCHW: Tensor
    clean_BCHW: Tensor
    sigma: float


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """First order: Karras et al. 2022, algorithm 1 without its correction; DDIM of eta 0 (Song et al. 2021, eq. 13)."""
    for sigma, lower in pairwise(sigmas):
        clean = denoise(x, sigma)
        x = torch.lerp(clean, x, lower / sigma)
        yield Step(x, clean, lower)


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Euler to below the next level, then fresh noise up to it: DDPM's variance (Ho et al. 2020, eq. 7; k-diffusion's
    sample_euler_ancestral with eta 1). `noise` is called at every step but one that ends at level 0."""
    for sigma, lower in pairwise(sigmas):
        clean = denoise(x, sigma)
        down = lower**2 / sigma
        x = torch.lerp(clean, x, down / sigma)
        if lower > 0:
            x = x + (lower**2 - down**2) ** 0.5 * noise()
        yield Step(x, clean, lower)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """Second order with two calls a step, one where the step ends at level 0 (Karras et al. 2022, algorithm 1)."""
    for sigma, lower in pairwise(sigmas):
        clean = denoise(x, sigma)
        x = torch.lerp(clean, x, lower / sigma)
        if lower > 0:
            # Algorithm 1's mean of two slopes, written as a correction of Euler's step.
            again = denoise(x, lower)
            x = x + (sigma / lower - 1) / 2 * (again - clean)
            clean = again
        yield Step(x, clean, lower)


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M), second order with one call a step (Lu et al. 2022b, algorithm 2, midpoint form). The first step
    is Euler's; so is the last where it ends at level 0, or where there are fewer than 15 steps, as in diffusers."""
    steps = len(sigmas) - 1
    earlier, before = None, 0.0
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        clean = ahead = denoise(x, sigma)
        if earlier is not None and lower > 0 and not (i == steps - 1 and steps < 15):
            ratio = math.log(sigma / lower) / math.log(before / sigma)
            ahead = clean + ratio / 2 * (clean - earlier)
        x = torch.lerp(ahead, x, lower / sigma)
        yield Step(x, clean, lower)
        earlier, before = clean, sigma


@dataclass(frozen=True)
class Sampler:
    """A method, and the conventions of the diffusers class that matches it: which levels it visits, where it starts.

    integrate: the method, one of the generators above.
    options: the options of scheduler_config.json that the class reads, with its defaults where a file is silent.
    whole: it visits whole timesteps only.
    spare: for leading and linspace it asks for one timestep more and leaves out the lowest.
    full_range: Karras levels span the schedule, not the spaced timesteps.
    unit_start: it starts as if the network's input x / sqrt(1 + sigma^2) were noise of unit variance.
    stochastic: it calls `noise`.
    calls_per_step: network calls in each step but the last, which has one.
    """

    name: str
    integrate: Callable[[Denoise, Tensor, Sequence[float], Noise], Iterator[Step]]
    options: Mapping[str, Any]
    whole: bool = False
    spare: bool = False
    full_range: bool = False
    unit_start: bool = False
    stochastic: bool = False
    calls_per_step: int = 1

    def run(self, denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor | Sequence[float], noise: Noise) -> Iterator[Step]:
        """Go from x at level sigmas[0] to sigmas[-1], yielding len(sigmas) - 1 steps.

        denoise(x_BCHW, sigma: float) -> clean_BCHW; noise() -> fresh unit variance like x (stochastic samplers only).
        """
        return self.integrate(denoise, x_BCHW, torch.as_tensor(sigmas, dtype=torch.float64).tolist(), noise)

    def sigmas(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """The levels of a run of `steps` steps, float64 [steps + 1], descending, as in the matching diffusers class.

        The last is 0, or the lowest of the schedule where the config says set_alpha_to_one false (ddim) or
        final_sigmas_type "sigma_min". diffusers differs in four places, where it is inconsistent: its DDIM steps to t -
        T // n, which for linspace (and for trailing, where n does not divide T) is not the timestep it visits next; its
        one step of linspace starts at timestep 0; floating point can give its trailing one step too many; it rounds the
        timesteps of DPM++'s Karras levels. Raises GazeError for steps < 1 or more than the distinct levels there are.
        """
        options = {option: schedule.config.get(option, default) for option, default in self.options.items()}
        spacing, total = options["timestep_spacing"], len(schedule.sigmas_T)
        if not 1 <= steps <= total:
            raise GazeError(f"{steps} sampling steps: this model has 1 to {total}", "20 to 50 steps")
        points = steps + (self.spare and spacing != "trailing")
        timesteps = spaced_timesteps(spacing, total, points, options["steps_offset"])[:steps]
        sigmas = schedule.sigma(timesteps.round() if self.whole else timesteps)
        if options.get("use_karras_sigmas"):
            span = schedule.sigmas_T.flip(0) if self.full_range else sigmas
            sigmas = karras_sigmas(span[0].item(), span[-1].item(), steps)
        if not bool((sigmas.diff() < 0).all()):
            raise GazeError(f"{steps} sampling steps are too many for {self.name} with {spacing} spacing",
                            f"fewer steps, such as {total // 2}")  # fmt: skip
        lowest = options.get("final_sigmas_type") == "sigma_min" or options.get("set_alpha_to_one") is False
        return torch.cat([sigmas, schedule.sigmas_T[:1] * lowest])

    def start(self, schedule: NoiseSchedule, sigmas: Tensor) -> float:
        """The factor on noise of unit variance that gives x at level sigmas[0].

        sqrt(1 + sigma^2) is the variance of noise plus a picture of unit variance. diffusers' Euler, Heun and ancestral
        classes start from sigma alone (but for leading), its DDIM and DPM++ never.
        """
        spacing = schedule.config.get("timestep_spacing", self.options["timestep_spacing"])
        sigma = float(sigmas[0])
        return math.hypot(1, sigma) if self.unit_start or spacing == "leading" else sigma

    def calls(self, steps: int) -> int:
        """How many times a run of `steps` steps to level 0 calls the denoiser."""
        return self.calls_per_step * (steps - 1) + 1


LEVELS = {"timestep_spacing": "linspace", "steps_offset": 0}
LEVELS_DDIM = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
LEVELS_HEUN = {**LEVELS, "use_karras_sigmas": False}
LEVELS_EULER = {**LEVELS_HEUN, "final_sigmas_type": "zero"}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", euler, LEVELS_DDIM, whole=True, unit_start=True),
        Sampler("euler", euler, LEVELS_EULER),
        Sampler("euler_ancestral", euler_ancestral, LEVELS, stochastic=True),
        Sampler("heun", heun, LEVELS_HEUN, calls_per_step=2),
        Sampler("dpmpp_2m", dpmpp_2m, LEVELS_EULER,
                whole=True, spare=True, full_range=True, unit_start=True),
    )
}  # fmt: skip


def sampler(name: str) -> Sampler:
    """The sampler of that name; GazeError with the nearest name for an unknown one."""
    if name not in SAMPLERS:
        raise GazeError(f"unknown sampler {name!r}", nearest(name, SAMPLERS))
    return SAMPLERS[name]
