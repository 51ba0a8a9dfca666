"""Averages of the weights. The exponential one has its length as a half-life in pictures, as in Karras et al. 2022."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import parted_like, whole

RAMP = 0.05  # early on the half-life is at most this share of the pictures seen (ema_rampup_ratio of their code)


class Average:
    """Holds one averaged copy of each trained parameter of `module`, by name; in parts where the parameter is.

    decay: (pictures, batch size) -> what remains of the averages at an update.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int, int], float]) -> None:
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, pictures: int, batch_size: int) -> None:
        """After an optimizer step over `batch_size` pictures, `pictures` in all so far."""
        averages, weights = ([own(value) for value in values.values()] for values in (self.average, self.parameters))
        torch._foreach_lerp_(averages, weights, 1 - self.decay(pictures, batch_size))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the module carries the averages; after it, its own weights, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By copy: graphs and FSDP2 hold on to the parameters' memory."""
        for name, parameter in self.parameters.items():
            one, other = own(parameter), own(self.average[name])
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    @torch.no_grad()
    def distance(self) -> float:
        """Of the averages from the weights, Euclidean, relative to the weights. Every process must call."""
        apart = [value - self.average[name] for name, value in self.parameters.items()]
        return _norm(apart) / max(_norm(self.parameters.values()), torch.finfo(torch.float32).tiny)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """state: whole, also where the parameters are in parts."""
        for name, value in self.average.items():
            value.copy_(parted_like(value, state[name]))


class EMA(Average):
    """half_life: pictures; with 0 the averages equal the weights after every update."""

    def __init__(self, module: nn.Module, half_life: int) -> None:
        super().__init__(module, partial(exponential_decay, half_life))


def exponential_decay(half_life: int, pictures: int, batch_size: int) -> float:
    length = min(half_life, RAMP * pictures)
    return 0.5 ** (batch_size / length) if length else 0.0


def own(tensor: Tensor) -> Tensor:
    """The memory of this process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _norm(tensors: Iterable[Tensor]) -> float:
    norms = [whole(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors]
    return float(torch.stack(norms).norm())
