"""The options of diffusers' scheduler_config.json: read, fixed to a supported value, the method's, or ignored."""

import math
import reprlib
from collections.abc import Callable
from typing import Any

from .errors import GazeError, nearest
from .spacing import SPACINGS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of models with a table of noise levels
FLOW = "flow_prediction"  # of flow-matching models
EDM = "edm"  # of models with the scalings of Karras et al. 2022
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# The classes of diffusers whose scheduler_config.json is a table of noise levels, and the betas where it is silent.
DDPM_BETAS = ("linear", 0.0001, 0.02)
HEUN_BETAS = ("linear", 0.00085, 0.012)
LATENT_BETAS = ("scaled_linear", 0.00085, 0.012)
SCHEDULERS = {
    "DDIMParallelScheduler": DDPM_BETAS,
    "DDIMScheduler": DDPM_BETAS,
    "DDPMParallelScheduler": DDPM_BETAS,
    "DDPMScheduler": DDPM_BETAS,
    "DEISMultistepScheduler": DDPM_BETAS,
    "DPMSolverMultistepScheduler": DDPM_BETAS,
    "DPMSolverSDEScheduler": HEUN_BETAS,
    "DPMSolverSinglestepScheduler": DDPM_BETAS,
    "EulerAncestralDiscreteScheduler": DDPM_BETAS,
    "EulerDiscreteScheduler": DDPM_BETAS,
    "HeunDiscreteScheduler": HEUN_BETAS,
    "KDPM2AncestralDiscreteScheduler": HEUN_BETAS,
    "KDPM2DiscreteScheduler": HEUN_BETAS,
    "LCMScheduler": LATENT_BETAS,
    "LMSDiscreteScheduler": DDPM_BETAS,
    "PNDMScheduler": DDPM_BETAS,
    "SASolverScheduler": DDPM_BETAS,
    "TCDScheduler": LATENT_BETAS,
    "UniPCMultistepScheduler": DDPM_BETAS,
}
# Those of flow-matching models, and those that are both, by the options use_flow_sigmas and prediction_type.
FLOW_SCHEDULERS = (
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
FLOW_SOLVERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# Those of models with EDM's scalings.
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")

MOST = 100_000  # of a number in an option: some are sizes of what is allocated

# Options of a scheduler_config.json that are read, here or by the samplers.
READ = {
    "beta_end",
    "beta_schedule",
    "beta_start",
    "final_sigmas_type",
    "flow_shift",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "shift",
    "shift_terminal",
    "steps_offset",
    "timestep_spacing",
    "trained_betas",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
}
# Options that are read of these models alone; two of them are a method's in other classes.
OF_EDM = {"rho", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule"}
# Options that change what the network is told: only these values are supported.
FIXED: dict[str, tuple[Any, ...]] = {
    "invert_sigmas": (False,),
    "scale_factors": (None,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
}
# Options that are read, and their values: of every model, and of each kind.
CHOICES = {"beta_schedule": BETA_SCHEDULES, "final_sigmas_type": ("zero", "sigma_min"), "timestep_spacing": SPACINGS}
OF_TABLE = {"prediction_type": PREDICTION_TYPES, "shift_terminal": (None,), "use_flow_sigmas": (False,)}
FLOW_HINT = f"; a flow-matching model's solver has use_flow_sigmas and prediction_type {FLOW!r} together"
OF_FLOW = {"prediction_type": (FLOW,), "use_flow_sigmas": (True,)}
EDM_CHOICES = {"prediction_type": ("epsilon", "v_prediction"), "sigma_schedule": ("karras", "exponential")}
OF_KIND: dict[str, dict[str, tuple[Any, ...]]] = {"table": OF_TABLE, FLOW: OF_FLOW, EDM: EDM_CHOICES}
# Options of a method alone, and the values that the samplers of this package honour. With another one, the method of
# a model's folder is diffusers' own class (schedulers.py).
METHOD: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "disable_corrector": ([],),
    "eta": (1.0,),
    "euler_at_final": (False,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "s_noise": (1.0,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2"),
    "stochastic_sampling": (False,),
    "thresholding": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Options without an effect on the samplers of this package, and why; diffusers' classes are given theirs.
IGNORED = {
    "base_image_seq_len": "belongs to use_dynamic_shifting, which is refused",
    "base_shift": "belongs to use_dynamic_shifting, which is refused",
    "clip_sample": "latents have no bounds to clip to; diffusers' StableDiffusionPipeline switches it off too",
    "clip_sample_range": "belongs to clip_sample",
    "corrector_order": "belongs to SASolverScheduler alone",
    "dynamic_thresholding_ratio": "belongs to thresholding",
    "max_image_seq_len": "belongs to use_dynamic_shifting, which is refused",
    "max_shift": "belongs to use_dynamic_shifting, which is refused",
    "noise_sampler_seed": "every picture has a generator of its own",
    "original_inference_steps": "belongs to LCMScheduler and TCDScheduler alone",
    "predictor_order": "belongs to SASolverScheduler alone",
    "sample_max_value": "belongs to thresholding",
    "skip_prk_steps": "belongs to PNDMScheduler; the schedule is the same without it",
    "tau_func": "belongs to SASolverScheduler alone",
    "time_shift_type": "belongs to use_dynamic_shifting, which is refused",
    "timestep_scaling": "belongs to LCMScheduler and TCDScheduler alone",
    "upscale_mode": "belongs to scale_factors, which is refused",
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def _numbers(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) <= MOST and all(map(_number, value)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _above_zero(value: Any) -> bool:
    return _number(value) and value > 0


def _level(value: Any) -> bool:
    return _number(value) and value >= 1e-6


def _power(value: Any) -> bool:
    return _number(value) and 1 <= value <= 100


def _share(value: Any) -> bool:
    return value is None or (_number(value) and 0 < value < 1)


# What a value that is read has to be, where it is not one of a few.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta_end": (_above_zero, "a number above 0, such as 0.012"),
    "beta_start": (_above_zero, "a number above 0, such as 0.00085"),
    "flow_shift": (_above_zero, "a number above 0, such as 3"),
    "num_train_timesteps": (_whole, "a whole number, such as 1000"),
    "rho": (_power, "a number from 1 to 100, such as 7"),
    "shift": (_above_zero, "a number above 0, such as 3"),
    "shift_terminal": (_share, "a number between 0 and 1, or none"),
    "sigma_data": (_level, "a number from 1e-6, such as 0.5"),
    "sigma_max": (_level, "a number above sigma_min, such as 80"),
    "sigma_min": (_level, "a number from 1e-6, such as 0.002"),
    "steps_offset": (_whole, "a whole number from 0"),
    "trained_betas": (_numbers, "numbers between 0 and 1, or none"),
}


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler_config.json is a flow-matching model's, by its class or by what the class is told."""
    name = config.get("_class_name")
    told = config.get("use_flow_sigmas") is True and config.get("prediction_type") == FLOW
    return name in FLOW_SCHEDULERS or (told and name in (None, *FLOW_SOLVERS))


def is_edm(config: dict[str, Any]) -> bool:
    """Whether a scheduler_config.json is of a model with EDM's scalings."""
    return config.get("_class_name") in EDM_SCHEDULERS


def kind_of(config: dict[str, Any]) -> str:
    """Which kind of model a scheduler_config.json is of: FLOW, EDM or "table"."""
    return FLOW if is_flow(config) else EDM if is_edm(config) else "table"


def of_method(config: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Those of METHOD that say nothing about this model."""
    own = OF_EDM if is_edm(config) else set()
    return {option: values for option, values in METHOD.items() if option not in own}


def known_options() -> set[str]:
    """Those that a scheduler_config.json of some kind may have."""
    return {"_class_name", *READ, *OF_EDM, *FIXED, *METHOD, *IGNORED}


def check_options(config: dict[str, Any]) -> None:
    """Raise GazeError for the first option of a scheduler_config.json that no sampler could honour."""
    name = config.get("_class_name")
    known = (*SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS)
    if name not in (None, *known):
        raise GazeError(f"scheduler class {name!r:.100} is not supported: other noise, or an unknown one",
                        nearest(str(name), known))  # fmt: skip
    choices = FIXED | CHOICES | OF_KIND[kind_of(config)]
    read, methods = READ | (OF_EDM if is_edm(config) else set()), of_method(config)
    for option, value in config.items():
        if isinstance(value, int) and abs(value) > MOST:
            raise GazeError(f"scheduler option {option} is out of range", f"at most {MOST}")
        if option.startswith("_") or option in IGNORED or option in methods:
            continue
        if option not in read and option not in FIXED:
            raise GazeError(f"unknown scheduler option {option!r} (value {value!r})", nearest(option, read))
        valid, words = VALID.get(option, (None, ""))
        if valid is not None and not valid(value):
            raise GazeError(f"scheduler option {option} is {reprlib.repr(value)}", words)
        if option in choices and value not in choices[option]:
            supported = " or ".join(repr(choice) for choice in choices[option])
            hint = f"{option} = {supported}" + FLOW_HINT * (option in OF_FLOW and not is_flow(config))
            raise GazeError(f"scheduler option {option} = {reprlib.repr(value)} is not supported", hint)
