"""What frozen networks make of pictures and captions: encoded once before training, or anew at each visit.

Either way a sample is the same: to the bit on a CPU, where each item is encoded alone. Always in float32, because
rounding would be baked into the data. An item's key is made of all that it depends on: the picture's or caption's
content, how it is cut and mirrored, and the weights that encode it.
"""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text, E width of the text embedding, P width of
# the pooled vector.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError
from diffusion.packed import pack
from diffusion.text import TextEncoder

from .config import Data, Recipe
from .data.decode import Size
from .data.stream import Sample, Stream, stack
from .processes import Processes
from .randomness import normal
from .signals import shielded
from .store import Item, Store, as_keys, key_of
from .tokenizer import fingerprint as tokenizer_fingerprint

VERSION = 2  # of how pictures and captions are prepared; another one leaves older caches aside
AT_ONCE = 16  # items that a GPU encodes together


class Latents:
    """The latents of the stream's pictures under a frozen autoencoder.

    With data.cache_latents those of every picture of the source are in a store after construction, for which all
    processes must be here together. GazeError: see `check_size` and `Store.fill`.
    """

    def __init__(self, recipe: Recipe, stream: Stream, processes: Processes, autoencoder: Autoencoder):
        self.seed, self.stream, self.device = recipe.seed, stream, processes.device
        self.autoencoder, self.few = autoencoder.to(self.device), _at_once(self.device)
        pack(self.autoencoder.encoder)
        check_size(recipe.data, autoencoder.factor)
        self.store: Store | None = None
        if recipe.data.cache_latents:
            options = json.dumps(autoencoder.config.to_diffusers(), sort_keys=True)
            name = fingerprint(autoencoder.state_dict(), options, stream.background)
            self.store = Store(_folder(recipe) / f"latents-{name}", processes)
            self._fill(self.store, (False, True) if recipe.data.flip else (False,), recipe.data.workers)

    def shape(self, size: Size) -> tuple[int, int, int]:
        """CHW of the latents of a sample of so many pixels."""
        return self.autoencoder.latent_shape(*size)

    def draw(self, samples: Sequence[Sample]) -> Tensor:
        """A draw from each picture's latents, BCHW. The samples are of one size."""
        if self.store is None:
            moments_B2CHW = self._encode(stack(samples))
        else:
            keys = as_keys(_picture_key(sample.key, sample.size, sample.flipped) for sample in samples)
            moments_B2CHW = self.store.read(keys)["moments"].to(self.device)
        mean_BCHW, deviation_BCHW = moments_B2CHW.unbind(1)
        return mean_BCHW + deviation_BCHW * self.normal(samples, "posterior")

    def normal(self, samples: Sequence[Sample], stream: str) -> Tensor:
        """Unit-variance noise for each sample, BCHW."""
        return normal(self.seed, samples, stream, self.shape(samples[0].size)).to(self.device)

    def _encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Mean and deviation of each picture's latents, B2CHW."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = [
                torch.stack(self.autoencoder.encode(part.to(self.device)), 1) for part in pixels_BCHW.split(self.few)
            ]
        return torch.cat(parts)

    def _fill(self, store: Store, sides: Sequence[bool], workers: int) -> None:
        source = self.stream.source
        used = np.array([index for index in range(len(source)) if source[index].repeats], np.int64)
        pictures = _Pictures(self.stream, used, sides)
        keys = as_keys(
            _picture_key(source[index].key, self.stream.size_of(index), flipped)
            for index in map(int, used)
            for flipped in sides
        )

        def make(numbers: Sequence[int]) -> Iterator[Item]:
            own = torch.Generator()  # the global one is for fresh weights
            loader = DataLoader(
                pictures, self.few, sampler=numbers, collate_fn=list, generator=own, **shielded(workers)
            )  # fmt: skip
            for batch in loader:
                for _, alike in groupby(batch, key=lambda pixels: pixels.shape):
                    for moments_2CHW in self._encode(torch.stack([*alike])).cpu():
                        yield {"moments": moments_2CHW}

        store.fill(keys, make, "pictures", lambda number: pictures.place(number)[1])


def check_size(data: Data, factor: int) -> None:
    """Raises GazeError when a sample's sides may not divide by the autoencoder's factor."""
    option, value = ("bucket_step", data.bucket_step) if data.bucket_step else ("size", data.size)
    if value % factor:
        raise GazeError(
            f"data.{option} {value} does not divide by {factor}, the autoencoder's factor",
            f"data.{option}={-(-value // factor) * factor}",
        )


class _Pictures(Dataset[Tensor]):
    """Pixels of every picture that is used, by their numbers in the order of the cache's keys."""

    def __init__(self, stream: Stream, used: np.ndarray, sides: Sequence[bool]):
        self.stream, self.used, self.sides = stream, used, sides

    def place(self, number: int) -> tuple[int, Size, bool]:
        """Index in the source, size of the sample, whether it is mirrored."""
        index = int(self.used[number // len(self.sides)])
        return index, self.stream.size_of(index), self.sides[number % len(self.sides)]

    def __getitem__(self, number: int) -> Tensor:
        index, size, flipped = self.place(number)
        return self.stream.pixels(index, size, flipped=flipped)


class States(NamedTuple):
    """What a U-Net may read of captions, as `told.read` gives it. length_B: tokens of each caption with start and end,
    after which there is padding."""

    context_BSE: Tensor
    pooled_BP: Tensor | None
    length_B: Tensor


class TextStates:
    """The states of captions under frozen text encoders, side by side along E.

    captions: all that will be asked for; the empty one is added. With data.cache_text they are in a store after
    construction, for which all processes must be here together.
    """

    def __init__(self, recipe: Recipe, captions: Iterable[str], processes: Processes, texts: Sequence[TextEncoder]):
        self.texts, self.device, self.few = texts, processes.device, _at_once(processes.device)
        for text in texts:
            text.model.to(self.device)
        self.store: Store | None = None
        if recipe.data.cache_text:
            # "pooled": older stores of some models are without it.
            weights = {f"{n}.{name}": v for n, text in enumerate(texts) for name, v in text.model.state_dict().items()}
            options = [
                (tokenizer_fingerprint(text.tokenizer), text.tokenizer.pad, text.window, text.penultimate,
                 text.model.config.to_diffusers()) for text in texts
            ]  # fmt: skip
            self.store = Store(_folder(recipe) / f"text-{fingerprint(weights, options, 'pooled')}", processes)
            distinct = sorted({"", *captions})

            def make(numbers: Sequence[int]) -> Iterator[Item]:
                for start in range(0, len(numbers), self.few):
                    encoded = self._encode([distinct[number] for number in numbers[start : start + self.few]])
                    for row in range(len(encoded["length"])):
                        yield {name: value[row].cpu() for name, value in encoded.items()}

            self.store.fill(as_keys(map(key_of, distinct)), make, "captions", lambda number: 0)

    def states(self, captions: Sequence[str]) -> States:
        if self.store is None:
            found = self._encode(captions)
        else:
            found = self.store.read(as_keys(map(key_of, captions)))
        here = {name: value.to(self.device) for name, value in found.items()}
        return States(here["context"], here.get("pooled"), here["length"])

    def _encode(self, captions: Sequence[str]) -> Item:
        starts = range(0, len(captions), self.few)
        parts = [self._encode_together(captions[start : start + self.few]) for start in starts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _encode_together(self, captions: Sequence[str]) -> Item:
        tokens = [text.tokens(captions).to(self.device) for text in self.texts]
        with torch.autocast(self.device.type, enabled=False):
            each = [text.states(tokens_BS) for text, tokens_BS in zip(self.texts, tokens, strict=True)]
        pooled_BP = each[-1][1]
        ends_B = (tokens[0] == self.texts[0].tokenizer.end).int().argmax(1)  # the first: padding may be the same token
        states = {"context": torch.cat([states_BSE for states_BSE, _ in each], -1), "length": ends_B + 1}
        return states if pooled_BP is None else {**states, "pooled": pooled_BP}


def fingerprint(weights: Mapping[str, Tensor], *options: object) -> str:
    """A name for what these weights make under these options."""
    total = hashlib.sha256(repr((VERSION, options)).encode())
    for name, value in weights.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def _picture_key(key: str, size: Size, flipped: bool) -> bytes:
    return key_of(key, tuple(size), flipped)


def _folder(recipe: Recipe) -> Path:
    return recipe.data.cache or recipe.out / "cache"


def _at_once(device: torch.device) -> int:
    """One on a CPU, where kernels for another size add in another order; then a batch changes no item."""
    return 1 if device.type == "cpu" else AT_ONCE
