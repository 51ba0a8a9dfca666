"""Tensors that lie in parts on several processes (FSDP2's DTensor, a piece of zero.py), seen whole and set from whole
ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor, on every process; a tensor that is not in parts as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parted_like(like: Tensor, value: Tensor) -> Tensor:
    """A whole value, which every process has, on the device and, where shapes agree, in the parts of `like`."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block every process has all parameters whole, so that it can call any part of the network alone."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
