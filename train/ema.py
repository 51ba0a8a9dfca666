"""Exponential moving average of the weights, its length given as a half-life in pictures, as in Karras et al. 2022."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RAMP = 0.05  # early on the half-life is at most this share of the pictures seen (ema_rampup_ratio of their code)


class EMA:
    """Holds one averaged copy of each trained parameter of `module`, by name.

    half_life: pictures; with 0 the averages equal the weights after every update.
    """

    def __init__(self, module: nn.Module, half_life: int):
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.half_life = half_life
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, pictures: int, batch_size: int) -> None:
        """After an optimizer step over `batch_size` pictures, `pictures` in all so far."""
        half_life = min(self.half_life, RAMP * pictures)
        decay = 0.5 ** (batch_size / half_life) if half_life else 0.0
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the module carries the averages; after it, its own weights, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])
