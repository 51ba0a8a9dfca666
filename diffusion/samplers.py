"""Samplers: from noise to a picture along falling noise levels, as generators that yield every step.

All work in the variance exploding frame x = clean + sigma * noise, where DDIM without added noise is Euler's method,
and ask a denoiser (x, sigma) -> clean only. A method's memory is its local variables, so any number of pictures may be
under way at once. Steps are means of clean and x: these lose no digits from a high sigma to a low one, slopes do.

Shape letters: B batch, C channels, H W latent size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import GazeError, nearest
from .noise import LEVEL_SPACINGS, SPACINGS, NoiseSchedule, spaced_sigmas, spaced_timesteps

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class PictureNoise:
    """Fresh noise of unit variance at every call, BCHW, each picture's from a generator of its own on the CPU: a seed
    gives the same picture in any batch and on any device.

    shape: of one picture, (C, H, W).
    """

    generators: Sequence[torch.Generator]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


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


@dataclass(frozen=True)
class Trajectory:
    """A method made ready for a model and a number of steps. Holds no state: any number of runs may share it.

    name: what makes it again, the method's name with its options: "ddim:eta=0.5".
    steps: how many were asked for.
    spacing: the one asked for, or None.
    sigmas: the levels at which the network is called, in their order, and the last, where nothing is called: float64.
        Some of diffusers' classes call it more than once a step.
    start: the factor on noise of unit variance that gives x at level sigmas[0].
    run: (denoise, x_BCHW, noise=PictureNoise) -> a Step for each of sigmas[1:]; with sigmas=sigmas[i:] from there on.
    stride: how many of the sigmas there are in a step.
    """

    name: str
    steps: int
    spacing: str | None
    sigmas: Tensor
    start: float
    run: Callable[..., Iterator[Step]]
    stride: int = 1

    def begin(self, strength: float) -> int:
        """Where in sigmas a run begins that does the last `strength` of its steps: i above. Raises GazeError when that
        is no step."""
        left = min(int(self.steps * strength), self.steps)
        if left < 1:
            raise GazeError(f"strength {strength} of {self.steps} steps is no step", f"{math.ceil(1 / strength)} steps")
        return (self.steps - left) * self.stride


@dataclass(frozen=True)
class Sampler:
    """A method, and the conventions of the diffusers class that matches it: which levels it visits, where it starts.

    integrate: the method, one of the generators above.
    options: the options of scheduler_config.json that the class reads, with its defaults where a file is silent.
    whole: it visits whole timesteps only.
    spare: for leading and linspace it asks for one timestep more and leaves out the lowest.
    full_range: Karras levels span the schedule, not the spaced timesteps.
    unit_start: it starts as if the network's input x / sqrt(1 + sigma^2) were noise of unit variance.
    order: how fast the error falls with the step's length, of a stochastic method without its noise.
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
    order: int = 1
    stochastic: bool = False
    calls_per_step: int = 1

    def run(self, denoise: Denoise, x_BCHW: Tensor, sigmas: Tensor | Sequence[float], noise: Noise) -> Iterator[Step]:
        """Go from x at level sigmas[0] to sigmas[-1], yielding len(sigmas) - 1 steps.

        denoise(x_BCHW, sigma: float) -> clean_BCHW; noise() -> fresh unit variance like x (stochastic samplers only).
        """
        return self.integrate(denoise, x_BCHW, torch.as_tensor(sigmas, dtype=torch.float64).tolist(), noise)

    def prepare(self, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Trajectory:
        """The method with everything but a denoiser and a picture. Arguments and errors as of `sigmas`."""
        sigmas = self.sigmas(schedule, steps, spacing)
        start = self.start(schedule, sigmas, spacing)
        return Trajectory(self.name, steps, spacing, sigmas, start, partial(self.run, sigmas=sigmas))

    def sigmas(self, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
        """The levels of a run of `steps` steps, float64 [steps + 1], descending, as in the matching diffusers class.

        spacing: one of SPACINGS or LEVEL_SPACINGS instead of what the model's config says. The last level is 0, or the
        lowest of the schedule where the config says set_alpha_to_one false (ddim) or final_sigmas_type "sigma_min".
        diffusers differs in four places, where it is inconsistent: its DDIM steps to t - T // n, which for linspace
        (and for trailing, where n does not divide T) is not the timestep it visits next; its one step of linspace
        starts at timestep 0; floating point can give its trailing one step too many; it rounds the timesteps of
        DPM++'s and UniPC's Karras levels. Raises GazeError for an unknown spacing, and for steps < 1 or more than the
        distinct levels there are.
        """
        options, total = self._options(schedule), len(schedule.sigmas_T)
        of_timesteps, of_levels = self._spacings(options, spacing)
        if not 1 <= steps <= total:
            raise GazeError(f"{steps} sampling steps: this model has 1 to {total}", "20 to 50 steps")
        points = steps + (self.spare and of_timesteps != "trailing")
        timesteps = spaced_timesteps(of_timesteps, total, points, options.get("steps_offset", 0))[:steps]
        sigmas = schedule.sigma(timesteps.round() if self.whole else timesteps)
        if of_levels is not None:
            span = schedule.sigmas_T.flip(0) if self.full_range else sigmas
            sigmas = spaced_sigmas(of_levels, span[0].item(), span[-1].item(), steps)
        if not bool((sigmas.diff() < 0).all()):
            raise GazeError(f"{steps} sampling steps are too many for {self.name} with {of_timesteps} spacing",
                            f"fewer steps, such as {total // 2}")  # fmt: skip
        lowest = options.get("final_sigmas_type") == "sigma_min" or options.get("set_alpha_to_one") is False
        return torch.cat([sigmas, schedule.sigmas_T[:1] * lowest])

    def start(self, schedule: NoiseSchedule, sigmas: Tensor, spacing: str | None = None) -> float:
        """The factor on noise of unit variance that gives x at level sigmas[0].

        sqrt(1 + sigma^2) is the variance of noise plus a picture of unit variance. diffusers' Euler, Heun and ancestral
        classes start from sigma alone (but for leading), its other classes never.
        """
        of_timesteps, _ = self._spacings(self._options(schedule), spacing)
        sigma = float(sigmas[0])
        return math.hypot(1, sigma) if self.unit_start or of_timesteps == "leading" else sigma

    def _options(self, schedule: NoiseSchedule) -> dict[str, Any]:
        return {option: schedule.config.get(option, default) for option, default in self.options.items()}

    @staticmethod
    def _spacings(options: Mapping[str, Any], asked: str | None) -> tuple[str, str | None]:
        """Of the timesteps, and of the levels between their ends where those are not the timesteps' own."""
        if asked in SPACINGS:
            return asked, None
        configured = next((name for name in LEVEL_SPACINGS if options.get(f"use_{name}_sigmas")), None)
        return options.get("timestep_spacing", "trailing"), asked or configured

    def calls(self, steps: int) -> int:
        """How many times a run of `steps` steps to level 0 calls the denoiser."""
        return self.calls_per_step * (steps - 1) + 1


LEVELS = {"timestep_spacing": "linspace", "steps_offset": 0}
LEVELS_DDIM = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
LEVELS_HEUN = {**LEVELS, **{f"use_{spacing}_sigmas": False for spacing in LEVEL_SPACINGS}}
LEVELS_EULER = {**LEVELS_HEUN, "final_sigmas_type": "zero"}
# diffusers' DPM-Solver++ and UniPC agree about all that is not the method.
multistep = partial(Sampler, options=LEVELS_EULER, whole=True, spare=True, full_range=True, unit_start=True)

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", partial(euler_ancestral, eta=0.0), LEVELS_DDIM, whole=True, unit_start=True),
        Sampler("euler", euler, LEVELS_EULER),
        Sampler("euler_ancestral", euler_ancestral, LEVELS, stochastic=True),
        Sampler("heun", heun, LEVELS_HEUN, order=2, calls_per_step=2),
        multistep("dpmpp_2m", dpmpp_2m, order=2),
        multistep("dpmpp_2m_sde", partial(dpmpp_2m, eta=1.0), order=2, stochastic=True),
        multistep("dpmpp_3m_sde", dpmpp_3m_sde, order=2, stochastic=True),
        multistep("unipc", unipc, order=2),
        # Trailing whatever the model's config says: consistency models are trained on those timesteps.
        Sampler("lcm", lcm, {}, whole=True, unit_start=True, stochastic=True),
    )
}


def sampler(name: str) -> Sampler:
    """The sampler of that name; GazeError with the nearest name for an unknown one."""
    if name not in SAMPLERS:
        raise GazeError(f"unknown sampler {name!r}", nearest(name, SAMPLERS))
    return SAMPLERS[name]
