"""First phase: the autoencoder, trained on pictures alone. Export: a diffusers `vae/` folder in DIR/model/vae."""

# Shapes: B batch, C channels, H W height and width.

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError

from .config import Recipe
from .data.folder import Captioned, Sample, decode, randomness

SHOWN = 16  # pictures in a grid


class _Reconstruct(nn.Module):
    """One call for Accelerate to wrap: (pixels, noise) -> pixels again, mean and log-variance of the latents."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.vae = autoencoder.vae

    def forward(self, pixels_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels_BCHW).latent_dist
        latents = posterior.mean + posterior.std * noise_BCHW
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


class AutoencoderPhase:
    """Squared error plus absolute error of the pixels plus kl_weight x KL divergence to a unit normal (Kingma & Welling 2013)."""

    def __init__(self, recipe: Recipe, data: Captioned, device: torch.device):
        self.recipe, self.data, self.device = recipe, data, device
        self.autoencoder = Autoencoder.from_config(recipe.model.autoencoder)
        if recipe.data.size % self.autoencoder.factor:
            raise GazeError(
                f"pictures of {recipe.data.size} pixels do not divide by the autoencoder's factor "
                f"{self.autoencoder.factor}",
                f"data.size={recipe.data.size // self.autoencoder.factor * self.autoencoder.factor}",
            )
        self.module = _Reconstruct(self.autoencoder).to(device)
        side = recipe.data.size // self.autoencoder.factor
        self.latent_shape = (self.autoencoder.latent_channels, side, side)

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B."""
        pixels = torch.stack([sample.pixels_CHW for sample in samples]).to(self.device)
        noise = torch.stack([
            torch.from_numpy(
                randomness(self.recipe.seed, sample.position, "noise").standard_normal(self.latent_shape, "float32")
            )
            for sample in samples
        ]).to(self.device)
        again, mean, logvar = (value.float() for value in module(pixels, noise))
        error = (again - pixels).square().mean((1, 2, 3)) + 0.5 * (again - pixels).abs().mean((1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3))
        return error + self.recipe.objective.kl_weight * kl

    @torch.no_grad()
    def grid(self) -> Tensor:
        """Pictures above their reconstructions, BCHW, for a grid of SHOWN columns."""
        pixels = self._pictures(SHOWN)
        return torch.cat([pixels, self._reconstruct(pixels)]).cpu()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """PSNR in dB over up to 256 pictures, spread evenly over the data."""
        pixels = self._pictures(256)
        errors = [
            (self._reconstruct(part).clamp(-1, 1) - part).square().mean((1, 2, 3)) / 4 for part in pixels.split(32)
        ]
        return {"psnr": float(-10 * torch.cat(errors).clamp_min(1e-12).log10().mean())}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Sets scaling_factor so that the latents of the data have unit variance, then writes DIR/model/vae."""
        pixels = self._pictures(512)
        latents = torch.cat([self.autoencoder.vae.encode(part).latent_dist.mean for part in pixels.split(32)])
        self.autoencoder.vae.register_to_config(scaling_factor=float(1 / latents.std()))
        self.autoencoder.save_pretrained(folder / "vae")

    def _pictures(self, count: int) -> Tensor:
        entries = self.data.entries
        chosen = torch.linspace(0, len(entries) - 1, min(count, len(entries))).long().tolist()
        return torch.stack([decode(entries[i].file, self.recipe.data.size) for i in chosen]).to(self.device)

    def _reconstruct(self, pixels_BCHW: Tensor) -> Tensor:
        return self.autoencoder.vae.decode(self.autoencoder.vae.encode(pixels_BCHW).latent_dist.mean).sample
