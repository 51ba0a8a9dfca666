"""Prompts -> Condition: a tokenizer and CLIP's text transformer, one after the other."""

# Shapes: B prompts, S tokens of the text, E width of the text embedding.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .clip import CLIPText
from .condition import Condition
from .errors import GazeError
from .tokenizer import Tokenizer


class TextEncoder:
    """window: S, the tokens of every prompt. width: E. Raises GazeError when the two do not belong together."""

    def __init__(self, model: CLIPText, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        positions = model.config.max_position_embeddings
        self.window = positions if tokenizer.window is None else min(tokenizer.window, positions)
        self.width = model.config.hidden_size
        if self.window < 2:
            raise GazeError(f"the window is {self.window}, but start and end take two tokens", "copy tokenizer/ again")
        if len(tokenizer) > model.config.vocab_size:
            raise GazeError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder {model.config.vocab_size}",
                "the text_encoder/ and the tokenizer/ of one model",
            )

    @classmethod
    def from_pretrained(cls, text_encoder: str | Path, tokenizer: str | Path) -> TextEncoder:
        """Reads the two folders, weights as float32, for use; GazeError when one is broken."""
        model = CLIPText.from_pretrained(text_encoder).eval().requires_grad_(False)
        return cls(model, Tokenizer.from_pretrained(tokenizer))

    def save_pretrained(
        self, text_encoder: str | Path, tokenizer: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Writes both folders; dtype None keeps that of the weights."""
        self.model.save_pretrained(text_encoder, dtype)
        self.tokenizer.save_pretrained(tokenizer)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids BS, cut and padded to the window as diffusers does."""
        return self.tokenizer.tokens(prompts, self.window)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> their condition, one row each."""
        device = self.model.final_layer_norm.weight.device
        return Condition(self.model(self.tokens(prompts).to(device)))

    def dropped(self, prompt: str) -> str:
        """The end of the prompt that does not fit the window, "" if all of it does."""
        return self.tokenizer.dropped(prompt, self.window)
