"""Opens the models that judge: those of transformers. Safetensors only, and no code that comes with a model."""

from __future__ import annotations

from typing import Any

from diffusion.errors import GazeError
from diffusion.hub import transformers_path

from ..options import dtype_of
from ..processes import own_device


def open_judge(name: str, model: Any, processor: Any, dtype: str = "float32") -> tuple[Any, Any]:
    """A model, ready to judge on this process's device, and what prepares its input.

    name: a folder, or an id on the hub, whose cached copy is taken without a look at the network. model, processor:
    classes with from_pretrained, such as transformers' AutoModel and AutoProcessor. dtype: of the weights, by name.
    Raises GazeError when it is not there, of another kind, or has no weights for a layer: what it said would be random.
    """
    folder, weights = str(transformers_path(name)), {"dtype": dtype_of(dtype), "use_safetensors": True}
    try:
        network, loading = model.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **weights
        )
        # Pillow's resizing is the same everywhere; where torchvision is installed, its own would be taken.
        prepare = processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")
    except Exception as error:  # a file may make transformers raise almost any
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise GazeError(
            f"{name} cannot be opened to judge ({reason})", "a model for this task, with all its files"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        some = f"{', '.join(missing[:3])}{' and others' if missing[3:] else ''}"
        raise GazeError(
            f"{name} has no weights for {some} of {type(network).__name__}: what it said would be random",
            "a model that was trained for this task",
        )
    return network.eval().requires_grad_(False).to(own_device()), prepare
