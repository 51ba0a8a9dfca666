"""Second phase: the text encoder, by foretelling a picture's latents from its caption. Export: a folder with only
`text_encoder/` and `tokenizer/` in it.

A U-Net under noise learns a picture more readily from what still shines through than from the words, so a fresh text
encoder that learns through the U-Net alone learns slowly (docs/experiments.md). Here the words are all there is.
"""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text, E width of the text embedding.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.errors import GazeError
from diffusion.files import replacing
from diffusion.text import TextEncoder

from .cache import Latents
from .choice import fingerprint
from .config import Recipe
from .data.stream import Sample, Stream
from .judges import Judge
from .model import make_text_encoder, open_autoencoder
from .processes import Processes

HIDDEN = 1024


class _Foretell(nn.Module):
    """One call for Accelerate to wrap: tokens -> latents BCHW. The mean over the tokens leaves it to each word to carry
    its own part; the rest is thrown away after the phase."""

    def __init__(self, text: TextEncoder, shape: tuple[int, int, int]):
        super().__init__()
        self.text_model = text.model
        self.picture = nn.Sequential(
            nn.Linear(text.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, math.prod(shape)), nn.Unflatten(1, shape)
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.picture(self.text_model(tokens_BS).mean(dim=1))


class TextPhase:
    """Squared error of the latents."""

    judges: Mapping[str, Judge] = {}

    def __init__(self, recipe: Recipe, data: Stream, processes: Processes):
        if recipe.data.bucket_step:
            raise GazeError("the text phase foretells pictures of one size", "data.bucket_step=0")
        self.recipe, self.device = recipe, processes.device
        self.latents = Latents(recipe, data, processes, open_autoencoder(recipe.model))
        self.text = make_text_encoder(recipe.model, data.captions())
        self.module = _Foretell(self.text, self.latents.shape(data.sizes[0])).to(self.device)

    def loss(self, module: nn.Module, samples: list[Sample], u_B: Tensor | None = None) -> Tensor:
        """The loss of each sample, B. u_B: of no use here, where there are no noise levels."""
        foretold = module(self._tokens([sample.caption for sample in samples]))
        return (foretold.float() - self.latents.draw(samples)).square().mean((1, 2, 3))

    def observe(self, samples: list[Sample], u_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        return self.loss(self.module, samples, u_B), {}

    def levels(self, u_B: Tensor) -> list[float]:
        return []

    @property
    def shown(self) -> int:
        return len(self.recipe.validation.prompts)

    def figures(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """What is foretold of the validation prompts of these numbers."""
        prompts = [self.recipe.validation.prompts[i] for i in numbers]
        return self.latents.autoencoder.decode(self.module(self._tokens(prompts))).cpu()

    def export(self, folder: Path) -> None:
        with replacing(folder) as aside:
            self.text.save_pretrained(aside / "text_encoder", aside / "tokenizer")

    def fingerprint(self) -> str:
        return fingerprint([self.text], self.latents.autoencoder.state_dict())

    def _tokens(self, captions: list[str] | tuple[str, ...]) -> Tensor:
        return self.text.tokens(captions).to(self.device)
