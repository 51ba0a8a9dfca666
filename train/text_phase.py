"""Second phase: the text encoder, by foretelling a picture's latents from its caption. Export: a folder with only
`text_encoder/` and `tokenizer/` in it.

A U-Net under noise learns a picture more readily from what still shines through than from the words, so a fresh text
encoder that learns through the U-Net alone learns slowly (docs/experiments.md). Here the words are all there is.
"""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text, E width of the text embedding.

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.autoencoder import Autoencoder
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError
from diffusion.files import replacing
from diffusion.text import TextEncoder
from pipelines.text_to_image import DEFAULT_MODEL

from .cache import Latents
from .config import Recipe
from .data.stream import Sample, Stream
from .processes import Processes
from .tokenizer import fingerprint as tokenizer_fingerprint
from .tokenizer import learn_tokenizer

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

    def __init__(self, recipe: Recipe, data: Stream, processes: Processes):
        if recipe.data.bucket_step:
            raise GazeError("the text phase foretells pictures of one size", "data.bucket_step=0")
        self.recipe, self.device = recipe, processes.device
        self.latents = Latents(recipe, data, processes, frozen_autoencoder(recipe))
        self.text = make_text_encoder(recipe, data)
        self.module = _Foretell(self.text, self.latents.shape(data.sizes[0])).to(self.device)

    def loss(self, module: nn.Module, samples: list[Sample]) -> Tensor:
        """The loss of each sample, B."""
        foretold = module(self._tokens([sample.caption for sample in samples]))
        return (foretold.float() - self.latents.draw(samples)).square().mean((1, 2, 3))

    def measure(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def grid(self) -> Tensor:
        """What is foretold of each validation prompt, as pictures."""
        return self.latents.autoencoder.decode(self.module(self._tokens(self.recipe.validation.prompts))).cpu()

    def export(self, folder: Path) -> None:
        with replacing(folder) as aside:
            self.text.save_pretrained(aside / "text_encoder", aside / "tokenizer")

    def fingerprint(self) -> str:
        return fingerprint(self.text, self.latents)

    def _tokens(self, captions: list[str] | tuple[str, ...]) -> Tensor:
        return self.text.tokens(captions).to(self.device)


def frozen_autoencoder(recipe: Recipe) -> Autoencoder:
    """That of recipe.model.autoencoder_from, else the shipped model's."""
    return Autoencoder.from_pretrained(recipe.model.autoencoder_from or DEFAULT_MODEL / "vae")


def make_text_encoder(recipe: Recipe, data: Stream) -> TextEncoder:
    """That of recipe.model.text_from; else a tokenizer learned from the captions and fresh weights."""
    if recipe.model.text_from is not None:
        folder = recipe.model.text_from
        text = TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer")
        text.model.train().requires_grad_(True)
        return text
    size = recipe.model.text
    tokenizer = learn_tokenizer(data.captions(), size.vocab_size, size.window)
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


def fingerprint(text: TextEncoder, latents: Latents) -> str:
    """Of the tokenizer and of the autoencoder: token ids and latents mean nothing under others."""
    total = hashlib.sha256(tokenizer_fingerprint(text.tokenizer).encode())
    for name, value in latents.autoencoder.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
