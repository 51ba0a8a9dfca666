"""Pictures <-> latents, over diffusers' AutoencoderKL (Kingma & Welling 2013; Rombach et al. 2021, section 3.1)."""

# Shapes: B batch, C channels, H W height and width in pixels; latents are C x H/factor x W/factor.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from .pretrained import load_strictly, read_json, read_weights, write_part


class Autoencoder:
    """vae: the network; its config's scaling_factor brings the latents to unit variance.

    factor: pixels per latent in each direction.
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Autoencoder:
        return cls(AutoencoderKL.from_config(config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Autoencoder:
        """Reads a diffusers `vae/` folder; GazeError when it is missing or broken."""
        autoencoder = cls.from_config(read_json(Path(folder) / "config.json"))
        state = {_current_name(name): value for name, value in read_weights(folder).items()}
        load_strictly(autoencoder.vae, state, folder)
        autoencoder.vae.eval().requires_grad_(False)
        return autoencoder

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        config = {key: value for key, value in self.vae.config.items() if key != "_name_or_path"}
        write_part(folder, config, self.vae.state_dict(), dtype)

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> mean and standard deviation of the scaled latents, each BCHW."""
        posterior = self.vae.encode(pixels_BCHW).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> pixels in about [-1, 1], not clamped."""
        return self.vae.decode(latents_BCHW / self.vae.config.scaling_factor).sample


def _current_name(name: str) -> str:
    """Names of the attention of the middle block as they were before diffusers 0.15, which SD 1.x folders hold."""
    if ".attentions." not in name:
        return name
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
