"""Last phase: text encoder and U-Net together, on latents of a frozen autoencoder. Export: a whole model folder."""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.objective import WEIGHTINGS, denoising_loss
from diffusion.pretrained import Model, save_model
from diffusion.scheduler_config import kind_of
from diffusion.schedulers import default_name
from diffusion.text import TextEncoder
from diffusion.unet import UNet, UNetConfig
from pipelines.text_to_image import Request, TextToImage

from .config import Recipe
from .data.folder import Captioned, Sample
from .latents import Latents
from .objective import draw_noise, make_density, quantiles
from .text_phase import fingerprint, make_text_encoder
from .told import condition, read, tell

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "prediction_type": "v_prediction", "timestep_spacing": "trailing",
             "steps_offset": 1, "clip_sample": False}  # fmt: skip


class _Predict(nn.Module):
    """One call for Accelerate to wrap: (x, timestep, what `tell` says) -> the U-Net's output."""

    def __init__(self, unet: UNet, text: TextEncoder):
        super().__init__()
        self.texts = (text,)
        self.unet, self.text_model = unet, text.model

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, tokens: Sequence[Tensor], **told: Tensor) -> Tensor:
        text = condition(self.unet, read(self.texts, tokens), **told)
        return self.unet(x_BCHW, timestep_B, text.context_BSE, text.vector_BV, text.seen_BS)


def overridden(scheduler: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with the recipe's own options in it; these alone where they make another kind of model,
    because the kinds have no options in common."""
    both = {**scheduler, **own}
    return both if kind_of(both) == kind_of(scheduler) else own


class DiffusionPhase:
    """Denoising loss of recipe.objective."""

    def __init__(self, recipe: Recipe, data: Captioned, device: torch.device):
        self.recipe, self.data, self.device = recipe, data, device
        self.latents = Latents(recipe, data, device)
        text = make_text_encoder(recipe, data)
        channels, side, _ = self.latents.shape
        sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
        sizes["cross_attention_dim"] = text.width
        for option, value in sizes.items():
            if recipe.model.unet.get(option, value) != value:
                own = recipe.model.unet[option]
                raise GazeError(f"model.unet.{option} is {own}, but the other parts make it {value}", "leave it out")
        unet = UNet(UNetConfig.from_diffusers(sizes | recipe.model.unet)).zero_residuals()
        schedule = NoiseSchedule.from_config(overridden(SCHEDULER, recipe.model.scheduler))
        sampler = default_name(schedule.config["_class_name"], schedule.config)
        # What the pipeline has to do as training does goes with the model.
        defaults = recipe.model.defaults | ({"mask_padding": True} if recipe.model.mask_padding else {})
        self.model = Model(unet, self.latents.autoencoder, text, schedule, sampler, defaults)
        self.module = _Predict(unet, text).to(device)
        self.density = make_density(recipe.objective, schedule)
        # A bad value would else end the run at its first grid.
        TextToImage(self.model).plan(Request(recipe.validation.prompts or "", seed=recipe.validation.seed))

    def loss(self, module: nn.Module, samples: list[Sample], u_B: Tensor | None = None) -> Tensor:
        """The loss of each sample, B. All randomness is a function of (seed, position).

        u_B: quantiles in (0, 1) of the density of noise levels, instead of drawn ones.
        """
        schedule, objective = self.model.schedule, self.recipe.objective
        clean = self.latents.draw(samples)
        noise = draw_noise(self.recipe, self.latents, samples, clean)
        sigma = self.density(quantiles(self.recipe, samples) if u_B is None else u_B).to(self.device)
        weight = WEIGHTINGS[objective.weighting](sigma, schedule, objective.gamma)
        told = tell(self.model, samples, self.device)

        def predict(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
            return module(x_BCHW, schedule.timestep(sigma_B).float(), **told)

        return denoising_loss(predict, clean, noise, sigma, schedule, weight)

    @property
    def shown(self) -> int:
        return len(self.recipe.validation.prompts)

    def figures(self) -> dict[str, float]:
        return {}

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """Of the validation prompts of these numbers, each with a seed of its own."""
        validation = self.recipe.validation
        draw = TextToImage(self.model)
        return torch.cat([draw(validation.prompts[i], seed=validation.seed + i).pixels_BCHW for i in numbers])

    def export(self, folder: Path) -> None:
        dtype = torch.float16 if self.recipe.model.save_as == "float16" else torch.float32
        save_model(self.model, folder, dtype)

    def fingerprint(self) -> str:
        return fingerprint(self.model.text, self.latents)
