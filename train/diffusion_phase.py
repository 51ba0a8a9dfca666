"""Second phase: text encoder and U-Net together, on latents of a frozen autoencoder. Export: a whole model folder."""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text.

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.autoencoder import Autoencoder
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.objective import denoising_loss, log_normal, min_snr_weight, uniform_timesteps, uniform_weight
from diffusion.pretrained import SAMPLER_OF_CLASS, Model, save_model
from diffusion.text import TextEncoder
from diffusion.unet import UNet, UNetConfig
from pipelines.text_to_image import DEFAULT_MODEL, Request, TextToImage

from .config import Recipe
from .data.folder import Captioned, Sample, decode, normal, randomness, stack
from .tokenizer import fingerprint as tokenizer_fingerprint
from .tokenizer import learn_tokenizer

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

    def __init__(self, recipe: Recipe, data: Captioned, device: torch.device):
        self.recipe, self.data, self.device = recipe, data, device
        vae_folder = recipe.model.autoencoder_from or DEFAULT_MODEL / "vae"
        autoencoder = Autoencoder.from_pretrained(vae_folder)
        if recipe.data.size % autoencoder.factor:
            raise GazeError(
                f"data.size {recipe.data.size} does not divide by {autoencoder.factor}, the factor of {vae_folder}",
                f"data.size={recipe.data.size // autoencoder.factor * autoencoder.factor}",
            )
        autoencoder.to(device)
        text = make_text_encoder(recipe, data)
        side = recipe.data.size // autoencoder.factor
        channels = autoencoder.latent_channels
        sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
        sizes["cross_attention_dim"] = recipe.model.text.width
        for option, value in sizes.items():
            if recipe.model.unet.get(option, value) != value:
                own = recipe.model.unet[option]
                raise GazeError(f"model.unet.{option} is {own}, but the other parts make it {value}", "leave it out")
        unet = UNet(UNetConfig.from_diffusers(sizes | recipe.model.unet)).zero_residuals()
        schedule = NoiseSchedule.from_config(SCHEDULER | recipe.model.scheduler)
        sampler = SAMPLER_OF_CLASS[schedule.config["_class_name"]]
        self.model = Model(unet, autoencoder, text, schedule, sampler, dict(recipe.model.defaults))
        self.module = _Predict(unet, text).to(device)
        objective = recipe.objective
        self.density = (
            uniform_timesteps(schedule)
            if objective.density == "uniform"
            else log_normal(schedule, objective.log_mean, objective.log_std)
        )
        self.latent_shape = (channels, side, side)
        # A bad value would else end the run at its first grid.
        TextToImage(self.model).plan(Request(recipe.validation.prompts or "", seed=recipe.validation.seed))
        self.cache = self._encode_all() if recipe.data.cache_latents else None

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B. All randomness is a function of (seed, position)."""
        schedule, kind = self.model.schedule, self.model.schedule.prediction_type
        clean = self._latents(samples)
        noise = self._normal(samples, "noise")
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
        """Of the tokenizer and of the autoencoder: token ids and latents mean nothing under others."""
        total = hashlib.sha256(tokenizer_fingerprint(self.model.text.tokenizer).encode())
        for name, value in self.model.autoencoder.state_dict().items():
            total.update(name.encode())
            total.update(value.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def _latents(self, samples: list[Sample]) -> Tensor:
        """A draw from each picture's latents, from the cache or encoded now: the same either way."""
        if self.cache is not None:
            mean, std = (values[[sample.entry for sample in samples]] for values in self.cache)
        else:
            mean, std = self._encode(stack(samples))
        return mean + std * self._normal(samples, "posterior")

    def _normal(self, samples: list[Sample], stream: str) -> Tensor:
        return normal(self.recipe.seed, samples, stream, self.latent_shape).to(self.device)

    def _uniform(self, samples: list[Sample]) -> Tensor:
        """A number in (0, 1) per sample; those of a global batch fall one into each of batch_size equal parts."""
        size = self.recipe.batch_size
        draws = [(sample.position % size + randomness(self.recipe.seed, sample.position, "sigma").random()) / size
                 for sample in samples]  # fmt: skip
        return torch.tensor(draws, dtype=torch.float64)

    @torch.no_grad()
    def _encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Always in float32: rounding would be baked into the data."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.autoencoder.encode(pixels_BCHW.to(self.device))

    def _encode_all(self) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(self.data.entries), 64):
            entries = self.data.entries[start : start + 64]
            parts.append(self._encode(torch.stack([decode(entry.file, self.recipe.data.size) for entry in entries])))
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        return mean, std


def make_text_encoder(recipe: Recipe, data: Captioned) -> TextEncoder:
    """A tokenizer learned from the captions and a text encoder with fresh weights."""
    size = recipe.model.text
    captions = (caption for entry in data.entries for caption in entry.captions)
    tokenizer = learn_tokenizer(captions, size.vocab_size, size.window)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.window,
        hidden_act="gelu",
        bos_token_id=tokenizer.start,
        eos_token_id=tokenizer.end,
        pad_token_id=tokenizer.pad,
    )
    model = CLIPText(config).initialize()
    # CLIP's own 0.02 is far below what the layers add, and a text encoder that learns from pictures alone then forgets
    # which word it saw (docs/experiments.md).
    nn.init.normal_(model.get_parameter("embeddings.token_embedding.weight"), std=size.token_std)
    return TextEncoder(model, tokenizer)
