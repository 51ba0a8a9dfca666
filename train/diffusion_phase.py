"""Last phase: text encoder and U-Net together, on latents of a frozen autoencoder. Export: a whole model folder."""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text.

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.objective import denoising_loss, log_normal, min_snr_weight, uniform_timesteps, uniform_weight
from diffusion.pretrained import Model, save_model
from diffusion.schedulers import default_name
from diffusion.text import TextEncoder
from diffusion.unet import UNet, UNetConfig
from pipelines.text_to_image import Request, TextToImage

from .cache import Latents
from .config import Recipe
from .data.stream import Sample, Stream
from .processes import Processes
from .randomness import randomness
from .text_phase import fingerprint, frozen_autoencoder, make_text_encoder

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "prediction_type": "v_prediction", "timestep_spacing": "trailing",
             "steps_offset": 1, "clip_sample": False}  # fmt: skip


class _Predict(nn.Module):
    """One call for Accelerate to wrap: (x, timestep, tokens) -> the U-Net's output."""

    def __init__(self, unet: UNet, text: TextEncoder):
        super().__init__()
        self.unet, self.text_model = unet, text.model

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, tokens_BS: Tensor) -> Tensor:
        return self.unet(x_BCHW, timestep_B, self.text_model(tokens_BS))


class DiffusionPhase:
    """Denoising loss of recipe.objective; the noise levels of a batch are stratified over its density."""

    def __init__(self, recipe: Recipe, data: Stream, processes: Processes):
        self.recipe, self.device = recipe, processes.device
        self.latents = Latents(recipe, data, processes, frozen_autoencoder(recipe))
        text = make_text_encoder(recipe, data)
        channels, side, _ = self.latents.shape((recipe.data.size, recipe.data.size))
        sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
        sizes["cross_attention_dim"] = text.width
        for option, value in sizes.items():
            if recipe.model.unet.get(option, value) != value:
                own = recipe.model.unet[option]
                raise GazeError(f"model.unet.{option} is {own}, but the other parts make it {value}", "leave it out")
        unet = UNet(UNetConfig.from_diffusers(sizes | recipe.model.unet)).zero_residuals()
        schedule = NoiseSchedule.from_config(SCHEDULER | recipe.model.scheduler)
        sampler = default_name(schedule.config["_class_name"], schedule.config)
        self.model = Model(unet, self.latents.autoencoder, text, schedule, sampler, dict(recipe.model.defaults))
        self.module = _Predict(unet, text).to(self.device)
        objective = recipe.objective
        self.density = (
            uniform_timesteps(schedule)
            if objective.density == "uniform"
            else log_normal(schedule, objective.log_mean, objective.log_std)
        )
        # A bad value would else end the run at its first grid.
        TextToImage(self.model).plan(Request(recipe.validation.prompts or "", seed=recipe.validation.seed))

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B. All randomness is a function of (seed, position)."""
        schedule, kind = self.model.schedule, self.model.schedule.prediction_type
        clean = self.latents.draw(samples)
        noise = self.latents.normal(samples, "noise")
        sigma = self.density(self._uniform(samples)).to(self.device)
        weight = (
            min_snr_weight(sigma, kind, self.recipe.objective.gamma)
            if self.recipe.objective.weighting == "min_snr"
            else uniform_weight(sigma, kind)
        )
        tokens = self.model.text.tokens([sample.caption for sample in samples]).to(self.device)

        def predict(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
            return module(x_BCHW, schedule.timestep(sigma_B).float(), tokens)

        return denoising_loss(predict, clean, noise, sigma, kind, weight)

    def measure(self) -> dict[str, float]:
        return {}

    def grid(self) -> Tensor:
        """One picture of each validation prompt."""
        validation = self.recipe.validation
        return TextToImage(self.model)(validation.prompts, seed=validation.seed).pixels_BCHW

    def export(self, folder: Path) -> None:
        dtype = torch.float16 if self.recipe.model.save_as == "float16" else torch.float32
        save_model(self.model, folder, dtype)

    def fingerprint(self) -> str:
        return fingerprint(self.model.text, self.latents)

    def _uniform(self, samples: list[Sample]) -> Tensor:
        """A number in (0, 1) per sample; those of a global batch fall one into each of batch_size equal parts."""
        size = self.recipe.batch_size
        draws = [(sample.position % size + randomness(self.recipe.seed, sample.position, "sigma").random()) / size
                 for sample in samples]  # fmt: skip
        return torch.tensor(draws, dtype=torch.float64)
