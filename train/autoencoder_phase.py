"""First phase: the autoencoder, trained on pictures alone. Export: a model folder with only diffusers' `vae/` in it."""

# Shapes: B batch, C channels, H W height and width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.autoencoder import Autoencoder
from diffusion.files import replacing

from .cache import check_size
from .config import Recipe
from .data.stream import Sample, Stream, stack
from .judges import Judge
from .processes import Processes
from .randomness import normal

SHOWN = 8  # pictures in a grid, which has as many columns


class _Reconstruct(nn.Module):
    """One call for Accelerate to wrap: (pixels, noise) -> pixels again, mean and log-variance of the latents."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.vae = autoencoder

    def forward(self, pixels_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.vae.posterior(pixels_BCHW)
        latents = mean + (0.5 * log_variance).exp() * noise_BCHW
        return self.vae.reconstruct(latents), mean, log_variance


class AutoencoderPhase:
    """Per pixel: squared error + half the absolute error; per latent value: kl_weight x KL divergence to a unit normal
    (Kingma & Welling 2013, appendix B)."""

    judges: Mapping[str, Judge] = {}

    def __init__(self, recipe: Recipe, data: Stream, processes: Processes):
        self.recipe, self.data, self.device = recipe, data, processes.device
        self.autoencoder = Autoencoder.from_config(recipe.model.autoencoder)
        check_size(recipe.data, self.autoencoder.factor)
        self.module = _Reconstruct(self.autoencoder).to(self.device)

    def loss(self, module: nn.Module, samples: list[Sample], u_B: Tensor | None = None) -> Tensor:
        """The loss of each sample, B. u_B: of no use here, where there are no noise levels."""
        pixels = stack(samples).to(self.device)
        shape = self.autoencoder.latent_shape(*samples[0].size)
        noise = normal(self.recipe.seed, samples, "noise", shape).to(self.device)
        again, mean, log_variance = (value.float() for value in module(pixels, noise))
        error = (again - pixels).square().mean((1, 2, 3)) + 0.5 * (again - pixels).abs().mean((1, 2, 3))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean((1, 2, 3))
        return error + self.recipe.objective.kl_weight * kl

    def observe(self, samples: list[Sample], u_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        return self.loss(self.module, samples, u_B), {}

    def levels(self, u_B: Tensor) -> list[float]:
        return []

    @property
    def shown(self) -> int:
        return 2 * min(SHOWN, len(self.data.source))

    @torch.no_grad()
    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """Pictures in the first row, their reconstructions in the second, BCHW."""
        pixels = self._pictures(SHOWN)
        chosen = pixels[[number % len(pixels) for number in numbers]]
        again = torch.tensor([number >= len(pixels) for number in numbers], device=self.device)
        return torch.where(again[:, None, None, None], self._reconstruct(chosen), chosen).cpu()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """PSNR in dB over up to 256 pictures, spread evenly over the data."""
        pixels = self._pictures(256)
        errors = [
            (self._reconstruct(part).clamp(-1, 1) - part).square().mean((1, 2, 3)) / 4 for part in pixels.split(32)
        ]
        return {"psnr": float(-10 * torch.cat(errors).clamp_min(1e-12).log10().mean())}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Sets scaling_factor so that the latents of the data have unit variance, then writes folder/vae."""
        pixels = self._pictures(512)
        self.autoencoder.scale_to(torch.cat([self.autoencoder.posterior(part)[0] for part in pixels.split(32)]))
        with replacing(folder) as aside:
            self.autoencoder.save_pretrained(aside / "vae")

    def fingerprint(self) -> str:
        return ""

    def _pictures(self, count: int) -> Tensor:
        """Central squares, spread evenly over the data."""
        total, square = len(self.data.source), (self.recipe.data.size,) * 2
        chosen = torch.linspace(0, total - 1, min(count, total)).long().tolist()
        return torch.stack([self.data.pixels(index, square) for index in chosen]).to(self.device)

    def _reconstruct(self, pixels_BCHW: Tensor) -> Tensor:
        return self.autoencoder.reconstruct(self.autoencoder.posterior(pixels_BCHW)[0])
