"""The training objective: which noise levels, how much each counts, and the loss.

Shape letters: B batch, C channels, H W latent size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .noise import NoiseSchedule, scaling

Density = Callable[[Tensor], Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


def denoising_loss(
    predict: Predict,
    clean_BCHW: Tensor,
    noise_BCHW: Tensor,
    sigma_B: Tensor,
    prediction_type: str,
    weight_B: Tensor,
) -> Tensor:
    """Weighted squared error of the network's output, averaged over CHW: loss_B (Karras et al. 2022, eq. 8).

    predict(c_in * x, sigma_B) is the network. Its target (clean - c_skip * x) / c_out is, with x = clean + sigma *
    noise, exactly the noise ("epsilon"), (noise - sigma * clean) / sqrt(1 + sigma^2) ("v_prediction") or the clean
    picture ("sample"): what diffusers calls noise, velocity and sample, in its frame of constant variance. An error e
    of the network is an error c_out * e of the denoised picture.
    """
    sigma_B111 = sigma_B[:, None, None, None]
    c_skip, c_out, c_in = (factor.to(clean_BCHW.dtype) for factor in scaling(prediction_type, sigma_B111))
    x_BCHW = clean_BCHW + sigma_B111.to(clean_BCHW.dtype) * noise_BCHW
    target_BCHW = (clean_BCHW - c_skip * x_BCHW) / c_out
    output_BCHW = predict(c_in * x_BCHW, sigma_B).to(clean_BCHW.dtype)
    return weight_B.to(clean_BCHW.dtype) * (output_BCHW - target_BCHW).square().mean(dim=(1, 2, 3))


def uniform_weight(sigma: Tensor, prediction_type: str) -> Tensor:
    """Every noise level counts the same in the network's own output: weight 1, of the shape of sigma."""
    return torch.ones_like(sigma)


def min_snr_weight(sigma: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma weight of the shape of sigma (Hang et al. 2023, section 3.4): the error of the denoised picture
    counts min(1 / sigma^2, gamma), so the network's output counts c_out^2 times that. In terms of snr = 1 / sigma^2:
    min(snr, gamma) / snr for "epsilon", / (snr + 1) for "v_prediction", / 1 for "sample". Finite for sigma > 0."""
    return sigma.pow(-2).clamp(max=gamma) * scaling(prediction_type, sigma).c_out ** 2


def uniform_timesteps(schedule: NoiseSchedule) -> Density:
    """Quantile function of the usual density, every training timestep equally likely: u in [0, 1) -> sigma."""

    def quantile(u: Tensor) -> Tensor:
        timesteps = len(schedule.sigmas_T)
        return schedule.sigmas_T.to(u.device)[(u.double() * timesteps).long().clamp(max=timesteps - 1)]

    return quantile


def log_normal(schedule: NoiseSchedule, mean: float, std: float) -> Density:
    """Quantile function of a normal density of log(sigma) (Karras et al. 2022, section 5): u in [0, 1] -> sigma,
    clamped to the levels of the schedule, so u = 0 and u = 1 are finite too."""

    def quantile(u: Tensor) -> Tensor:
        sigma = (mean + std * torch.special.ndtri(u.double())).exp()
        return sigma.clamp(schedule.sigmas_T[0].item(), schedule.sigmas_T[-1].item())

    return quantile
