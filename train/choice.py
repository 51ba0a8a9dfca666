"""Which parameters of a model train: those that patterns name, or matrices of LoRA beside them. The others stay as they
are, to the bit, and are in no optimizer, average or checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from diffusion.errors import GazeError
from diffusion.files import differences, shapes_of
from diffusion.pretrained import Model
from diffusion.text import TextEncoder

from . import config, lora
from .sharding import parted_like
from .tokenizer import fingerprint as tokenizer_fingerprint


def networks(model: Model) -> dict[str, nn.Module]:
    """What can train, by the names that parameters begin with: unet, text_model and, of SDXL, text_model_2."""
    texts = {part.replace("encoder", "model"): text.model for part, text in model.texts.items()}
    return {"unet": model.unet, **texts}


def choose(model: Model, options: config.Model) -> None:
    """Has exactly the parameters that options.train and options.lora ask for require gradients.

    Raises GazeError for a pattern or the end of a layer's name that matches nothing.
    """
    parts = networks(model)
    usual = "*" if options.init_from is None else "unet.*"
    patterns = (usual,) if options.train is None else options.train
    parameters = {
        f"{part}.{name}": value for part, network in parts.items() for name, value in network.named_parameters()
    }
    names = [f"{layer}.weight" for layer in lora.layers(parts, options.lora)] if options.lora.rank else [*parameters]
    names = [name for name in names if not name.startswith(_unread(model))]
    chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            beside = f" of a layer that ends in {', '.join(options.lora.layers)}" if options.lora.rank else ""
            raise GazeError(
                f"model.train has {pattern!r}, which is the name of no parameter{beside}",
                f"* for any characters; names are such as {', '.join(_nearest(pattern, names))}",
            )
    if not chosen:
        raise GazeError("model.train is empty, so nothing would train", f"model.train=['{usual}'], or leave it out")
    for name, value in parameters.items():
        value.requires_grad_(name in chosen)
    if options.lora.rank:
        lora.attach(parts, [name.removesuffix(".weight") for name in names if name in chosen], options.lora)
    for text in model.texts.values():
        text.model.train(any(value.requires_grad for value in text.model.parameters()))


def text_frozen(model: Model) -> bool:
    """Whether no text encoder trains, so that what it makes of a caption never changes."""
    return not any(value.requires_grad for text in model.texts.values() for value in text.model.parameters())


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name: all of a module that a checkpoint holds."""
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def load_trained(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `trained`; exact. Raises GazeError for other names or shapes."""
    own = trained(module)
    wrong = differences(shapes_of(tensors), shapes_of(own), "the recipe says")
    if wrong:
        raise GazeError(f"the checkpoint holds other parameters than the recipe trains: {wrong}", "another out=DIR")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(parted_like(value, tensors[name]))


def fingerprint(texts: Iterable[TextEncoder], frozen: Mapping[str, Tensor]) -> str:
    """A hash of tokenizers and of weights that do not train: what a checkpoint holds means nothing beside others."""
    total = hashlib.sha256()
    for text in texts:
        total.update(tokenizer_fingerprint(text.tokenizer).encode())
    for name, value in frozen.items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def frozen(model: Model) -> dict[str, Tensor]:
    """What of the autoencoder, the U-Net and the text encoders does not train, by name."""
    parts = networks(model).items()
    rest = {f"{part}.{name}": value for part, network in parts for name, value in network.named_parameters()}
    return model.autoencoder.state_dict() | {name: value for name, value in rest.items() if not value.requires_grad}


def _unread(model: Model) -> tuple[str, ...]:
    """How the names of parameters begin that no picture depends on: SDXL reads its first text encoder before the last
    layer, and not its pooled vector; some U-Nets read no text."""
    if not model.unet.config.reads_text:
        return tuple(f"{part}." for part in [*networks(model)][1:])
    begins: list[str] = []
    for (part, _), text in zip([*networks(model).items()][1:], model.texts.values(), strict=True):
        if text.penultimate and text.model.text_projection is None:
            last = text.model.config.num_hidden_layers - 1
            begins += [f"{part}.encoder.layers.{last}.", f"{part}.final_layer_norm."]
    return tuple(begins)


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names that the pattern would be part of if its words were spelt as theirs, else any three."""
    words = {word for name in names for word in name.split(".")}

    def spell(found: re.Match[str]) -> str:
        known = any(found[0] in word for word in words)
        return found[0] if known else next(iter(get_close_matches(found[0], words, 1)), found[0])

    meant = "*" + re.sub(r"\w+", spell, pattern) + "*"
    return ([name for name in names if fnmatchcase(name, meant)] or [*names])[:3]
