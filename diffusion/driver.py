"""Any diffusers scheduler as a sampler: driven through the same function (x, sigma) -> clean as those of samplers.py.

It asks for the network's output, which follows from the clean picture, so guidance and prediction types are the
denoiser's affair. Objects hold state; each run has a copy.

Shape letters: B batch, C channels, H W latent size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import GazeError
from .foreign import Foreign
from .methods import Denoise, Step
from .noise import EDMSchedule, FlowSchedule, NoiseSchedule
from .samplers import PictureNoise, Trajectory, check_steps
from .scheduler_config import FIXED


def driven(
    name: str,
    row: Foreign,
    scheduler: Any,
    options: Mapping[str, Any],
    schedule: NoiseSchedule,
    steps: int,
    spacing: str | None,
) -> Trajectory:
    """A diffusers scheduler made ready: checked against the model, its timesteps set, after one run on a number.

    scheduler: the caller's own copy; it is changed. options: further arguments of its step. Raises GazeError for what
    would fail or give noise.
    """
    _check_fit(name, row, scheduler, schedule)
    check_steps(steps, schedule)
    noise = PictureNoise([torch.Generator().manual_seed(0)], (1, 1, 1))
    try:
        scheduler.set_timesteps(steps)
        timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
        sigmas = torch.cat([schedule.sigma(timesteps), torch.zeros(1, dtype=torch.float64)])
        run = partial(drive, scheduler, sigmas=sigmas, schedule=schedule, exploding=row.exploding, options=options)
        start = float(getattr(scheduler, "init_noise_sigma", 1.0) / _frame(schedule, sigmas[0], row.exploding))
        # The classes find out in the middle of a run what they cannot do, some without an error.
        with torch.no_grad():
            path = [step.x_BCHW for step in run(lambda x, sigma: x / (1 + sigma**2), noise() * start, noise=noise)]
    except Exception as error:
        raise GazeError(f"{name} cannot do {steps} steps: {first_line(error)}", "other steps or options") from error
    outside = isinstance(schedule, FlowSchedule) and scheduler.sigmas.max() > 1
    outside |= not isinstance(schedule, EDMSchedule) and bool(timesteps.min() < 0)
    if outside or not all(bool(x.isfinite().all()) for x in path):
        raise GazeError(f"{name} does not work for {steps} steps: numbers that are not finite, or levels out of range",
                        "other steps, spacing or options")  # fmt: skip
    return Trajectory(name, steps, spacing, sigmas, start, run, row.calls_per_step)


def _check_fit(name: str, row: Foreign, scheduler: Any, schedule: NoiseSchedule) -> None:
    """Raises GazeError where the scheduler would run without an error and give noise."""
    config = scheduler.config
    for option, supported in (
        ("prediction_type", row.outputs),
        ("use_flow_sigmas", (isinstance(schedule, FlowSchedule),)),
        *FIXED.items(),
    ):
        if config.get(option, supported[0]) not in supported:
            raise GazeError(f"{name} has {option} {config[option]!r}, which does not fit this model",
                            f"{option} {' or '.join(map(repr, supported))}")  # fmt: skip
    if not _same_levels(scheduler, schedule):
        raise GazeError(f"{name} is made for other noise levels than this model's",
                        f"{row.class_name}.from_config(pipe.model.schedule.config), or a class that has the model's"
                        " beta_schedule and rescale_betas_zero_snr")  # fmt: skip


def _same_levels(scheduler: Any, schedule: NoiseSchedule) -> bool:
    """Whether a timestep means the same to the scheduler and to the model."""
    if isinstance(schedule, FlowSchedule):
        return bool(scheduler.config.num_train_timesteps == len(schedule.sigmas_T))
    if isinstance(schedule, EDMSchedule):
        return bool(scheduler.config.sigma_data == schedule.sigma_data)
    signal_T = 1 / (1 + schedule.sigmas_T**2)
    theirs_T = scheduler.alphas_cumprod.double().cpu()
    return theirs_T.shape == signal_T.shape and bool((theirs_T - signal_T).abs().max() <= 1e-5)


def _frame(schedule: NoiseSchedule, sigma: Tensor, exploding: bool) -> Tensor:
    """The factor from clean + sigma * noise to the x of a scheduler."""
    return torch.ones_like(sigma) if exploding else schedule.scaling(sigma).c_in


def drive(
    scheduler: Any,
    denoise: Denoise,
    x_BCHW: Tensor,
    sigmas: Tensor,
    noise: PictureNoise,
    *,
    schedule: NoiseSchedule,
    exploding: bool,
    options: Mapping[str, Any],
) -> Iterator[Step]:
    """Runs a copy of a diffusers scheduler whose timesteps are set, yielding a Step at every network call.

    x_BCHW: clean + sigma * noise at sigmas[0]. sigmas: the model's levels of the timesteps, or of the last of them, and
    0 for the end, where diffusers takes what is there for the picture. schedule: the model's. options: further
    arguments of the scheduler's step.
    """
    scheduler = copy.deepcopy(scheduler)
    arguments = dict(options)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = list(noise.generators)
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = [generator.initial_seed() for generator in noise.generators]
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    begin = len(scheduler.timesteps) + 1 - len(levels)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # else a first timestep that occurs twice is taken for the second one
    x = x_BCHW * _frame(schedule, levels[0], exploding)
    order = inspect.signature(scheduler.step).parameters.get("order")
    for done, (timestep, (sigma, lower)) in enumerate(
        zip(scheduler.timesteps[begin:], pairwise(levels), strict=True), start=1
    ):
        if order is not None:  # LMS reckons with the slopes of steps before the first one, too
            arguments["order"] = min(options.get("order", order.default), done)
        # Whatever the frame of x, the network's input is the same. Flow schedulers have no method to scale it.
        input_BCHW = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        noisy_BCHW = input_BCHW / schedule.scaling(sigma).c_in
        clean_BCHW = denoise(noisy_BCHW, sigma.item())
        c_skip, c_out, _ = schedule.scaling(sigma, scheduler.config.get("prediction_type"))
        output_BCHW = (clean_BCHW - c_skip * noisy_BCHW) / c_out
        x = scheduler.step(output_BCHW, timestep, x, **arguments).prev_sample
        yield Step(x / _frame(schedule, lower, exploding), clean_BCHW, lower.item())


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 200 characters, or what it is."""
    return next(iter(str(error).split("\n", 2)), "").strip()[:200] or type(error).__name__
