"""Prompts -> Condition: a tokenizer and CLIP's text transformer, one after the other; SDXL has two such pairs."""

# Shapes: B prompts, S tokens of the text, E width of the text embedding, P width of the pooled vector.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .clip import CLIPText
from .condition import Condition
from .errors import GazeError
from .prompts import parse
from .tokenizer import Tokenizer

MOST_CHUNKS = 16
LONGEST = 8  # characters of a token, on average: where a prompt has more than so many chunks hold, it is not looked at
EMPTY: tuple[list[int], list[float]] = ([], [])  # a chunk without words


class Reading(NamedTuple):
    """A prompt as a text encoder reads it. chunks: the ids and weights of each, start and end left out; at least one.
    dropped: the end of the prompt, beyond the last chunk there may be, "" for none."""

    chunks: tuple[tuple[list[int], list[float]], ...]
    dropped: str


class TextEncoder:
    """window: S, the tokens of every prompt. width: E. penultimate: the states are those before the last layer, as SDXL
    reads them. Raises GazeError when model and tokenizer do not belong together."""

    def __init__(self, model: CLIPText, tokenizer: Tokenizer, penultimate: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.penultimate = penultimate
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
    def from_pretrained(
        cls,
        text_encoder: str | Path,
        tokenizer: str | Path,
        dtype: torch.dtype = torch.float32,
        penultimate: bool = False,
        projected: bool = False,
    ) -> TextEncoder:
        """Reads the two folders, for use; GazeError when one is broken."""
        model = CLIPText.from_pretrained(text_encoder, dtype, projected).eval().requires_grad_(False)
        return cls(model, Tokenizer.from_pretrained(tokenizer), penultimate)

    def save_pretrained(
        self, text_encoder: str | Path, tokenizer: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Writes both folders; dtype None keeps that of the weights."""
        self.model.save_pretrained(text_encoder, dtype)
        self.tokenizer.save_pretrained(tokenizer)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids BS, cut and padded to the window as diffusers does."""
        return self.tokenizer.tokens(prompts, self.window)

    def read(self, prompt: str) -> Reading:
        """A prompt of any length in chunks of the window, its weights as in `prompts`. Time is bounded."""
        inside = self.window - 2
        furthest = LONGEST * MOST_CHUNKS * inside
        prompt, beyond = prompt[:furthest], prompt[furthest:]
        rows: list[tuple[list[int], list[float]]] = []
        left: list[str] = []
        for part in parse(prompt):
            ids, begins = self.tokenizer.split(part.text)
            weights = part.weights_at(begins)
            for start in range(0, max(len(ids), 1), inside):
                if len(rows) < MOST_CHUNKS:
                    rows.append((ids[start : start + inside], weights[start : start + inside]))
                else:
                    left.append(part.text[begins[start] :].strip() if ids else "")
                    break
        return Reading(tuple(rows), " ".join(filter(None, [*left, beyond.strip()])))

    def states(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the U-Net reads of token ids: states BSE and, where the model has it, the pooled vector BP."""
        if not self.penultimate:
            return self.model(tokens_BS), None
        ends_B = (tokens_BS == self.tokenizer.end).int().argmax(dim=1)  # the first, as transformers has it
        return self.model.penultimate(tokens_BS, ends_B)

    def encode(self, prompts: Sequence[str | Reading], chunks: int = 1) -> Condition:
        """Prompts -> their condition, one row each, all as long as the longest and at least of so many chunks: empty
        ones follow a shorter prompt. The vector is the pooled one, where the model has it: of the first chunk.

        A token of weight w has its states moved from those of an empty chunk by w times the way to its own: 0 is as if
        nothing stood there, 1 changes nothing, to the bit.
        """
        readings = [self.read(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        count = max(chunks, *(len(reading.chunks) for reading in readings))
        rows = [chunk for reading in readings for chunk in reading.chunks + (EMPTY,) * (count - len(reading.chunks))]
        tokens = torch.tensor([self.tokenizer.framed(ids, self.window) for ids, _ in [*rows, EMPTY]])
        tokens = tokens.to(self.model.final_layer_norm.weight.device)
        states_BSE, pooled_BP = self.states(tokens)
        states_BSE, empty_SE = states_BSE[:-1], states_BSE[-1]
        framed = [[1.0, *weights] + [1.0] * (self.window - 1 - len(weights)) for _, weights in rows]
        states_BSE = torch.lerp(empty_SE, states_BSE, torch.tensor(framed).to(states_BSE)[:, :, None])
        context_BSE = states_BSE.unflatten(0, (-1, count)).flatten(1, 2)
        return Condition(context_BSE, None if pooled_BP is None else pooled_BP[:-1:count])


Readings = tuple[Reading, ...]  # of one prompt, by each text encoder


def encode(encoders: Sequence[TextEncoder], prompts: Sequence[Readings], chunks: int = 1) -> Condition:
    """As `TextEncoder.encode`, with the states of several encoders side by side along E, and the last one's vector."""
    chunks = max(chunks, *(len(reading.chunks) for readings in prompts for reading in readings))
    each = [
        encoder.encode(readings, chunks) for encoder, readings in zip(encoders, zip(*prompts, strict=True), strict=True)
    ]
    return Condition(torch.cat([one.context_BSE for one in each], dim=-1), each[-1].vector_BV)
