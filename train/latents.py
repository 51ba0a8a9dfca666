"""The pictures as a frozen autoencoder sees them, encoded once before training or anew at each visit."""

# Shapes: B batch, C latent channels, H W latent size.

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError

from .config import Recipe
from .data.folder import Captioned, Sample, decode, normal, stack


class Latents:
    """shape: CHW of one picture's latents.

    Raises GazeError when the pictures' size does not divide by the autoencoder's factor.
    """

    def __init__(self, recipe: Recipe, data: Captioned, device: torch.device, autoencoder: Autoencoder):
        self.recipe, self.data, self.device = recipe, data, device
        self.autoencoder = autoencoder.to(device)
        factor = autoencoder.factor
        if recipe.data.size % factor:
            raise GazeError(
                f"data.size {recipe.data.size} does not divide by {factor}, the autoencoder's factor",
                f"data.size={recipe.data.size // factor * factor}",
            )
        side = recipe.data.size // factor
        self.shape = (self.autoencoder.latent_channels, side, side)
        self.cache = self._encode_all() if recipe.data.cache_latents else None

    def draw(self, samples: list[Sample]) -> Tensor:
        """A draw from each picture's latents, BCHW, from the cache or encoded now: the same either way."""
        if self.cache is not None:
            mean, std = (values[[sample.entry for sample in samples]] for values in self.cache)
        else:
            mean, std = self._encode(stack(samples))
        return mean + std * self.normal(samples, "posterior")

    def normal(self, samples: list[Sample], stream: str) -> Tensor:
        """Unit-variance noise for each sample, BCHW."""
        return normal(self.recipe.seed, samples, stream, self.shape).to(self.device)

    @torch.no_grad()
    def _encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Always in float32: rounding would be baked into the data."""
        with torch.autocast(self.device.type, enabled=False):
            return self.autoencoder.encode(pixels_BCHW.to(self.device))

    def _encode_all(self) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(self.data.entries), 64):
            entries = self.data.entries[start : start + 64]
            parts.append(self._encode(torch.stack([decode(entry.file, self.recipe.data.size) for entry in entries])))
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        return mean, std
