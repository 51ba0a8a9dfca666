"""LoRA files on the networks of a model, whose weights stay as they are (Hu et al. 2021, section 4.1).

Where a layer computes W x, it then gives W x + scale * B A x. A, "down", and B, "up", are a file's matrices of rank r,
and scale = weight * alpha / r. A convolution's A is a convolution like the layer's own with r outputs, its B a 1x1 one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import TokenConv
from .clip import PREFIX
from .errors import GazeError
from .files import read_tensors
from .header import Entry, Header, read_header, refuse_pickle
from .original_names import original_names
from .structure import unet_counts
from .unet import UNet

FILE = "pytorch_lora_weights.safetensors"  # in a folder that diffusers' save_lora_weights wrote
NOTES = "lora_adapter_metadata"  # where diffusers notes peft's options, as JSON
LARGEST = torch.finfo(torch.float32).max

# The networks that a LoRA acts on, and how their keys begin. kohya's sd-scripts put an underscore for each dot.
PARTS = {
    "unet": ("", "unet.", "lora_unet_"),  # "": what diffusers' U-Net saves by itself
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
# How the key of each tensor of a layer ends.
ENDINGS = {
    "down": (
        ".lora_A.weight",
        ".lora_down.weight",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
        ".down.weight",
    ),
    "up": (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".up.weight"),
    "alpha": (".alpha",),
}
# What older versions of diffusers called the layers of an attention.
OLD = {
    ".to_q": ".processor.to_q_lora",
    ".to_k": ".processor.to_k_lora",
    ".to_v": ".processor.to_v_lora",
    ".to_out.0": ".processor.to_out_lora",
    ".q_proj": ".to_q_lora",
    ".k_proj": ".to_k_lora",
    ".v_proj": ".to_v_lora",
    ".out_proj": ".to_out_lora",
}
# Adapters that are something else, by what their keys have in them.
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoRA with a third matrix (LyCORIS' Tucker decomposition)",
    "oft_": "OFT",
    "lora_embedding": "LoRA of an embedding",
    "lora_B.bias": "an adapter with biases",
    "lora_up.bias": "an adapter with biases",
}
# Options of peft that change what the matrices mean, and their values that do not.
PLAIN = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others also change the model's weights
}
OTHER_STRUCTURE = "a LoRA for this model; those of Stable Diffusion 1.x, 2.x and XL differ"
_numbers = itertools.count()  # of what is attached, so that names differ


class Place(NamedTuple):
    """Where a tensor of a file belongs. part: a key of PARTS. layer: its name in that network. role: of ENDINGS."""

    part: str
    layer: str
    role: str


class Addition(NamedTuple):
    """What one layer gets. down: [r, I], of a convolution [r, I, K, K]. up: [O, r], of a convolution [O, r, 1, 1]."""

    layer: nn.Module
    down: Tensor
    up: Tensor
    scale: float


class Notes(NamedTuple):
    """What a file's header says of a network.

    alpha: None is the rank. patterns: a layer's name begun by ^, or the end of one -> its place, the first that fits
    counts, and alpha; peft takes them as regular expressions, which a stranger's file could make run for ever.
    by_root: alpha is divided by the root of the rank (Kalajdzievski 2023).
    """

    alpha: float | None
    patterns: dict[str, tuple[int, float]]
    by_root: bool


def add_lora(networks: Mapping[str, nn.Module], path: str | Path, weight: float = 1.0) -> Callable[[], None]:
    """Adds a LoRA file to the outputs of the networks' layers; several add up. Returns what takes it off again, after
    which outputs are bit-equal to those before.

    networks: a UNet and its text encoders, by the names of their folders; others are left alone. No weight of theirs is
    copied or changed, and their state dicts stay as they are. path: a safetensors file in peft's, diffusers' or kohya's
    layout, or a folder with diffusers' `pytorch_lora_weights.safetensors`. weight: 0 is exactly no change.
    Adding and taking off must not happen while another thread runs the networks; running them is safe from any number.
    Raises GazeError, and then nothing has changed: for a file that is broken, no LoRA, made for another structure, or
    has values that are no finite numbers, and for such a weight.
    """
    path = Path(path)
    if not _is_number(weight):
        raise GazeError(f"the weight of {path} is {weight!r}", "a number, such as 0.8; 0 is without it")
    if not os.path.exists(path):
        raise GazeError(f"LoRA {str(path)!r} does not exist", "check the path")
    path = path / FILE if path.is_dir() else path
    refuse_pickle(path)
    header = read_header(path)
    try:
        added = list(_additions(networks, path, header, weight))
    except GazeError as error:
        raise GazeError(f"{path} cannot be added: {error.problem}", error.hint) from None
    with ExitStack() as stack:
        for addition in added:
            if addition.scale:
                stack.callback(_attach(addition))
        return stack.pop_all().close


def key_places(networks: Mapping[str, nn.Module]) -> dict[str, Place]:
    """The place of every key that a file may have, in any of the layouts."""
    places: dict[str, Place] = {}
    for part in PARTS.keys() & networks.keys():
        for layer, bases in _bases(part, networks[part]).items():
            for role, endings in ENDINGS.items():
                places |= {base + ending: Place(part, layer, role) for base in bases for ending in endings}
    return places


def _bases(part: str, network: nn.Module) -> dict[str, list[str]]:
    """How the keys of each layer of a network may begin."""
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if isinstance(network, UNet):  # kohya trains SDXL under its original names
        others = original_names("unet", layers, unet_counts(network.config))
    else:
        others = {name: PREFIX + name for name in layers}
    bases = {}
    for layer in layers:
        names = (layer, others[layer])
        old = [name.removesuffix(end) + new for name in names for end, new in OLD.items() if name.endswith(end)]
        bases[layer] = [
            begin + (name.replace(".", "_") if begin.endswith("_") else name)
            for begin in PARTS[part]
            for name in (*names, *old)
        ]
    return bases


def _additions(networks: Mapping[str, nn.Module], path: Path, header: Header, weight: float) -> Iterator[Addition]:
    """What a file adds, checked. Raises GazeError with the first thing that is wrong, the file's name left out."""
    found = _sorted_by_layer(networks, header)
    notes = {part: _read_notes(header.metadata, part) for part in PARTS}
    for (part, name), keys in found.items():
        _check_shapes(networks[part].get_submodule(name), f"{part}'s {name}", keys, header.tensors)
    tensors = dict(read_tensors(path, header.tensors))
    for (part, name), keys in found.items():
        layer: Any = networks[part].get_submodule(name)
        down, up = (_finite(tensors[keys[role]], keys[role], layer.weight) for role in ("down", "up"))
        rank = len(down)
        alpha = tensors[keys["alpha"]].item() if "alpha" in keys else None
        scale = weight * _scale(notes[part], name, rank, alpha)
        if not abs(scale) <= LARGEST:
            raise GazeError(f"the alpha of {part}'s {name} makes its scale {scale}", "another copy of the file")
        if _on_tokens(layer):
            yield Addition(layer, down.flatten(1), up.flatten(1), scale)
        else:
            yield Addition(layer, down.view(rank, *layer.weight.shape[1:]), up.view(-1, rank, 1, 1), scale)


def _sorted_by_layer(networks: Mapping[str, nn.Module], header: Header) -> dict[tuple[str, str], dict[str, str]]:
    """(part, layer) -> its keys in the file by role. Raises GazeError for a key that has no place, or one taken."""
    places = key_places(networks)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key, entry in header.tensors.items():
        if key not in places:
            raise _no_place(key, entry, header, networks)
        part, layer, role = places[key]
        taken = found.setdefault((part, layer), {}).setdefault(role, key)
        if taken != key:
            raise GazeError(f"{taken} and {key} are both for {part}'s {layer}", "a file in one layout")
    if not found:
        raise GazeError("it holds no tensors", "copy the file again")
    return found


def _no_place(key: str, entry: Entry, header: Header, networks: Mapping[str, nn.Module]) -> GazeError:
    other = next((kind for mark, kind in OTHERS.items() if mark in key), None)
    if other is not None:
        return GazeError(f"{key} belongs to {other}, which is not supported", "a plain LoRA")
    if not any("lora" in name for name in header.tensors):
        return GazeError(f"it holds no LoRA; its first tensor is {key}", "a LoRA; a whole model is opened as --model")
    parts = " and ".join(part for part in PARTS if part in networks)
    problem = f"it is of another structure: {key}, {list(entry.shape)}, is of no layer of this model's {parts}"
    return GazeError(problem, OTHER_STRUCTURE)


def _check_shapes(layer: Any, name: str, keys: Mapping[str, str], tensors: Mapping[str, Entry]) -> None:
    """Raises GazeError for a layer's first tensor that is missing or misshapen."""
    for role in ("down", "up"):
        if role not in keys:
            raise GazeError(f"{next(iter(keys.values()))} has no {role!r} beside it", "copy the file again")
    outputs, *inputs = _flat(layer.weight.shape)
    rank = _flat(tensors[keys["down"]].shape)[:1]
    for role, wanted in (("down", (*rank, *inputs)), ("up", (outputs, *rank))):
        key, entry = keys[role], tensors[keys[role]]
        if _flat(entry.shape) != wanted:
            takes = ", ".join(map(str, ("r", *inputs) if role == "down" else wanted))
            problem = f"it is of another structure: {key} is {list(entry.shape)}, but {name} takes [{takes}]"
            raise GazeError(problem, OTHER_STRUCTURE)
        if "F" not in entry.dtype:
            raise GazeError(f"{key} is {entry.dtype}", "a version that is not quantised")
    if "alpha" in keys and math.prod(tensors[keys["alpha"]].shape) != 1:
        raise GazeError(
            f"{keys['alpha']} is {list(tensors[keys['alpha']].shape)}, not one number", "copy the file again"
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a kernel of 1x1, which some programs write and others leave out."""
    return tuple(shape[:2]) if shape[2:] == (1, 1) else tuple(shape)


def _finite(value: Tensor, key: str, like: Tensor) -> Tensor:
    """On the device and in the dtype of a layer. Raises GazeError."""
    value = value.to(like)
    if not value.isfinite().all():
        raise GazeError(f"{key} has values that are no finite numbers in {like.dtype}", "another copy of the file")
    return value


def _read_notes(metadata: Mapping[str, str], part: str) -> Notes:
    """Raises GazeError for notes that are broken, and for options that are not supported."""
    try:
        noted = json.loads(metadata.get(NOTES, "{}"))
        begins = [begin for begin in PARTS[part] if not begin.endswith("_")]
        options = {name.removeprefix(b): value for b in begins for name, value in noted.items() if name.startswith(b)}
        patterns = dict((options.get("alpha_pattern") or {}).items())
    except (ValueError, AttributeError, RecursionError):
        raise GazeError(f"{NOTES} in its header cannot be read", "copy the file again") from None
    for option, values in PLAIN.items():
        if options.get(option, values[0]) not in values:
            raise GazeError(f"{part} has {option} {options[option]!r}, which is not supported", "a plain LoRA")
    odd = next((pattern for pattern in patterns if not re.fullmatch(r"\^?[\w.]+", pattern)), None)
    if odd is not None:
        raise GazeError(
            f"{part} has an alpha for the pattern {odd[:80]!r}", "names of layers, or ends of them, are read"
        )
    for alpha in (options.get("lora_alpha", 1), *patterns.values()):
        if not _is_number(alpha):
            raise GazeError(f"{part} has alpha {alpha!r}", "another copy of the file")
    ranked = {pattern: (place, alpha) for place, (pattern, alpha) in enumerate(patterns.items())}
    return Notes(options.get("lora_alpha"), ranked, options.get("use_rslora") is True)


def _scale(notes: Notes, layer: str, rank: int, alpha: float | None) -> float:
    """The factor of B A, for weight 1. alpha: the file's tensor for this layer, before what is noted."""
    name = PREFIX + layer  # the prefix begins names in old text encoders, and may end none of a U-Net's
    ends = [name[start:] for start, before in enumerate("." + name) if before == "."] + [f"^{name}", f"^{layer}"]
    fitting = [notes.patterns[end] for end in ends if end in notes.patterns]
    noted = min(fitting)[1] if fitting else rank if notes.alpha is None else notes.alpha
    return (noted if alpha is None else alpha) / (math.sqrt(rank) if notes.by_root else rank)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _on_tokens(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | TokenConv)


def _attach(addition: Addition) -> Callable[[], None]:
    """Lets a layer give the addition too. Returns what undoes it.

    The matrices are buffers, so that they follow the layer to another device or dtype; they are not in its state dict.
    """
    layer, names = addition.layer, [f"lora_{role}_{next(_numbers)}" for role in ("down", "up")]
    add = _add_linear if _on_tokens(layer) else _add_convolved
    for name, value in zip(names, (addition.down, addition.up), strict=True):
        layer.register_buffer(name, value, persistent=False)
    hook = layer.register_forward_hook(partial(add, names, addition.scale))

    def detach() -> None:
        hook.remove()
        for name in names:
            delattr(layer, name)

    return detach


def _add_linear(names: list[str], scale: float, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    down, up = map(layer.get_buffer, names)
    return output + F.linear(F.linear(inputs[0], down) * scale, up)


def _add_convolved(names: list[str], scale: float, layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    down, up = map(layer.get_buffer, names)
    inner = F.conv2d(inputs[0], down, None, layer.stride, layer.padding, layer.dilation)
    return output + F.conv2d(inner * scale, up)
