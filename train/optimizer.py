"""AdamW (Loshchilov & Hutter 2019) and the learning rate as a function of pictures seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import Optimizer


def make_optimizer(module: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW. Weight decay acts on matrices and kernels, not on biases and norms.

    Each group's "share" of the learning rate is 1, or recipe.text_share for a text encoder (`module.text_model`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            share = recipe.text_share if name.startswith("text_model.") else 1.0
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((share, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": values, "share": share, "weight_decay": decay} for (share, decay), values in groups.items()],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )


def learning_rate(recipe: Optimizer, pictures: int, total: int) -> float:
    """The rate of the step that begins after `pictures` of `total`: linear warm-up, then constant or cosine to 0."""
    if pictures < recipe.warmup:
        return recipe.learning_rate * (pictures + 1) / (recipe.warmup + 1)
    if recipe.decay == "constant":
        return recipe.learning_rate
    done = (pictures - recipe.warmup) / max(total - recipe.warmup, 1)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `parameter:key`, fit for safetensors. names: parameter -> its name."""
    return {
        f"{names[parameter]}:{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; exact."""
    parameters = {name: parameter for parameter, name in names.items()}
    for flat, value in tensors.items():
        name, key = flat.rsplit(":", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)  # the step too, as fused AdamW asks
