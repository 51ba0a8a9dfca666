"""Noise schedules: training timestep <-> noise level, spacings of levels, and what a network's output means.

Everything here is in the variance exploding frame: x = clean + sigma * noise. Stable Diffusion's own frame, of
constant variance, is x / sqrt(1 + sigma^2), which is exactly what c_in feeds to the network.

Shape letters: T training timesteps, N points asked for.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import GazeError, nearest

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")
# Levels between the ends of the spaced timesteps, in place of those that belong to the timesteps.
LEVEL_SPACINGS = ("beta", "exponential", "karras")

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

MOST = 100_000  # of a whole number in an option: some are sizes of what is allocated

# Options of a scheduler_config.json that are read, here or by the samplers.
READ = {
    "beta_end",
    "beta_schedule",
    "beta_start",
    "final_sigmas_type",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
    "trained_betas",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
}
# Options that change what the network is told: only these values are supported.
FIXED: dict[str, tuple[Any, ...]] = {
    "shift_terminal": (None,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
}
# Options of a method alone, and the values that the samplers of this package honour. With another one, the method of
# a model's folder is diffusers' own class (schedulers.py).
METHOD: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "disable_corrector": ([],),
    "euler_at_final": (False,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2"),
    "thresholding": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Options without an effect on the samplers of this package, and why; diffusers' classes are given theirs.
IGNORED = {
    "clip_sample": "latents have no bounds to clip to; diffusers' StableDiffusionPipeline switches it off too",
    "clip_sample_range": "belongs to clip_sample",
    "corrector_order": "belongs to SASolverScheduler alone",
    "dynamic_thresholding_ratio": "belongs to thresholding",
    "flow_shift": "belongs to use_flow_sigmas, which is refused",
    "noise_sampler_seed": "every picture has a generator of its own",
    "original_inference_steps": "belongs to LCMScheduler and TCDScheduler alone",
    "predictor_order": "belongs to SASolverScheduler alone",
    "sample_max_value": "belongs to thresholding",
    "skip_prk_steps": "belongs to PNDMScheduler; the schedule is the same without it",
    "tau_func": "belongs to SASolverScheduler alone",
    "time_shift_type": "belongs to use_dynamic_shifting, which is refused",
    "timestep_scaling": "belongs to LCMScheduler and TCDScheduler alone",
}


class Scaling(NamedTuple):
    """clean = c_skip * x + c_out * net(c_in * x), each tensor of the shape of sigma (Karras et al. 2022, eq. 7)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def scaling(prediction_type: str, sigma: Tensor) -> Scaling:
    """What a network's output means at noise level sigma >= 0 (any shape; the results have the same).

    "epsilon": the noise (Ho et al. 2020); "v_prediction": (noise - sigma * clean) / sqrt(1 + sigma^2) (Salimans & Ho
    2022, appendix D); "sample": the clean picture. Raises GazeError for another name.
    """
    c_in = torch.rsqrt(1 + sigma**2)
    if prediction_type == "epsilon":
        return Scaling(torch.ones_like(sigma), -sigma, c_in)
    if prediction_type == "v_prediction":
        return Scaling(c_in**2, -sigma * c_in, c_in)
    if prediction_type == "sample":
        return Scaling(torch.zeros_like(sigma), torch.ones_like(sigma), c_in)
    raise GazeError(f"unknown prediction_type {prediction_type!r}", nearest(prediction_type, PREDICTION_TYPES))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels that a model was trained on.

    sigmas_T: float64, ascending, the level of each training timestep. prediction_type: see `scaling`.
    config: the scheduler_config.json it was made from, from which samplers take their options.
    """

    sigmas_T: Tensor
    prediction_type: str
    config: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Read diffusers' scheduler_config.json of any class in SCHEDULERS.

        Strict: an option is read, or fixed to the supported values, or the method's alone, or ignored for a stated
        reason; GazeError names an unknown or unsupported option and its value. The betas belong to the model, so where
        the file is silent they are the defaults of the class that it names, whatever sampler is used later.
        """
        check_options(config)
        kind, start, end = SCHEDULERS.get(config.get("_class_name", ""), DDPM_BETAS)
        betas_T = betas(
            config.get("beta_schedule", kind),
            config.get("beta_start", start),
            config.get("beta_end", end),
            config.get("num_train_timesteps", 1000),
            config.get("trained_betas"),
        )
        if config.get("rescale_betas_zero_snr"):
            betas_T = zero_terminal_snr(betas_T)
        # At 2^-24, diffusers' value for Euler, the last level is finite (about 4096) where there is zero terminal SNR.
        cumulative_T = (1 - betas_T).cumprod(0).clamp(min=2.0**-24 if config.get("rescale_betas_zero_snr") else 0)
        sigmas_T = ((1 - cumulative_T) / cumulative_T).sqrt().double()
        return cls(sigmas_T, config.get("prediction_type", "epsilon"), dict(config))

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level (float64, same shape) of a timestep, fractions between two training timesteps included:
        linear interpolation in the table, held at its ends."""
        table_T = self.sigmas_T.to(timestep.device)
        timestep = timestep.double().clamp(0, len(table_T) - 1)
        low = timestep.long().clamp(max=len(table_T) - 2)
        return torch.lerp(table_T[low], table_T[low + 1], timestep - low)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timestep (float64, same shape, fractional) of a noise level: the exact inverse of `sigma`.

        diffusers interpolates the logarithm here (for Karras levels) but the level itself when going from timestep to
        level; one interpolation for both makes them inverse to each other, and differs by under 0.05 timesteps.
        """
        table_T = self.sigmas_T.to(sigma.device)
        sigma = sigma.double().clamp(table_T[0], table_T[-1])
        high = torch.searchsorted(table_T, sigma.contiguous()).clamp(1, len(table_T) - 1)
        low_sigma, high_sigma = table_T[high - 1], table_T[high]
        return high - 1 + (sigma - low_sigma) / (high_sigma - low_sigma)


def check_options(config: dict[str, Any]) -> None:
    """Raise GazeError for the first option of a scheduler_config.json that no sampler could honour."""
    name = config.get("_class_name")
    if name is not None and name not in SCHEDULERS:
        raise GazeError(f"scheduler class {name!r} is not supported: other noise, or an unknown one",
                        nearest(name, SCHEDULERS))  # fmt: skip
    choices = FIXED | {"prediction_type": PREDICTION_TYPES, "timestep_spacing": SPACINGS}
    choices |= {"final_sigmas_type": ("zero", "sigma_min")}
    for option, value in config.items():
        if isinstance(value, int) and abs(value) > MOST:
            raise GazeError(f"scheduler option {option} is out of range", f"at most {MOST}")
        if option.startswith("_") or option in IGNORED or option in METHOD:
            continue
        if option not in READ and option not in FIXED:
            raise GazeError(f"unknown scheduler option {option!r} (value {value!r})", nearest(option, READ))
        if option in choices and value not in choices[option]:
            supported = " or ".join(repr(choice) for choice in choices[option])
            raise GazeError(f"scheduler option {option} = {value!r} is not supported", f"{option} = {supported}")


def betas(kind: str, start: float, end: float, count: int, trained: list[float] | None = None) -> Tensor:
    """Variance added by each of `count` training timesteps, [T].

    kind: "linear" (Ho et al. 2020), "scaled_linear" (linear in the square root, Rombach et al. 2022),
    "squaredcos_cap_v2" (Nichol & Dhariwal 2021, eq. 17, capped at 0.999). `trained` replaces them all.
    In fp32, because models are trained and published with fp32 tables, whose rounding is 1e-4 of the lowest level.
    """
    if trained is not None:
        betas_T = torch.tensor(trained, dtype=torch.float32)
    elif kind == "linear":
        betas_T = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas_T = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        remaining = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas_T = (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999).float()
    else:
        raise GazeError(f"unknown beta_schedule {kind!r}", nearest(kind, BETA_SCHEDULES))
    if len(betas_T) < 2 or not bool(((betas_T > 0) & (betas_T < 1)).all()):
        raise GazeError("a noise schedule needs at least two betas, all between 0 and 1",
                        "check beta_start, beta_end, trained_betas and num_train_timesteps")  # fmt: skip
    return betas_T


def zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Betas whose last timestep is pure noise: sqrt(cumulative alphas) shifted to end at 0 and stretched so that the
    first stays (Lin et al. 2024, algorithm 1)."""
    root_T = (1 - betas_T).cumprod(0).sqrt()
    first, last = root_T[0].clone(), root_T[-1].clone()
    cumulative_T = ((root_T - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([cumulative_T[:1], cumulative_T[1:] / cumulative_T[:-1]])


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


def spaced_sigmas(spacing: str, sigma_max: float, sigma_min: float, count: int) -> Tensor:
    """`count` levels [N], float64, from sigma_max down to sigma_min; one alone is sigma_max.

    "karras": even in sigma^(1/7) (Karras et al. 2022, eq. 5); "exponential": even in log sigma; "beta": sigma at the
    quantiles of the beta distribution with both shapes 0.6, close together at both ends (Lee et al. 2024).
    """
    ramp_N = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "karras":
        return (sigma_max ** (1 / 7) + ramp_N * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7
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
