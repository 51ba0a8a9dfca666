"""AdamW (Loshchilov & Hutter 2019), Muon or 8-bit AdamW, and the learning rate as a function of pictures seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.attention import GEGLU
from diffusion.errors import GazeError

from .config import Optimizer
from .muon import Muon
from .sharding import parted_like

# Muon's matrices map states to states. Layers that read numbers or tokens, or write the answer, take AdamW's steps
# (Jordan et al. 2024): their columns or rows are single things, not directions of one space. So are the heads of what a
# score function adds.
OUTER = {"conv_in", "conv_out", "linear_1", "token_embedding", "position_embedding", "picture", "between", "combine"}


def make_optimizer(module: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of recipe.name for what trains in `module`. Raises GazeError when 8-bit AdamW is not installed."""
    groups = parameter_groups(module, recipe)
    options: dict[str, Any] = {"lr": recipe.learning_rate, "betas": recipe.betas}
    if recipe.name == "muon":
        return Muon(groups, recipe.momentum, fused=True, **options)
    if recipe.name == "adamw_8bit":
        return _adamw_8bit(groups, options)
    return torch.optim.AdamW(groups, fused=True, **options)


def parameter_groups(module: nn.Module, recipe: Optimizer) -> list[dict[str, Any]]:
    """What trains in `module`, by how. Weight decay acts on matrices and kernels, not on biases and norms.

    Each group's "share" of the learning rate is 1, or recipe.text_share for a text encoder (`module.text_model` and
    `text_model_2`), times recipe.muon_share for what Muon trains; "matrices" is 0, or of how many matrices such a
    weight consists.
    """
    fused = {f"{name}.proj.weight" for name, part in module.named_modules() if isinstance(part, GEGLU)}
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inner = recipe.name == "muon" and parameter.ndim > 1 and not OUTER & set(name.split("."))
            matrices = (2 if name in fused else 1) if inner else 0
            share = recipe.text_share if name.startswith(("text_model.", "text_model_2.")) else 1.0
            share *= recipe.muon_share if matrices else 1.0
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((share, decay, matrices), []).append(parameter)
    return [
        {"params": values, "share": share, "weight_decay": decay, "matrices": matrices}
        for (share, decay, matrices), values in groups.items()
    ]


def _adamw_8bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """torchao's (Dettmers et al. 2021): moments of 4,096 numbers and more in 8 bits, a scale for each 256 of them."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise GazeError(
            f"optimizer.name=adamw_8bit needs torchao: {error}", "pip install 'gaze-diffusion[eightbit]'"
        ) from None
    return AdamW8bit(groups, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its share of the rate; in place where it is a tensor, over which torchao's step is compiled."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["share"])
        else:
            group["lr"] = rate * group["share"]


def learning_rate(recipe: Optimizer, pictures: int, total: int) -> float:
    """The rate of the step that begins after `pictures` of `total`.

    Linear warm-up; constant until recipe.decay_from; then constant on, or linear or half a cosine
    (Loshchilov & Hutter 2016) down to recipe.final_share of it at `total`, or falling with the square root of
    the pictures (Karras et al. 2024).
    """
    if pictures < recipe.warmup:
        return recipe.learning_rate * (pictures + 1) / (recipe.warmup + 1)
    start = max(recipe.warmup, recipe.decay_from)
    if recipe.decay == "constant" or pictures <= start:
        return recipe.learning_rate
    if recipe.decay == "rsqrt":
        return recipe.learning_rate * math.sqrt(start / pictures)
    done = min((pictures - start) / max(total - start, 1), 1.0)
    left = 1 - done if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (recipe.final_share + (1 - recipe.final_share) * left)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `parameter:key`, fit for safetensors. names: parameter -> its name.

    They are the state's own memory, and DTensors where the parameters are.
    """
    return {
        f"{names[parameter]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in _plain(state).items()
    }


@torch.no_grad()
def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; exact. tensors: whole, also where the parameters are DTensors.

    Raises GazeError when the state is of another optimizer.
    """
    if not optimizer.state:
        saved = {flat.rsplit(":", 1)[0] for flat in tensors}
        make_state(optimizer, [parameter for parameter, name in names.items() if name in saved])
    state = optimizer_tensors(optimizer, names)
    if state.keys() != tensors.keys():
        wrong = min(state.keys() ^ tensors.keys())
        raise GazeError(f"the optimizer's state does not fit: {wrong}", "the recipe that it was saved by")
    for name, value in state.items():
        value.copy_(parted_like(value, tensors[name]))


def make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Has the optimizer lay out its state of these parameters, as it does in a first step: one of rate 0 and gradient 0
    moves nothing."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's would ask its gradient scaler
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state without torchao's quantised tensors, whose parts are `key.codes` and `key.scale`."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if hasattr(value, "codes"):
            tensors |= {f"{key}.codes": value.codes, f"{key}.scale": value.scale}
        else:
            tensors[key] = value
    return tensors
