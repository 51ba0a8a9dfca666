"""What the loss of a diffusion run draws for each sample: noise level and noise, as recipe.objective says.

All of it is a function of (seed, position), so it is the same for any number of processes.
"""

# Shapes: B batch, C latent channels, H W latent size.

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.noise import NoiseSchedule
from diffusion.objective import Density, log_normal, nearest_noise, uniform_timesteps

from .cache import Latents
from .config import Objective, Recipe
from .data.stream import Sample
from .randomness import normal, randomness


def make_density(objective: Objective, schedule: NoiseSchedule) -> Density:
    if objective.density == "log_normal":
        return log_normal(schedule, objective.log_mean, objective.log_std)
    return uniform_timesteps(schedule)


def quantiles(recipe: Recipe, samples: list[Sample]) -> Tensor:
    """A number in [0, 1) per sample, float64 B. Stratified, those of a global batch fall one into each of batch_size
    equal parts: the same density, and a mean over the batch that scatters less."""
    draws = [randomness(recipe.seed, sample.position, "sigma").random() for sample in samples]
    if recipe.objective.stratified:
        size = recipe.batch_size
        draws = [(sample.position % size + u) / size for sample, u in zip(samples, draws, strict=True)]
    return torch.tensor(draws, dtype=torch.float64)


def draw_noise(recipe: Recipe, latents: Latents, samples: list[Sample], clean_BCHW: Tensor) -> Tensor:
    """The noise that is added to the latents, BCHW: see `nearest_noise`; with offset_noise a constant of each channel
    is part of it (Guttenberg 2023), so that the network learns to move a picture's mean."""
    objective = recipe.objective
    streams = ["noise", *(f"noise {number}" for number in range(1, objective.noises))]
    noise_BCHW = nearest_noise(clean_BCHW, (latents.normal(samples, stream) for stream in streams))
    if objective.offset_noise:
        offset_BC11 = normal(recipe.seed, samples, "offset", (clean_BCHW.shape[1], 1, 1)).to(clean_BCHW)
        noise_BCHW = noise_BCHW + objective.offset_noise * offset_BC11
    return noise_BCHW
