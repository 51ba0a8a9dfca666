"""Samplers: a method, the levels that it visits and where it starts, by name, made ready for a model.

Shape letters: B batch, C channels, H W latent size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import GazeError, nearest
from .methods import (
    Denoise,
    Method,
    Noise,
    Step,
    dpmpp_2m,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    flow_heun,
    heun,
    lcm,
    unipc,
)
from .noise import EDM_LEVELS, NoiseSchedule, flow_sigma, shift_of, shifted
from .spacing import LEVEL_SPACINGS, SPACINGS, spaced_sigmas, spaced_timesteps


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

    integrate: the method, one of the generators of methods.py.
    options: the options of scheduler_config.json that the class reads, with its defaults where a file is silent.
    whole: it visits whole timesteps only.
    spare: for leading and linspace it asks for one timestep more and leaves out the lowest.
    full_range: Karras levels span the schedule, not the spaced timesteps.
    unit_start: it starts as if the network's input x / sqrt(1 + sigma^2) were noise of unit variance.
    order: how fast the error falls with the step's length, rounded, as benchmarks/convergence.py measures it; of a
        stochastic method that of its formula without the noise.
    stochastic: it calls `noise`, if no option says otherwise.
    calls_per_step: network calls in each step but the last, which has one.
    """

    name: str
    integrate: Method
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
        check_steps(steps, schedule)
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


def check_steps(steps: int, schedule: NoiseSchedule) -> None:
    """Raises GazeError for fewer than one, or more than the model has timesteps."""
    total = len(schedule.sigmas_T)
    if not 1 <= steps <= total:
        raise GazeError(f"{steps} sampling steps: this model has 1 to {total}", "20 to 50 steps")


def flow_ramp(total: int, steps: int, shift: float) -> Tensor:
    """Times [steps] of diffusers' flow-matching classes: from 1 to the lowest trained on, evenly, before their shift.
    That lowest one is shifted already; the classes then shift it again."""
    return torch.linspace(1, shifted(torch.tensor(1 / total, dtype=torch.float64), shift), steps, dtype=torch.float64)


def solver_ramp(total: int, steps: int, shift: float) -> Tensor:
    """The same of its DPM-Solvers, for which pure noise is infinitely far away: from 1 - 1 / total towards 0."""
    return torch.linspace(1 - 1 / total, 0, steps + 1, dtype=torch.float64)[:-1]


def unipc_ramp(total: int, steps: int, shift: float) -> Tensor:
    """The same of its UniPC: from 1, held below it by 1e-6, towards 1 / total."""
    return torch.linspace(1, 1 / total, steps + 1, dtype=torch.float64)[:-1]


@dataclass(frozen=True)
class FlowSampler(Sampler):
    """A method for flow-matching models, with the levels of the diffusers class that matches it.

    ramp: (training timesteps, steps, shift) -> times in (0, 1] before the shift. latest: they are held at.
    """

    ramp: Callable[[int, int, float], Tensor] = flow_ramp
    latest: float = 1.0

    def sigmas(self, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
        """The levels of a run of `steps` steps, float64 [steps + 1], descending to 0.

        spacing: one of LEVEL_SPACINGS, which then choose the times between the first and the last, instead of what the
        model's config says, or "linspace" for none of them. Raises GazeError for another, and as `Sampler.sigmas`.
        """
        options, total, shift = self._options(schedule), len(schedule.sigmas_T), shift_of(schedule.config)
        _, of_levels = self._spacings(options, spacing)
        if spacing not in (None, "linspace", *LEVEL_SPACINGS):
            raise GazeError(f"flow-matching models have no {spacing} spacing",
                            f"one of {', '.join([*LEVEL_SPACINGS, 'linear'])}")  # fmt: skip
        check_steps(steps, schedule)
        times = shifted(self.ramp(total, steps, shift), shift)
        terminal = options["shift_terminal"]
        if terminal is not None:
            times = 1 - (1 - times) * ((1 - terminal) / (1 - times[-1]))
        if of_levels is not None:
            times = spaced_sigmas(of_levels, times[0].item(), times[-1].item(), steps)
        sigmas = torch.cat([flow_sigma(times.clamp(max=self.latest)), torch.zeros(1, dtype=torch.float64)])
        if not bool((sigmas.diff() < 0).all()):
            raise GazeError(f"{self.name} has no {steps} levels with these options", "other steps, shift or spacing")
        return sigmas

    def start(self, schedule: NoiseSchedule, sigmas: Tensor, spacing: str | None = None) -> float:
        """The factor on noise of unit variance that gives x at level sigmas[0]: the network's input is then that noise,
        as in diffusers, also where the first time is below 1."""
        return 1 + float(sigmas[0])


@dataclass(frozen=True)
class EDMSampler(Sampler):
    """A method for models with EDM's scalings, with the levels of diffusers' EDM classes."""

    def sigmas(self, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
        """The levels of a run of `steps` steps, float64 [steps + 1]: from sigma_max to sigma_min, then the last, which
        is 0 or sigma_min again.

        spacing: one of LEVEL_SPACINGS instead of what the model's config says. Raises GazeError for another, and as
        `Sampler.sigmas`.
        """
        options = self._options(schedule)
        if spacing not in (None, *LEVEL_SPACINGS):
            raise GazeError(f"models with EDM's scalings have no {spacing} spacing",
                            f"one of {', '.join(LEVEL_SPACINGS)}")  # fmt: skip
        check_steps(steps, schedule)
        low, high = float(options["sigma_min"]), float(options["sigma_max"])
        if spacing is None:
            sigmas = spaced_sigmas(options["sigma_schedule"], high, low, steps, float(options["rho"]))
        else:
            sigmas = spaced_sigmas(spacing, high, low, steps)
        if not bool((sigmas.diff() < 0).all()):
            raise GazeError(f"{self.name} has no {steps} levels from {high} to {low}", "sigma_min below sigma_max")
        return torch.cat([sigmas, sigmas[-1:] * (options["final_sigmas_type"] == "sigma_min")])


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
        multistep("unipc", unipc, order=3),
        # Trailing whatever the model's config says: consistency models are trained on those timesteps.
        Sampler("lcm", lcm, {}, whole=True, unit_start=True, stochastic=True),
    )
}


LEVELS_FLOW = {"shift": 1.0, "shift_terminal": None, **{f"use_{spacing}_sigmas": False for spacing in LEVEL_SPACINGS}}
flow = partial(FlowSampler, options=LEVELS_FLOW)
solver = partial(flow, order=2, ramp=solver_ramp)

# What the matching classes of diffusers do with flow-matching models. In the variance exploding frame only Heun's
# method is another one: Euler's is the same in every frame, and the solvers know no other than the logarithm of sigma.
FLOW_SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        flow("ddim", partial(euler_ancestral, eta=0.0)),
        flow("euler", euler),
        flow("euler_ancestral", euler_ancestral, stochastic=True),
        flow("heun", flow_heun, order=2, calls_per_step=2),
        solver("dpmpp_2m", dpmpp_2m),
        solver("dpmpp_2m_sde", partial(dpmpp_2m, eta=1.0), stochastic=True),
        solver("dpmpp_3m_sde", dpmpp_3m_sde, stochastic=True),
        solver("unipc", unipc, ramp=unipc_ramp, latest=1 - 1e-6),
        flow("lcm", lcm, stochastic=True),
    )
}


edm = partial(EDMSampler, options={**EDM_LEVELS, "final_sigmas_type": "zero"}, unit_start=True)

# The same methods; order and calls are those of the frame, which is the same.
EDM_SAMPLERS = {
    name: edm(
        name,
        method.integrate,
        order=method.order,
        stochastic=method.stochastic,
        calls_per_step=method.calls_per_step,
    )
    for name, method in SAMPLERS.items()
}


def sampler(name: str) -> Sampler:
    """The sampler of that name; GazeError with the nearest name for an unknown one."""
    if name not in SAMPLERS:
        raise GazeError(f"unknown sampler {name!r}", nearest(name, SAMPLERS))
    return SAMPLERS[name]
