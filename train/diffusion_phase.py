"""Last phase: text encoder and U-Net together, on latents of a frozen autoencoder. Export: a whole model folder."""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.objective import denoising_loss, log_normal, min_snr_weight, uniform_timesteps, uniform_weight
from pipelines.text_to_image import Request, TextToImage

from .choice import choose, fingerprint, frozen, text_frozen
from .config import Recipe
from .data.folder import Captioned, Sample, randomness
from .latents import Latents
from .model import Predict, export, make_model, read


class DiffusionPhase:
    """Denoising loss of recipe.objective; the noise levels of a batch are stratified over its density."""

    def __init__(self, recipe: Recipe, data: Captioned, device: torch.device):
        self.recipe, self.data, self.device = recipe, data, device
        self.model = make_model(recipe, data.captions())
        self.latents = Latents(recipe, data, device, self.model.autoencoder)
        choose(self.model, recipe.model)
        self.text_frozen = text_frozen(self.model)
        for network in self.model.modules.values():
            network.to(device)
        self.module = Predict(self.model)
        schedule = self.model.schedule
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
        text = self._text([sample.caption for sample in samples])

        def predict(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
            return module(x_BCHW, schedule.timestep(sigma_B).float(), **text)

        return denoising_loss(predict, clean, noise, sigma, kind, weight)

    def measure(self) -> dict[str, float]:
        return {}

    def grid(self) -> Tensor:
        """One picture of each validation prompt."""
        validation = self.recipe.validation
        return TextToImage(self.model)(validation.prompts, seed=validation.seed).pixels_BCHW

    def export(self, folder: Path) -> None:
        export(self.model, self.recipe.model, folder)

    def fingerprint(self) -> str:
        return fingerprint(self.model.texts.values(), frozen(self.model))

    def _text(self, captions: list[str]) -> dict[str, Any]:
        """The captions as `Predict.forward` takes them."""
        texts, size = [*self.model.texts.values()], self.recipe.data.size
        tokens = [text.tokens(captions).to(self.device) for text in texts]
        sizes_B6 = torch.tensor([[size, size, 0, 0, size, size]] * len(captions), device=self.device)
        if self.text_frozen:
            return {"states": read(texts, tokens), "sizes_B6": sizes_B6}
        return {"tokens": tokens, "sizes_B6": sizes_B6}

    def _uniform(self, samples: list[Sample]) -> Tensor:
        """A number in (0, 1) per sample; those of a global batch fall one into each of batch_size equal parts."""
        size = self.recipe.batch_size
        draws = [(sample.position % size + randomness(self.recipe.seed, sample.position, "sigma").random()) / size
                 for sample in samples]  # fmt: skip
        return torch.tensor(draws, dtype=torch.float64)
