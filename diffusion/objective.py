"""The training objective: which noise and noise levels, how much each counts, and the loss (docs/objectives.md).

Shape letters: B batch, C channels, H W latent size.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .noise import NoiseSchedule

Density = Callable[[Tensor], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]
Weighting = Callable[[Tensor, NoiseSchedule, float], Tensor]


def denoising_loss(
    predict: Predict,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    sigma_B: Tensor,
    schedule: NoiseSchedule,
    weight_B: Tensor,
) -> Tensor:
    """Weighted squared error of the network's output, averaged over CHW: loss_B (Karras et al. 2022, eq. 8).

    predict(c_in * x, sigma_B) is the network. Its target (clean - c_skip * x) / c_out is, with x = clean + sigma *
    noise, exactly the noise ("epsilon"), (noise - sigma * clean) / sqrt(1 + sigma^2) ("v_prediction"), the clean
    picture ("sample"): what diffusers calls noise, velocity and sample, in its frame of constant variance; or noise -
    clean (rectified flow), or EDM's. An error e of the network is an error c_out * e of the denoised picture.
    """
    sigma_B111 = sigma_B[:, None, None, None]
    c_skip, c_out, c_in = (factor.to(clean_BCHW.dtype) for factor in schedule.scaling(sigma_B111))
    x_BCHW = clean_BCHW + sigma_B111.to(clean_BCHW.dtype) * noise_BCHW
    target_BCHW = (clean_BCHW - c_skip * x_BCHW) / c_out
    output_BCHW = predict(c_in * x_BCHW, sigma_B).to(clean_BCHW.dtype)
    return weight_B.to(clean_BCHW.dtype) * (output_BCHW - target_BCHW).square().mean(dim=(1, 2, 3))


# Weightings: (sigma, schedule, gamma) -> what the squared error of the network's output counts, of the shape of sigma
# and finite for sigma > 0. All but the first are a weight of the denoised picture's error, times c_out^2.


def uniform_weight(sigma: Tensor, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """1: every noise level counts the same in the network's own output."""
    return torch.ones_like(sigma)


def min_snr_weight(sigma: Tensor, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4): the picture's error counts min(1 / sigma^2, gamma). In terms of
    snr = 1 / sigma^2 that is min(snr, gamma) / snr of the output for "epsilon", / (snr + 1) for "v_prediction", / 1 for
    "sample"."""
    return sigma.pow(-2).clamp(max=gamma) * schedule.scaling(sigma).c_out ** 2


def soft_min_snr_weight(sigma: Tensor, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """The same without the bend (Crowson et al. 2024, soft-min-SNR): the picture's error counts 1 / (sigma^2 + 1 /
    gamma)."""
    return schedule.scaling(sigma).c_out ** 2 / (sigma**2 + 1 / gamma)


def edm_weight(sigma: Tensor, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """The picture's error counts (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2, so that with EDM's scalings the
    output's counts 1 (Karras et al. 2022, table 1); with "v_prediction" too, where sigma_data is 1."""
    return (sigma.pow(-2) + schedule.sigma_data**-2) * schedule.scaling(sigma).c_out ** 2


WEIGHTINGS: dict[str, Weighting] = {
    "uniform": uniform_weight,
    "min_snr": min_snr_weight,
    "soft_min_snr": soft_min_snr_weight,
    "edm": edm_weight,
}


def uniform_timesteps(schedule: NoiseSchedule) -> Density:
    """Quantile function of the usual density, every training timestep equally likely: u in [0, 1) -> sigma."""

    def quantile(u: Tensor) -> Tensor:
        timesteps = len(schedule.sigmas_T)
        return schedule.sigmas_T.to(u.device)[(u.double() * timesteps).long().clamp(max=timesteps - 1)]

    return quantile


def log_normal(schedule: NoiseSchedule, mean: float, std: float) -> Density:
    """Quantile function of a normal density of log(sigma) (Karras et al. 2022, section 5): u in [0, 1] -> sigma,
    clamped to the levels of the schedule, so u = 0 and u = 1 are finite too. Of a flow's time sigma / (1 + sigma) it is
    the logit-normal density (Esser et al. 2024, section 3.1)."""

    def quantile(u: Tensor) -> Tensor:
        sigma = (mean + std * torch.special.ndtri(u.double())).exp()
        return sigma.clamp(schedule.sigmas_T[0].item(), schedule.sigmas_T[-1].item())

    return quantile


def nearest_noise(clean_BCHW: Tensor, draws: Iterable[Tensor]) -> Tensor:
    """Of several draws of noise, each BCHW, the one nearest to each picture's latents, BCHW; the first of equals.

    Pictures that share less of their noise are easier to tell apart under it (immiscible diffusion, Li et al. 2024; by
    choice among draws of its own for each picture: Li et al. 2025). It stays a function of the picture and its draws,
    where an assignment within a batch would depend on who shares it.
    """
    draws = iter(draws)
    nearest_BCHW = next(draws)
    for noise_BCHW in draws:
        away_B, best_B = ((noise - clean_BCHW).square().sum(dim=(1, 2, 3)) for noise in (noise_BCHW, nearest_BCHW))
        nearest_BCHW = torch.where((away_B < best_B)[:, None, None, None], noise_BCHW, nearest_BCHW)
    return nearest_BCHW
