"""Every sampler by name, and any diffusers scheduler object as a sampler.

A diffusers scheduler is driven through the same function (x, sigma) -> clean as the methods of samplers.py: it asks for
the network's output, which follows from the clean picture, so guidance and prediction types are the denoiser's affair.
Objects hold state; each run has a copy. diffusers is imported only when one of its classes is asked for.

Shape letters: B batch, C channels, H W latent size.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import GazeError, nearest
from .foreign import FOREIGN, MISFITS, OF_CLASS, Foreign
from .noise import LEVEL_SPACINGS, METHOD, MOST, PREDICTION_TYPES, SPACINGS, NoiseSchedule, check_options, scaling
from .samplers import SAMPLERS, Denoise, PictureNoise, Sampler, Step, Trajectory

# Arguments of a scheduler's `step` that are not options of the method.
DATA = {"self", "model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"}
# Options that belong to the model: its table of noise levels.
TABLE = {"beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "rescale_betas_zero_snr", "trained_betas"}
LONGEST = 500  # characters of a name with its options

# The samplers of this package that do what the class does. PNDM's solver is not among them; it shares ddim's schedule.
OWN_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "euler",
    "PNDMScheduler": "ddim",
    "UniPCMultistepScheduler": "unipc",
}


def prepare(scheduler: Any, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Trajectory:
    """The sampler that `scheduler` names or is, made ready for a model's schedule and a number of steps.

    scheduler: a name of SAMPLERS or FOREIGN or a diffusers class name, with options as in
        "ddim:eta=0.5,steps_offset=1"; or a diffusers scheduler object, which is copied and never changed.
    spacing: one of SPACINGS or LEVEL_SPACINGS, or "linear" for "linspace"; None leaves it to the model and the options.
    Raises GazeError for an unknown name, option or spacing, a scheduler that does not fit the model, and a number of
    steps that it cannot do.
    """
    spacing = "linspace" if spacing == "linear" else spacing
    if spacing is not None and spacing not in (*SPACINGS, *LEVEL_SPACINGS):
        raise GazeError(f"unknown spacing {spacing!r}", nearest(str(spacing), (*SPACINGS, *LEVEL_SPACINGS)))
    if not isinstance(scheduler, str):
        return _of_object(scheduler, schedule, steps, spacing)
    if len(scheduler) > LONGEST:
        raise GazeError(f"a scheduler's name has {len(scheduler)} characters", f"at most {LONGEST}")
    name, _, text = scheduler.partition(":")
    if name in SAMPLERS:
        return _own(SAMPLERS[name], text, schedule, steps, spacing)
    row = FOREIGN.get(name) or OF_CLASS.get(name)
    if row is None:
        raise _unknown(name)
    made, extra = _make(name, row, text, schedule, spacing)
    return _trajectory(scheduler, row, made, extra, schedule, steps, spacing)


def default_name(class_name: str, config: Mapping[str, Any]) -> str:
    """The sampler that a model's folder asks for by class and scheduler_config.json: ours, where it does what all the
    options say, else the class. Raises GazeError for a class that does not fit."""
    if class_name not in OF_CLASS:
        raise _unknown(class_name)
    honoured = all(config.get(option, values[0]) in values for option, values in METHOD.items())
    return OWN_OF_CLASS[class_name] if class_name in OWN_OF_CLASS and honoured else class_name


def table() -> list[dict[str, Any]]:
    """Every name, ours first: its diffusers class, order, network calls for n steps, whether it adds noise, the
    prediction types of the models that it fits, and what has to be installed for it."""
    formulas = {(2, 3): "n", (3, 5): "2n - 1", (3, 4): "n + 1"}  # by the calls for 2 and for 3 steps
    methods: list[tuple[str, str, str, Sampler | Foreign]] = [
        *((name, "", "", method) for name, method in SAMPLERS.items()),
        *((name, row.class_name, row.needs, row) for name, row in FOREIGN.items()),
    ]
    return [
        {
            "name": name,
            "class": class_name,
            "order": method.order,
            "calls": formulas[method.calls(2), method.calls(3)],
            "stochastic": method.stochastic,
            "prediction_types": list(PREDICTION_TYPES),
            "needs": needs,
        }
        for name, class_name, needs, method in methods
    ]


def _unknown(name: str) -> GazeError:
    if name in MISFITS:
        fitting = f"one of {', '.join([*SAMPLERS, *FOREIGN])}"
        return GazeError(f"{name} does not fit a model with a table of noise levels: {MISFITS[name]}", fitting)
    return GazeError(f"unknown scheduler {name!r}", nearest(name, {*SAMPLERS, *FOREIGN, *OF_CLASS}))


def _own(method: Sampler, text: str, schedule: NoiseSchedule, steps: int, spacing: str | None) -> Trajectory:
    """One of our samplers, with options of the method (eta) and of the levels (those of scheduler_config.json)."""
    of_method = _parameters(method.integrate, keep=lambda parameter: parameter.kind is parameter.KEYWORD_ONLY)
    chosen = _options(method.name, text, {**method.options, **of_method})
    of_levels = {option: value for option, value in chosen.items() if option in method.options}
    check_options(of_levels)
    settings = {option: value for option, value in chosen.items() if option in of_method}
    for option, value in settings.items():
        if not 0 <= value <= 1:
            raise GazeError(f"{method.name}: {option} is {value}", f"{option} from 0 (no noise) to 1")
    if chosen:
        schedule = dataclasses.replace(schedule, config=schedule.config | of_levels)
        method = dataclasses.replace(
            method, name=f"{method.name}:{text}", integrate=partial(method.integrate, **settings)
        )
    return method.prepare(schedule, steps, spacing)


def _make(
    name: str, row: Foreign, text: str, schedule: NoiseSchedule, spacing: str | None
) -> tuple[Any, dict[str, Any]]:
    """A diffusers scheduler for this model's schedule, and the options that go to each of its steps.

    Options count in this order: the class's defaults, the model's config, the name, the spacing, the user's.
    """
    try:
        scheduler_class = getattr(importlib.import_module("diffusers"), row.class_name)
        parameters = _parameters(scheduler_class)
        of_step = _parameters(scheduler_class.step, keep=lambda parameter: parameter.name not in DATA)
        free = {option: value for option, value in {**of_step, **parameters}.items() if option not in TABLE}
        chosen = _options(name, text, free)
        # What belongs to a method says nothing about another one.
        foreign = set() if schedule.config.get("_class_name") == row.class_name else METHOD.keys()
        config = {key: value for key, value in schedule.config.items() if key not in foreign}
        config |= {"prediction_type": schedule.prediction_type, "clip_sample": False, **row.options}
        if config["prediction_type"] not in row.outputs:
            config["prediction_type"] = "epsilon"
        config = {key: value for key, value in config.items() if key in parameters}
        if isinstance(config.get("lambda_min_clipped"), str):
            config["lambda_min_clipped"] = -math.inf
        config |= _spacing_options(name, row, spacing, parameters)
        config |= {key: value for key, value in chosen.items() if key in parameters}
        made = scheduler_class(**config)
    except GazeError:
        raise
    except Exception as error:
        hint = f"pip install {row.needs.replace(' and', '')}" if isinstance(error, ImportError) else "other options"
        raise GazeError(f"{name} cannot be made: {_first_line(error)}", hint) from error
    return made, {key: value for key, value in chosen.items() if key not in parameters}


def _of_object(given: Any, schedule: NoiseSchedule, steps: int, spacing: str | None) -> Trajectory:
    """A copy of the caller's diffusers scheduler, by whichever of its classes is known here."""
    classes = [base.__name__ for base in type(given).__mro__]
    row = next((OF_CLASS[name] for name in classes if name in OF_CLASS), None)
    if row is None:
        misfit = next((name for name in classes if name in MISFITS), None)
        raise _unknown(repr(classes[0]) if misfit is None else misfit)
    scheduler = copy.deepcopy(given)
    if spacing is not None:
        parameters = _parameters(type(given))
        scheduler = type(given).from_config(given.config, **_spacing_options(classes[0], row, spacing, parameters))
    usual, _ = _make(classes[0], row, "", schedule, spacing)
    read = _parameters(type(usual))
    changed = [key for key in read if key in scheduler.config and scheduler.config[key] != usual.config[key]]
    options = ",".join(f"{key}={_text(scheduler.config[key])}" for key in changed)
    name = f"{classes[0]}:{options}" if options else classes[0]
    return _trajectory(name, row, scheduler, {}, schedule, steps, spacing)


def _trajectory(
    name: str,
    row: Foreign,
    scheduler: Any,
    extra: dict[str, Any],
    schedule: NoiseSchedule,
    steps: int,
    spacing: str | None,
) -> Trajectory:
    """A scheduler of our own copy, checked against the model, with its timesteps set, after one run on a number."""
    _check_fit(name, row, scheduler, schedule)
    total = len(schedule.sigmas_T)
    if not 1 <= steps <= total:
        raise GazeError(f"{steps} sampling steps: this model has 1 to {total}", "20 to 50 steps")
    noise = PictureNoise([torch.Generator().manual_seed(0)], (1, 1, 1))
    try:
        scheduler.set_timesteps(steps)
        timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
        sigmas = torch.cat([schedule.sigma(timesteps), torch.zeros(1, dtype=torch.float64)])
        run = partial(drive, scheduler, exploding=row.exploding, options=extra, sigmas=sigmas)
        start = float(scheduler.init_noise_sigma) * (1 if row.exploding else math.hypot(1, sigmas[0]))
        # The classes find out in the middle of a run what they cannot do, some without an error.
        with torch.no_grad():
            path = [step.x_BCHW for step in run(lambda x, sigma: x / (1 + sigma**2), noise() * start, noise=noise)]
    except Exception as error:
        raise GazeError(f"{name} cannot do {steps} steps: {_first_line(error)}", "other steps or options") from error
    if timesteps.min() < 0 or not all(bool(x.isfinite().all()) for x in path):
        raise GazeError(f"{name} does not work for {steps} steps: numbers that are not finite, or timesteps below 0",
                        "other steps, spacing or options")  # fmt: skip
    return Trajectory(name, steps, spacing, sigmas, start, run, row.calls_per_step)


def _check_fit(name: str, row: Foreign, scheduler: Any, schedule: NoiseSchedule) -> None:
    """Raises GazeError where the scheduler would run without an error and give noise."""
    config = scheduler.config
    for option, supported in (
        ("prediction_type", row.outputs),
        ("use_flow_sigmas", (False,)),
        ("timestep_type", ("discrete",)),
    ):
        if config.get(option, supported[0]) not in supported:
            raise GazeError(f"{name} has {option} {config[option]!r}, which does not fit this model",
                            f"{option} {' or '.join(map(repr, supported))}")  # fmt: skip
    signal_T = 1 / (1 + schedule.sigmas_T**2)
    theirs_T = scheduler.alphas_cumprod.double().cpu()
    if theirs_T.shape != signal_T.shape or (theirs_T - signal_T).abs().max() > 1e-5:
        raise GazeError(f"{name} is made for other noise levels than this model's",
                        f"{row.class_name}.from_config(pipe.model.schedule.config), or a class that has the model's"
                        " beta_schedule and rescale_betas_zero_snr")  # fmt: skip


def drive(
    scheduler: Any,
    denoise: Denoise,
    x_BCHW: Tensor,
    sigmas: Tensor,
    noise: PictureNoise,
    *,
    exploding: bool,
    options: Mapping[str, Any],
) -> Iterator[Step]:
    """Runs a copy of a diffusers scheduler whose timesteps are set, yielding a Step at every network call.

    x_BCHW: clean + sigma * noise at sigmas[0]. sigmas: the model's levels of the timesteps, or of the last of them, and
    0 for the end, where diffusers takes what is there for the picture. options: further arguments of its step.
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
    x = x_BCHW if exploding else x_BCHW / math.hypot(1, levels[0])
    for timestep, (sigma, lower) in zip(scheduler.timesteps[begin:], pairwise(levels), strict=True):
        # Whatever the frame of x, the network's input has constant variance.
        noisy_BCHW = scheduler.scale_model_input(x, timestep) * math.hypot(1, sigma)
        clean_BCHW = denoise(noisy_BCHW, sigma.item())
        c_skip, c_out, _ = scaling(scheduler.config.prediction_type, sigma)
        output_BCHW = (clean_BCHW - c_skip * noisy_BCHW) / c_out
        x = scheduler.step(output_BCHW, timestep, x, **arguments).prev_sample
        yield Step(x if exploding else x * math.hypot(1, lower), clean_BCHW, lower.item())


def _parameters(
    function: Callable[..., Any], keep: Callable[[inspect.Parameter], bool] = lambda parameter: True
) -> dict[str, Any]:
    """The arguments of a function or class that have a default, with it."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and keep(p)}


def _spacing_options(name: str, row: Foreign, spacing: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a diffusers class that ask for a spacing."""
    if spacing is None:
        return {}
    options: dict[str, Any] = {f"use_{level}_sigmas": level == spacing for level in LEVEL_SPACINGS}
    if spacing in SPACINGS:
        options["timestep_spacing"] = spacing
    has = [level for level in LEVEL_SPACINGS if f"use_{level}_sigmas" in parameters]
    has += SPACINGS if "timestep_spacing" in parameters and not row.own_timesteps else ()
    if spacing not in has:
        raise GazeError(f"{name} has no {spacing} spacing", f"one of {', '.join([*has, 'its own'])}")
    return {option: value for option, value in options.items() if option in parameters}


def _options(name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options in "key=value,key=value", each of the type of its default. Raises GazeError."""
    options: dict[str, Any] = {}
    for pair in text.split(",") if text else ():
        key, equals, written = (part.strip() for part in pair.partition("="))
        if not equals:
            raise GazeError(f"{name}: {pair!r} is not an option", "name:key=value,key=value")
        if key not in defaults:
            raise GazeError(f"{name} has no option {key!r}", nearest(key, defaults))
        value, default = _value(written), defaults[key]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if (default is not None and type(value) is not type(default)) or (type(value) is int and abs(value) > MOST):
            raise GazeError(f"{name}: {key} is {written!r}", f"something like {_text(default)}")
        options[key] = value
    return options


def _value(text: str) -> Any:
    """A number, true, false, none, or else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null", "none": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def _text(value: Any) -> str:
    """What `_value` reads as this value."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).split("\n", 2)), "").strip()[:200] or type(error).__name__
