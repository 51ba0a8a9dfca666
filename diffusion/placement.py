"""Where weights are, networks that visit a device only while they are used, and of which type."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from .errors import GazeError, nearest

VISIT = threading.RLock()  # a network can be in one place only, and one thread may need several


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on `device` within the block; its own weights stay where they were and are put back after it.

    Visits of other threads wait; where the module is at home on that device, nothing happens and nobody waits.
    """
    with ExitStack() as stack:
        stack.enter_context(VISIT)
        here = all(value.device == device for value in chain(module.parameters(), module.buffers()))
        places: list[dict[str, Any]] = []
        if here:
            stack.close()
        else:
            places = [place for part in module.modules() for place in (part._parameters, part._buffers)]
        for place in places:
            home = dict(place)
            stack.callback(place.update, home)
            place.update((name, _moved(value, device)) for name, value in home.items() if value is not None)
        yield


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return nn.Parameter(value.to(device), value.requires_grad) if isinstance(value, nn.Parameter) else value.to(device)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raises GazeError for float16 on a CPU that has no instructions for it: one convolution then takes as long as
    hundreds of others."""
    if dtype == torch.float16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise GazeError("this CPU cannot compute in float16", "bfloat16 or float32; float16 is for a GPU")


def dtype_of(name: str) -> torch.dtype:
    """torch's type of that name. Raises GazeError for one that weights do not come in."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise GazeError(f"unknown dtype {name!r:.100}", nearest(name, dtypes))
    return dtypes[name]
