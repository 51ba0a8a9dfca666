"""Noise schedules: training timestep <-> noise level, and what a network's output means.

Everything here is in the variance exploding frame: x = clean + sigma * noise. Stable Diffusion's own frame, of
constant variance, is x / sqrt(1 + sigma^2), that of flow-matching models (1 - t) * clean + t * noise = x / (1 + sigma)
with t = sigma / (1 + sigma): exactly what c_in feeds to the network.

Shape letters: T training timesteps.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import GazeError, nearest
from .scheduler_config import (
    DDPM_BETAS,
    EDM,
    FLOW,
    PREDICTION_TYPES,
    SCHEDULERS,
    check_options,
    is_edm,
    is_flow,
)
from .spacing import spaced_sigmas

# The level of pure noise at a flow model's time 1, which is infinite: the least at which sigma / (1 + sigma) is 1 in
# float64. Steps are means of clean and x, so a high level costs no digits.
PURE_NOISE = 2.0**53


class Scaling(NamedTuple):
    """clean = c_skip * x + c_out * net(c_in * x), each tensor of the shape of sigma (Karras et al. 2022, eq. 7)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def scaling(prediction_type: str, sigma: Tensor) -> Scaling:
    """What a network's output means at noise level sigma >= 0 (any shape; the results have the same).

    "epsilon": the noise (Ho et al. 2020); "v_prediction": (noise - sigma * clean) / sqrt(1 + sigma^2) (Salimans & Ho
    2022, appendix D); "sample": the clean picture; "flow_prediction": noise - clean (Liu et al. 2022, eq. 1; Esser et
    al. 2024, section 2). Raises GazeError for another name.
    """
    if prediction_type == FLOW:
        c_in = 1 / (1 + sigma)
        return Scaling(c_in, -sigma * c_in, c_in)
    c_in = torch.rsqrt(1 + sigma**2)
    if prediction_type == "epsilon":
        return Scaling(torch.ones_like(sigma), -sigma, c_in)
    if prediction_type == "v_prediction":
        return Scaling(c_in**2, -sigma * c_in, c_in)
    if prediction_type == "sample":
        return Scaling(torch.zeros_like(sigma), torch.ones_like(sigma), c_in)
    raise GazeError(f"unknown prediction_type {prediction_type!r}", nearest(prediction_type, (*PREDICTION_TYPES, FLOW)))


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
        """Read diffusers' scheduler_config.json of any class in SCHEDULERS or, for a FlowSchedule, FLOW_SCHEDULERS, or,
        for an EDMSchedule, EDM_SCHEDULERS.

        Strict: an option is read, or fixed to the supported values, or the method's alone, or ignored for a stated
        reason; GazeError names an unknown or unsupported option and its value. The betas belong to the model, so where
        the file is silent they are the defaults of the class that it names, whatever sampler is used later.
        """
        check_options(config)
        if is_flow(config):
            return FlowSchedule.of_shift(config)
        if is_edm(config):
            return EDMSchedule.of_levels(config)
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

    @property
    def sigma_data(self) -> float:
        """The deviation of a clean picture's values that the model was trained for."""
        return 1.0

    def scaling(self, sigma: Tensor, prediction_type: str | None = None) -> Scaling:
        """What the network's output means at noise level sigma, see `scaling`; or what one of another prediction type
        would mean for this model."""
        return scaling(self.prediction_type if prediction_type is None else prediction_type, sigma)

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


class FlowSchedule(NoiseSchedule):
    """The noise levels of a flow-matching model, (1 - t) * clean + t * noise: t is timestep / T, sigma is t / (1 - t).

    sigmas_T: those of the timesteps that it was trained on, which are shifted, as diffusers has them.
    """

    @classmethod
    def of_shift(cls, config: dict[str, Any]) -> "FlowSchedule":
        """The schedule of a checked scheduler_config.json. Raises GazeError for a number out of range."""
        total, shift = config.get("num_train_timesteps", 1000), shift_of(config)
        if total < 2:
            raise GazeError(f"scheduler option num_train_timesteps is {total}", "a whole number from 2, such as 1000")
        return cls(
            flow_sigma(shifted(torch.arange(1, total + 1, dtype=torch.float64) / total, shift)), FLOW, dict(config)
        )

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level (float64, same shape) of a timestep from 0 to T, any fraction: PURE_NOISE at T."""
        return flow_sigma(timestep.double() / len(self.sigmas_T))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timestep (float64, same shape, fractional) of a noise level: the inverse of `sigma`, up to rounding."""
        sigma = sigma.double()
        return sigma / (1 + sigma) * len(self.sigmas_T)


class EDMSchedule(NoiseSchedule):
    """The noise levels of a model with the scalings of Karras et al. 2022, which is told ln(sigma) / 4 (their table 1).

    sigmas_T: their levels (eq. 5), or those even in log sigma, as config says: what "uniform" training visits.
    """

    @classmethod
    def of_levels(cls, config: dict[str, Any]) -> "EDMSchedule":
        """The schedule of a checked scheduler_config.json. Raises GazeError for a number out of range."""
        options = EDM_LEVELS | config
        total, low, high = options.get("num_train_timesteps", 1000), options["sigma_min"], options["sigma_max"]
        if total < 2 or low >= high:
            raise GazeError(f"sigma_min is {low}, sigma_max {high}, num_train_timesteps {total}",
                            "sigma_min below sigma_max, and at least two timesteps")  # fmt: skip
        sigmas_T = spaced_sigmas(options["sigma_schedule"], high, low, total, options["rho"])
        return cls(sigmas_T.flip(0), EDM, dict(config))

    @property
    def sigma_data(self) -> float:
        return float(self.config.get("sigma_data", 0.5))

    def scaling(self, sigma: Tensor, prediction_type: str | None = None) -> Scaling:
        """Karras et al. 2022, table 1, for the prediction type "epsilon"; with the other sign of c_out, so that the
        output is a velocity, for "v_prediction". None: the model's own.

        It is that of "v_prediction" for pictures of deviation sigma_data instead of 1."""
        output = prediction_type or self.config.get("prediction_type", "epsilon")
        sign = 1 if output == "v_prediction" else -1
        c_skip, c_out, c_in = scaling("v_prediction", sigma / self.sigma_data)
        return Scaling(c_skip, sign * self.sigma_data * c_out, c_in / self.sigma_data)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level (float64, same shape) of what the network is told."""
        return (4 * timestep.double()).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of a noise level above 0 (float64, same shape)."""
        return sigma.double().log() / 4


# The options of an EDMSchedule's levels, where the file is silent.
EDM_LEVELS: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_schedule": "karras", "rho": 7.0}


def flow_sigma(time: Tensor) -> Tensor:
    """Noise level (float64, same shape) of a flow's time in [0, 1]: PURE_NOISE at 1."""
    return (time.double() / (1 - time.double())).clamp(max=PURE_NOISE)


def shifted(time: Tensor, shift: float) -> Tensor:
    """A flow's time moved towards noise, the more the higher the shift; 1 leaves it (Esser et al. 2024, eq. 23)."""
    return shift * time / (1 + (shift - 1) * time)


def shift_of(config: dict[str, Any]) -> float:
    """The shift in a checked scheduler_config.json, under either of diffusers' names."""
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def betas(kind: str, start: float, end: float, count: int, trained: list[float] | None = None) -> Tensor:
    """Variance added by each of `count` training timesteps, [T].

    kind: "linear" (Ho et al. 2020), "scaled_linear" (linear in the square root, Rombach et al. 2022), or else
    "squaredcos_cap_v2" (Nichol & Dhariwal 2021, eq. 17, capped at 0.999). `trained` replaces them all.
    In fp32, because models are trained and published with fp32 tables, whose rounding is 1e-4 of the lowest level.
    """
    if trained is not None:
        betas_T = torch.tensor(trained, dtype=torch.float32)
    elif kind == "linear":
        betas_T = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas_T = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    else:
        time = torch.arange(count + 1, dtype=torch.float64) / count
        remaining = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas_T = (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999).float()
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
