"""LoRA (Hu et al. 2021): trained low-rank matrices beside a network's frozen layers, by peft, and their file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.clip import PREFIX
from diffusion.errors import GazeError
from diffusion.files import replacing, replacing_file, save_tensors
from diffusion.lora import FILE

from .config import Lora

PARTS = {"unet": "unet", "text_model": "text_encoder", "text_model_2": "text_encoder_2"}  # as the file names them
BESIDE = "text_projection"  # of a text encoder, the one layer that transformers has beside its text model


def layers(networks: Mapping[str, nn.Module], lora: Lora) -> list[str]:
    """The layers `network.layer` that lora.layers names: linear ones and convolutions.

    Raises GazeError for an end that no layer has.
    """
    kinds = nn.Linear | nn.Conv2d
    found = [f"{part}.{name}" for part, network in networks.items() for name, layer in network.named_modules()
             if isinstance(layer, kinds)]  # fmt: skip
    for end in lora.layers:
        if not any(name.endswith(f".{end}") for name in found):
            ends = sorted({name.split(".")[-1] for name in found if not name[-1].isdigit()})
            raise GazeError(
                f"model.lora.layers has {end!r}, but no layer's name ends so", f"ends are {', '.join(ends)}"
            )
    return [name for name in found if any(name.endswith(f".{end}") for end in lora.layers)]


def attach(networks: Mapping[str, nn.Module], chosen: Iterable[str], lora: Lora) -> None:
    """Puts fresh matrices beside the chosen layers, names as of `layers`; as yet they change no output. All else is
    frozen, to the bit. Raises GazeError for a rank above a layer's own, and when peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise GazeError("model.lora needs peft, which is not installed", 'pip install "gaze-diffusion[lora]"') from None
    chosen = list(chosen)
    for part, network in networks.items():
        for name, layer in network.named_modules():
            if f"{part}.{name}" in chosen and lora.rank > (most := min(layer.weight.flatten(1).shape)):
                raise GazeError(
                    f"model.lora.rank is {lora.rank}, but {part}.{name} is a matrix of rank {most} at most",
                    f"model.lora.rank={most}, or less",
                )
        network.requires_grad_(False)
        own = [name.removeprefix(f"{part}.") for name in chosen if name.startswith(f"{part}.")]
        if own:
            alpha = lora.rank if lora.alpha is None else lora.alpha
            inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=own), network)


def save(networks: Mapping[str, nn.Module], lora: Lora, folder: Path, dtype: torch.dtype) -> None:
    """Writes the folder that diffusers' `load_lora_weights` and `diffusion.lora.add_lora` read, in the place of one
    that is there. alpha / rank is multiplied into the matrices, so that no reader need know it."""
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in _matrices(networks, lora)}
    with replacing(folder) as aside, replacing_file(aside / FILE) as file:
        save_tensors(tensors, file, {"format": "pt"})


def _matrices(networks: Mapping[str, nn.Module], lora: Lora) -> Iterator[tuple[str, Tensor]]:
    for part, network in networks.items():
        for name, value in network.named_parameters():
            if ".lora_" in name:
                scale = lora.alpha / lora.rank if "lora_B" in name and lora.alpha is not None else 1.0
                inner = PREFIX if part != "unet" and not name.startswith(BESIDE) else ""
                yield f"{PARTS[part]}.{inner}{name.replace('.default.', '.')}", value.detach() * scale
