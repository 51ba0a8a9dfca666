"""All randomness of training: a function of (seed, position, purpose), so that none of it is ever saved or lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Placed(Protocol):
    """What has a position in the stream of samples."""

    @property
    def position(self) -> int: ...


def randomness(seed: int, position: int, stream: str) -> np.random.Generator:
    """The generator of one sample for one purpose: a counter-based Philox (Salmon et al. 2011) keyed by all three."""
    key = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


def normal(seed: int, samples: Sequence[Placed], stream: str, shape: tuple[int, ...]) -> Tensor:
    """Unit-variance noise of `shape` for each sample."""
    draws = [randomness(seed, sample.position, stream).standard_normal(shape, np.float32) for sample in samples]
    return torch.from_numpy(np.stack(draws))
