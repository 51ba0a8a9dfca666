"""Prompts -> Condition: a tokenizer and CLIP's text transformer, one after the other; SDXL has two such pairs."""

# Shapes: B prompts, S tokens of the text, E width of the text embedding, P width of the pooled vector.

from __future__ import annotations

import re
from bisect import bisect_right
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

EMBEDDING, ATTENTION = WEIGHTINGS = ("embedding", "attention")  # what the weights of a prompt's words act on
MOST_CHUNKS = 16
# Letters, digits and the marks that stand on letters in many scripts; with an apostrophe or hyphen inside one word.
LETTER = r"[\w\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u065f\u0900-\u0963\u0966-\u109f\u1780-\u17d3]"
# Else a character, with what belongs to it: an emoji's joined parts and skin tone, the two letters of a flag. Python
# takes the separators \x1c to \x1f for white space, but the tokenizer has tokens for them.
WORD = re.compile(
    rf"{LETTER}+(?:['’-]{LETTER}+)*|[\U0001f1e6-\U0001f1ff]{{2}}|"
    r"[\S\x1c-\x1f](?:[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff]|\u200d\S)*"
)
LONGEST = 8  # characters of a token, on average: where a prompt has more than so many chunks hold, it is not looked at


class Chunk(NamedTuple):
    """As many tokens as fit between start and end: ids, what each weighs, and the number of the word it belongs to."""

    ids: list[int]
    weights: list[float]
    words: list[int]


EMPTY = Chunk([], [], [])


class Reading(NamedTuple):
    """A prompt as a text encoder reads it: at least one chunk. words: of the prompt without its grammar, as written.
    dropped: the end of the prompt, beyond the last chunk there may be, "" for none."""

    chunks: tuple[Chunk, ...]
    words: tuple[str, ...]
    dropped: str


def words_in(text: str, begins: Sequence[int], first: int = 0) -> tuple[list[str], list[int]]:
    """The words of a text, and to which of them, counted from `first`, tokens belong that begin at these places."""
    found = [*WORD.finditer(text)]
    starts = [word.start() for word in found]
    return [word[0] for word in found], [first + max(bisect_right(starts, begin) - 1, 0) for begin in begins]


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
        rows: list[Chunk] = []
        words: list[str] = []
        left: list[str] = []
        for part in parse(prompt):
            ids, begins = self.tokenizer.split(part.text)
            weights = part.weights_at(begins)
            found, numbers = words_in(part.text, begins, len(words))
            words += found
            for start in range(0, max(len(ids), 1), inside):
                if len(rows) < MOST_CHUNKS:
                    here = slice(start, start + inside)
                    rows.append(Chunk(ids[here], weights[here], numbers[here]))
                else:
                    left.append(part.text[begins[start] :].strip() if ids else "")
                    break
        return Reading(tuple(rows), tuple(words), " ".join(filter(None, [*left, beyond.strip()])))

    def plain(self, caption: str) -> Reading:
        """A caption as `tokens` reads it: one chunk, without the grammar of weights, cut to the window."""
        ids, begins = self.tokenizer.split(caption)
        inside = self.window - 2
        words, numbers = words_in(caption, begins)
        dropped = caption[begins[inside] :].strip() if len(ids) > inside else ""
        return Reading((Chunk(ids[:inside], [1.0] * len(ids[:inside]), numbers[:inside]),), tuple(words), dropped)

    def states(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a U-Net may read of token ids: states BSE and the pooled vector BP, which is the state at the prompt's
        end or, of SDXL's second text encoder, its projection, and of the first one None."""
        if not self.penultimate:
            states_BSE = self.model(tokens_BS)
            return states_BSE, states_BSE[torch.arange(len(tokens_BS)), self.ends(tokens_BS)]
        return self.model.penultimate(tokens_BS, self.ends(tokens_BS))

    def ends(self, tokens_BS: Tensor) -> Tensor:
        """The places of the prompts' end tokens, B: the first of each row, as transformers has it."""
        return (tokens_BS == self.tokenizer.end).int().argmax(dim=1)

    def seen(self, tokens_BS: Tensor) -> Tensor:
        """seen_BS: True up to each prompt's end, False for what fills the window after it."""
        return torch.arange(tokens_BS.shape[1], device=tokens_BS.device) <= self.ends(tokens_BS)[:, None]

    def encode(
        self,
        prompts: Sequence[str | Reading],
        chunks: int = 1,
        weighting: str = EMBEDDING,
        mask_padding: bool = False,
    ) -> Condition:
        """Prompts -> their condition, one row each, all as long as the longest and at least of so many chunks: empty
        ones follow a shorter prompt. The vector is the pooled one, where the model has it: of the first chunk.
        mask_padding: hidden are the tokens after each chunk's end, of chunks that follow a shorter prompt all.

        A token of weight w, where weighting is "embedding", has its states moved from those of an empty chunk by w
        times the way to its own: 0 is as if nothing stood there, 1 changes nothing, to the bit. Where it is
        "attention", its states stay and w is its weight in `Condition`: 0 hides it.
        """
        readings = [self.read(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        count = max(chunks, *(len(reading.chunks) for reading in readings))
        rows = [chunk for reading in readings for chunk in reading.chunks + (EMPTY,) * (count - len(reading.chunks))]
        tokens = torch.tensor([self.tokenizer.framed(row.ids, self.window) for row in [*rows, EMPTY]])
        states_BSE, pooled_BP = self.states(tokens.to(self.model.final_layer_norm.weight.device))
        states_BSE, empty_SE = states_BSE[:-1], states_BSE[-1]
        said_BS = torch.tensor([[1.0, *row.weights] + [1.0] * (self.window - 1 - len(row.weights)) for row in rows])
        weight_BS = said_BS if weighting == ATTENTION else torch.ones_like(said_BS)
        if weighting == EMBEDDING:
            states_BSE = torch.lerp(empty_SE, states_BSE, said_BS.to(states_BSE)[:, :, None])
        if mask_padding:
            written = torch.tensor([[i < len(reading.chunks)] for reading in readings for i in range(count)])
            weight_BS = weight_BS * (self.seen(tokens[:-1]) & written)
        context_BSE, weight_BS = (each.unflatten(0, (-1, count)).flatten(1, 2) for each in (states_BSE, weight_BS))
        plain = bool((weight_BS == 1).all())
        return Condition(
            context_BSE,
            None if pooled_BP is None else pooled_BP[:-1:count],
            None if plain else weight_BS.to(context_BSE.device),
        )


Readings = tuple[Reading, ...]  # of one prompt, by each text encoder


def encode(
    encoders: Sequence[TextEncoder],
    prompts: Sequence[Readings],
    chunks: int = 1,
    weighting: str = EMBEDDING,
    mask_padding: bool = False,
) -> Condition:
    """As `TextEncoder.encode`, with the states of several encoders side by side along E, the last one's vector, and
    the first one's weights."""
    chunks = max(chunks, *(len(reading.chunks) for readings in prompts for reading in readings))
    each = [
        encoder.encode(readings, chunks, weighting, mask_padding)
        for encoder, readings in zip(encoders, zip(*prompts, strict=True), strict=True)
    ]
    return Condition(torch.cat([one.context_BSE for one in each], dim=-1), each[-1].vector_BV, each[0].weight_BS)
