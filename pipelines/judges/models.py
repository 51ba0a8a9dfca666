"""Opens the models that judge: those of transformers, with what prepares their input."""

from __future__ import annotations

from typing import Any

from diffusion.placement import dtype_of

from ..borrowed import open_borrowed, open_part
from ..processes import own_device


def open_judge(
    name: str, needed: str, auto: str = "AutoModel", processor: str = "AutoProcessor", dtype: str = "float32"
) -> tuple[Any, Any]:
    """A model on this process's device, and its processor.

    name: a folder, or an id on the hub, whose cached copy is taken without a look at the network. needed: the kind in
    words. auto, processor: the classes of transformers that open it. dtype: of its weights, by name.
    Raises GazeError when it is not there, broken, a pickle, of another kind, or without weights for one of its layers:
    what it said would be random.
    """
    network, folder = open_borrowed(name, auto, needed, own_device(), dtype_of(dtype), pools=True)
    return network, open_part(processor, folder)
