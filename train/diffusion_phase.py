"""Last phase: text encoder and U-Net together, on latents of a frozen autoencoder. Export: a whole model folder."""

# Shapes: B batch, C latent channels, H W latent size.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.objective import WEIGHTINGS, denoising_loss
from diffusion.words import words_of
from pipelines.text_to_image import Request, TextToImage

from .attention import attention_figures, check_attends, mean_maps, weighed
from .cache import Latents, TextStates
from .choice import choose, fingerprint, frozen, text_frozen
from .config import Recipe
from .data.stream import Sample, Stream
from .grounding import Grounding
from .judges import open_judges
from .model import Predict, export, make_model
from .objective import draw_noise, make_density, quantiles
from .processes import Processes
from .told import tell


class DiffusionPhase:
    """Denoising loss of recipe.objective, with that of attention where the recipe asks for it."""

    def __init__(self, recipe: Recipe, data: Stream, processes: Processes):
        self.recipe, self.device = recipe, processes.device
        self.model = make_model(recipe, data.captions())
        self.judges = open_judges(recipe, data.source, self.model)  # first: what follows encodes all pictures
        self.latents = Latents(recipe, data, processes, self.model.autoencoder)
        check_attends(self.model.unet, recipe)
        choose(self.model, recipe.model)
        for network in self.model.modules.values():
            network.to(self.device)
        texts = [*self.model.texts.values()]
        self.texts = TextStates(recipe, data.captions(), processes, texts) if text_frozen(self.model) else None
        self.module = Predict(self.model)
        self.density = make_density(recipe.objective, self.model.schedule)
        self.grounding: Grounding | None = None
        if recipe.objective.grounding and recipe.data.folder is not None:
            self.grounding = Grounding(recipe.data.folder, data.source, self.model.text, self.device)
        # A bad value would else end the run at its first grid.
        TextToImage(self.model).plan(Request(recipe.validation.prompts or "", seed=recipe.validation.seed))

    def loss(self, module: nn.Module, samples: list[Sample], u_B: Tensor | None = None) -> Tensor:
        """The loss of each sample, B. All randomness is a function of (seed, position).

        u_B: quantiles in (0, 1) of the density of noise levels, instead of drawn ones; the loss is then that of
        denoising alone, so that held-out losses with and without grounding compare.
        """
        if self.grounding is None or u_B is not None:
            return self._denoising(module, samples, u_B)
        with weighed(self.model.unet) as weights:
            loss_B = self._denoising(module, samples, u_B)
        return loss_B + self.recipe.objective.grounding * self.grounding.loss(weights, samples, self._size(samples))

    def _denoising(self, module: nn.Module, samples: list[Sample], u_B: Tensor | None) -> Tensor:
        schedule, objective = self.model.schedule, self.recipe.objective
        clean = self.latents.draw(samples)
        noise = draw_noise(self.recipe, self.latents, samples, clean)
        sigma = self.density(quantiles(self.recipe, samples) if u_B is None else u_B).to(self.device)
        weight = WEIGHTINGS[objective.weighting](sigma, schedule, objective.gamma)
        told = self._tell(samples)

        def predict(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
            return module(x_BCHW, schedule.timestep(sigma_B).float(), **told)

        return denoising_loss(predict, clean, noise, sigma, schedule, weight)

    def observe(self, samples: list[Sample], u_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The samples have one caption. Figures only with validation.attention: those of `attention_figures` and, where
        it trains, the loss of attention beside masks, "grounding"."""
        if not self.recipe.validation.attention:
            return self.loss(self.module, samples, u_B), {}
        with weighed(self.model.unet) as weights:
            loss_B = self.loss(self.module, samples, u_B)
        text = self.model.text
        words = words_of(text.plain(samples[0].caption), text.window)
        size = self._size(samples)
        figures = attention_figures(mean_maps(weights, words, size), words.names)
        if self.grounding is not None:
            figures["grounding"] = float(self.grounding.loss(weights, samples, size).mean())
        return loss_B, figures

    def levels(self, u_B: Tensor) -> list[float]:
        return self.density(u_B).tolist()

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
        export(self.model, self.recipe.model, folder)

    def fingerprint(self) -> str:
        own = fingerprint(self.model.texts.values(), frozen(self.model))
        return own if self.grounding is None else f"{own}-{self.grounding.masks.fingerprint()}"

    def _size(self, samples: list[Sample]) -> tuple[int, int]:
        """H and W of their latents."""
        _, height, width = self.latents.shape(samples[0].size)
        return height, width

    def _tell(self, samples: list[Sample]) -> dict[str, Any]:
        """What the network is told of the samples; of captions whose states never change, these."""
        told = tell(self.model, samples, self.device)
        if self.texts is not None:
            del told["tokens"]
            found = self.texts.states([sample.caption for sample in samples])
            told["states"] = found.context_BSE, found.pooled_BP
        return told
