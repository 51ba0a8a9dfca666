"""Models of the transformers library that write text: opened by folder or by id on the hub, from safetensors alone, and
asked so that what is written for a picture does not depend on what is written beside it."""

# Shapes: B rows, S tokens, V words of the vocabulary.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.files import read_json, weight_files
from diffusion.header import read_header
from diffusion.hub import TRANSFORMERS, hub_id, local_path
from diffusion.placement import check_dtype

from .processes import own_device

NUCLEUS = 0.9  # a word is drawn among the likeliest that have this share together (Holtzman et al. 2020, section 3.1)
PILLOW = {"backend": "pil"}
POOLER = "pooler"  # its weights some published folders lack


class Borrowed(NamedTuple):
    """folder: where it was opened from."""

    network: Any
    folder: Path


def open_borrowed(
    model: str | Path,
    auto: str,
    needed: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    pools: bool = False,
) -> Borrowed:
    """A network of transformers, ready to be asked.

    model: a folder that save_pretrained wrote, or an id on the hub. auto: the class of transformers that opens models
    of the kind that is needed; needed: the kind in words. dtype: None keeps the stored one, but for float16 on a CPU,
    which becomes float32. pools: what the pooler gives is used, so that weights of it must be there.
    Raises GazeError when it is not there, of another kind, a pickle, or broken.
    """
    folder = local_path(model, TRANSFORMERS)
    if not folder.is_dir():
        raise GazeError(
            f"there is no model folder {str(model)!r}",
            f"a folder with config.json and model.safetensors of {needed}, or its id on the hub, owner/name",
        )
    kind = _kind(folder, auto, needed)
    _check_weights(model, folder)
    import transformers

    known = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        opened = getattr(transformers, auto).from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, **known
        )
    except Exception as error:  # as for the config
        raise GazeError(f"{folder} cannot be opened as {kind}: {_said(error)}", "copy the folder again") from error
    network, loading = opened
    missing = sorted(name for name in loading["missing_keys"] if pools or POOLER not in name)
    if missing:
        raise GazeError(
            f"the weights in {folder} are not all that {kind} needs: no {missing[0]} and {len(missing) - 1} more",
            f"the whole of {needed}",
        )
    if dtype is None and network.dtype == torch.float16 and device.type == "cpu":
        network.float()
    check_dtype(network.dtype, device)
    for part in network.modules():
        if getattr(part, "generation_config", None) is not None:
            # How words are chosen is said for each call; what a model's file says of it would be warned of.
            settings = {"temperature": None, "top_p": None, "top_k": None, "max_length": None}
            part.generation_config.update(do_sample=False, num_beams=1, **settings)
    return Borrowed(network.eval().to(device), folder)


def _kind(folder: Path, auto: str, needed: str) -> str:
    """The class that the folder's config names. Raises GazeError when `auto` opens no such models."""
    stated = read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise GazeError(f"{folder} holds an adapter for another model", "merge the two where they were trained")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any class
        what = f"a model of type {stated.get('model_type')!r}"
        code = ", and the code that it brings is not run" if "auto_map" in stated else ""
        problem = f"{folder} is {what}, which transformers {transformers.__version__} does not open{code}"
        raise GazeError(f"{problem}: {_said(error)}", f"{needed} that comes with transformers") from error
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    classes = [each.__name__ for each in (found if isinstance(found, tuple) else (found,))]
    if auto == "AutoModel":  # opens the body of any, whatever it was trained with on top
        return classes[0] if classes else type(config).__name__
    names = config.architectures or classes[:1] or [type(config).__name__.replace("Config", "")]
    if not {name.casefold() for name in names} & {name.casefold() for name in classes}:
        raise GazeError(f"{folder} is a {names[0]}, and {needed} is needed", f"one that {auto} opens")
    return names[0]


def _check_weights(model: str | Path, folder: Path) -> None:
    try:
        for path in weight_files(folder, "model"):
            read_header(path)
    except GazeError as error:
        own = hub_id(model) is not None and not any(folder.glob("*.safetensors"))
        hint = f"a revision that has them, such as {model}@refs/pr/1, or another model" if own else error.hint
        raise GazeError(error.problem, hint) from None


def open_part(auto: str, folder: Path) -> Any:
    """A tokenizer, processor or image processor of a model's folder. Raises GazeError.

    It resizes by Pillow, which is the same everywhere; transformers would take torchvision where that is installed.
    """
    import transformers

    try:
        return getattr(transformers, auto).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **({} if auto == "AutoTokenizer" else PILLOW)
        )
    except Exception as error:  # as above
        what = {"AutoTokenizer": "tokenizer", "AutoProcessor": "processor"}.get(auto, "image processor")
        raise GazeError(
            f"{folder} has no {what} that can be opened: {_said(error)}", "the whole folder, or what it says"
        ) from error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def device_of(name: str | None = None) -> torch.device:
    """By its name; None: this process's GPU if there is one, else the CPU. Raises GazeError where there is none."""
    if name is None:
        return own_device()
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without this kind
        raise GazeError(f"there is no device {name!r} here: {_said(error)}", "cpu, cuda, cuda:1, mps") from None


def write(
    network: Any,
    inputs: Mapping[str, Tensor],
    tokens: int,
    beams: int = 1,
    count: int = 1,
    temperature: float = 0.0,
    draws: Sequence[np.random.Generator] = (),
) -> Tensor:
    """Token ids, [count * B, S], as the network's `generate` gives them: the text of the inputs too where it does so.

    inputs: of the network, B rows. tokens: at most so many new ones. temperature: of the softmax; 0 takes the likeliest
    word, or with `beams` above 1 the `count` likeliest of so many texts. draws: a generator for each row, with a
    temperature: a row's words depend on its generator alone, not on the rows beside it, nor on the device.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    chosen: list[Callable[[Tensor, Tensor], Tensor]] = []
    if temperature:
        chosen = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(NUCLEUS), partial(_perturbed, draws)]
    floats = {name: value.to(network.dtype) for name, value in inputs.items() if value.is_floating_point()}
    placed = {name: value.to(network.device) for name, value in {**inputs, **floats}.items()}
    with torch.inference_mode():
        return network.generate(
            **placed,
            max_new_tokens=tokens,
            num_beams=beams,
            num_return_sequences=count,
            logits_processor=LogitsProcessorList(chosen),
        )


def _perturbed(draws: Sequence[np.random.Generator], _: Tensor, scores_BV: Tensor) -> Tensor:
    """The scores with Gumbel noise: the largest is then a draw from their softmax (Maddison et al. 2014, section 2)."""
    noise_BV = np.stack([draw.gumbel(size=scores_BV.shape[1]) for draw in draws])
    return scores_BV + torch.from_numpy(noise_BV).to(scores_BV)
