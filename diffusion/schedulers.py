"""Every sampler by name, with its options, and any diffusers scheduler object as a sampler.

diffusers is imported only when one of its classes is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from .driver import driven, first_line
from .errors import GazeError, nearest
from .foreign import EDM_FOREIGN, FLOW_FOREIGN, FOREIGN, MISFITS, Foreign, of_class
from .noise import EDMSchedule, FlowSchedule, NoiseSchedule, shift_of
from .samplers import EDM_SAMPLERS, FLOW_SAMPLERS, SAMPLERS, Sampler, Trajectory
from .scheduler_config import (
    EDM,
    FLOW,
    MOST,
    PREDICTION_TYPES,
    check_options,
    kind_of,
    of_method,
)
from .spacing import LEVEL_SPACINGS, SPACINGS

# Arguments of a scheduler's `step` that are not options of the method.
DATA = {"self", "model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"}
# Options that belong to the model: its table of noise levels.
OF_MODEL = {"beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "rescale_betas_zero_snr", "trained_betas"}
# The options of our methods, which begin at 0: eta and s_churn are no noise there, s_tmin and s_tmax are noise levels.
LIMITS = {"eta": 1, "s_churn": MOST, "s_noise": 2, "s_tmin": math.inf, "s_tmax": math.inf}
LONGEST = 500  # characters of a name with its options


class Kind(NamedTuple):
    """What fits one kind of model.

    words: what the kind is called. its: what its schedulers do, which is why they do not fit the other kind.
    samplers, foreign: by name. classes: of diffusers, by their own names. own: the samplers that do what a class does.
    """

    words: str
    its: str
    samplers: Mapping[str, Sampler]
    foreign: Mapping[str, Foreign]
    classes: Mapping[str, Foreign]
    own: Mapping[str, str]


TABLE = Kind(
    "a model with a table of noise levels",
    "it steps through a table of noise levels",
    SAMPLERS,
    FOREIGN,
    of_class(FOREIGN),
    # PNDM's solver is not among ours; it shares ddim's schedule.
    {
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddim",
        "DPMSolverMultistepScheduler": "dpmpp_2m",
        "EulerAncestralDiscreteScheduler": "euler_ancestral",
        "EulerDiscreteScheduler": "euler",
        "HeunDiscreteScheduler": "heun",
        "LMSDiscreteScheduler": "euler",
        "PNDMScheduler": "ddim",
        "UniPCMultistepScheduler": "unipc",
    },
)
FLOWS = Kind(
    "a flow-matching model",
    "it integrates a flow-matching model",
    FLOW_SAMPLERS,
    FLOW_FOREIGN,
    of_class(FLOW_FOREIGN),
    # The solvers are not among them: diffusers' tell the network whole timesteps, ours the exact ones.
    {
        "FlowMatchEulerDiscreteScheduler": "euler",
        "FlowMatchHeunDiscreteScheduler": "heun",
        "FlowMatchLCMScheduler": "lcm",
    },
)
EDMS = Kind(
    "a model with EDM's scalings",
    "it is for networks with EDM's own scalings",
    EDM_SAMPLERS,
    EDM_FOREIGN,
    of_class(EDM_FOREIGN),
    {"EDMDPMSolverMultistepScheduler": "dpmpp_2m", "EDMEulerScheduler": "euler"},
)
KINDS = ((TABLE, PREDICTION_TYPES), (FLOWS, (FLOW,)), (EDMS, (EDM,)))  # with what their models predict


def prepare(scheduler: Any, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Trajectory:
    """The sampler that `scheduler` names or is, made ready for a model's schedule and a number of steps.

    scheduler: the name of a sampler or of a diffusers class that fits the model, with options as in
        "ddim:eta=0.5,steps_offset=1"; or a diffusers scheduler object, which is copied and never changed.
    spacing: one of SPACINGS or LEVEL_SPACINGS, or "linear" for "linspace"; None leaves it to the model and the options.
    Raises GazeError for an unknown name, option or spacing, a scheduler that does not fit the model, and a number of
    steps that it cannot do.
    """
    spacing = "linspace" if spacing == "linear" else spacing
    if spacing is not None and spacing not in (*SPACINGS, *LEVEL_SPACINGS):
        raise GazeError(
            f"unknown spacing {spacing!r}", nearest(str(spacing), {"linear", *SPACINGS, *LEVEL_SPACINGS} - {"linspace"})
        )
    if not isinstance(scheduler, str):
        return _of_object(scheduler, schedule, steps, spacing)
    if len(scheduler) > LONGEST:
        raise GazeError(f"a scheduler's name has {len(scheduler)} characters", f"at most {LONGEST}")
    name, _, text = scheduler.partition(":")
    kind = _kind(schedule)
    if name in kind.samplers:
        return _own(kind.samplers[name], text, schedule, steps, spacing)
    row = kind.foreign.get(name) or kind.classes.get(name)
    if row is None:
        raise _unknown(name, kind)
    made, extra = _make(name, row, text, schedule, spacing)
    return driven(scheduler, row, made, extra, schedule, steps, spacing)


def default_name(class_name: str, config: Mapping[str, Any]) -> str:
    """The sampler that a model's folder asks for by class and scheduler_config.json: ours, where it does what all the
    options say, else the class. Raises GazeError for a class that does not fit."""
    kind = {FLOW: FLOWS, EDM: EDMS}.get(kind_of(dict(config)), TABLE)
    if class_name not in kind.classes:
        raise _unknown(class_name, kind)
    honoured = all(config.get(option, values[0]) in values for option, values in of_method(dict(config)).items())
    return kind.own[class_name] if class_name in kind.own and honoured else class_name


def table() -> list[dict[str, Any]]:
    """Every name, ours first: its diffusers class, order (the lower, where kinds of models have two), network calls for
    n steps, whether it adds noise, the prediction types of the models that it fits, and what has to be installed."""
    formulas = {(2, 3): "n", (3, 5): "2n - 1", (3, 4): "n + 1"}  # by the calls for 2 and for 3 steps
    methods: list[tuple[str, str, str, Sampler | Foreign]] = [
        *((name, "", "", method) for name, method in TABLE.samplers.items()),
        *(
            (name, row.class_name, row.needs, row)
            for name, row in sorted({**EDM_FOREIGN, **FLOW_FOREIGN, **FOREIGN}.items())
        ),
    ]
    return [
        {
            "name": name,
            "class": class_name,
            "order": min(row[name].order for kind, _ in KINDS for row in (kind.samplers, kind.foreign) if name in row),
            "calls": formulas[method.calls(2), method.calls(3)],
            "stochastic": method.stochastic,
            "prediction_types": [
                output for kind, outputs in KINDS for output in outputs if name in kind.samplers or name in kind.foreign
            ],
            "needs": needs,
        }
        for name, class_name, needs, method in methods
    ]


def _kind(schedule: NoiseSchedule) -> Kind:
    return {FlowSchedule: FLOWS, EDMSchedule: EDMS}.get(type(schedule), TABLE)


def _unknown(name: str, kind: Kind) -> GazeError:
    others = [other.its for other, _ in KINDS if name in other.foreign or name in other.classes]
    reason = others[0] if others else MISFITS.get(name)
    if reason is None:
        return GazeError(f"unknown scheduler {name!r}", nearest(name, {*kind.samplers, *kind.foreign, *kind.classes}))
    return GazeError(
        f"{name} does not fit {kind.words}: {reason}", f"one of {', '.join([*kind.samplers, *kind.foreign])}"
    )


def _own(method: Sampler, text: str, schedule: NoiseSchedule, steps: int, spacing: str | None) -> Trajectory:
    """One of our samplers, with options of the method (eta) and of the levels (those of scheduler_config.json)."""
    of_method = _parameters(method.integrate, keep=lambda parameter: parameter.kind is parameter.KEYWORD_ONLY)
    chosen = _options(method.name, text, {**method.options, **of_method})
    of_levels = {option: value for option, value in chosen.items() if option in method.options}
    check_options({**schedule.config, **of_levels})
    settings = {option: value for option, value in chosen.items() if option in of_method}
    for option, value in settings.items():
        if not 0 <= value <= LIMITS[option]:
            raise GazeError(f"{method.name}: {option} is {value}", f"{option} from 0 to {LIMITS[option]}")
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
        parameters = _class_options(row)
        of_step = _parameters(scheduler_class.step, keep=lambda parameter: parameter.name not in DATA)
        free = {option: value for option, value in {**of_step, **parameters}.items() if option not in OF_MODEL}
        chosen = _options(name, text, free)
        # What belongs to a method says nothing about another one.
        methods = of_method(schedule.config).keys()
        foreign = set() if schedule.config.get("_class_name") == row.class_name else methods
        config = {key: value for key, value in schedule.config.items() if key not in foreign}
        config |= {"prediction_type": schedule.prediction_type, "clip_sample": False, **row.options}
        if isinstance(schedule, FlowSchedule):
            shift = shift_of(schedule.config)
            config |= {"use_flow_sigmas": True, "shift": shift, "flow_shift": shift}
        if config["prediction_type"] not in row.outputs:
            config["prediction_type"] = "epsilon"
        config = {key: value for key, value in config.items() if key in parameters}
        if isinstance(config.get("lambda_min_clipped"), str):
            config["lambda_min_clipped"] = -math.inf
        config |= _spacing_options(name, row, spacing, parameters)
        config |= {key: value for key, value in chosen.items() if key in parameters}
        made = scheduler_class.from_config(config)
    except GazeError:
        raise
    except Exception as error:
        hint = f"pip install {row.needs.replace(' and', '')}" if isinstance(error, ImportError) else "other options"
        raise GazeError(f"{name} cannot be made: {first_line(error)}", hint) from error
    return made, {key: value for key, value in chosen.items() if key not in parameters}


def _of_object(given: Any, schedule: NoiseSchedule, steps: int, spacing: str | None) -> Trajectory:
    """A copy of the caller's diffusers scheduler, by whichever of its classes is known here."""
    classes = [base.__name__ for base in type(given).__mro__]
    kind = _kind(schedule)
    row = next((kind.classes[name] for name in classes if name in kind.classes), None)
    if row is None:
        known = {**TABLE.classes, **FLOWS.classes, **EDMS.classes, **MISFITS}
        misfit = next((name for name in classes if name in known), None)
        raise _unknown(repr(classes[0]) if misfit is None else misfit, kind)
    scheduler, read = copy.deepcopy(given), _class_options(row)
    if spacing is not None:
        scheduler = type(given).from_config(given.config, **_spacing_options(classes[0], row, spacing, read))
    usual, _ = _make(classes[0], row, "", schedule, spacing)
    changed = [
        key for key in read if key in scheduler.config and scheduler.config[key] != usual.config.get(key, read[key])
    ]
    options = ",".join(f"{key}={_text(scheduler.config[key])}" for key in changed)
    name = f"{classes[0]}:{options}" if options else classes[0]
    return driven(name, row, scheduler, {}, schedule, steps, spacing)


def _parameters(
    function: Callable[..., Any], keep: Callable[[inspect.Parameter], bool] = lambda parameter: True
) -> dict[str, Any]:
    """The arguments of a function or class that have a default, with it."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and keep(p)}


def _class_options(row: Foreign) -> dict[str, Any]:
    """The options of a diffusers class, with its defaults, those that it hands on among them."""
    library = importlib.import_module("diffusers")
    classes = [getattr(library, name) for name in (row.levels_of, row.class_name) if name]
    return {option: default for each in classes for option, default in _parameters(each).items()}


def _spacing_options(name: str, row: Foreign, spacing: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a diffusers class that ask for a spacing."""
    if spacing is None:
        return {}
    options: dict[str, Any] = {f"use_{level}_sigmas": level == spacing for level in LEVEL_SPACINGS}
    if spacing in SPACINGS:
        options["timestep_spacing"] = spacing
    has = [level for level in row.levels if f"use_{level}_sigmas" in parameters]
    has += row.spacings if "timestep_spacing" in parameters else ()
    if spacing not in has:
        reads = row.spacings and spacing in {*SPACINGS} - {*row.spacings}
        problem = "does not converge with" if reads else "has no"
        raise GazeError(f"{name} {problem} {spacing} spacing", f"one of {', '.join([*has, 'its own'])}")
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
