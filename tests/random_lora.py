"""Random matrices for the layers of a model, in peft's names: what LoRA files are made of."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

States = dict[str, dict[str, Tensor]]


def layers_of(network: nn.Module) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def random_lora(
    networks: Mapping[str, nn.Module], seed: int, chosen: Callable[[str], bool] = lambda layer: True
) -> States:
    """Matrices of rank 2 for every layer that is chosen, by the folder's name of its network; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    states: States = {}
    for part, network in networks.items():
        state = states[part] = {}
        for layer in filter(chosen, layers_of(network)):
            outputs, inputs, *kernel = network.get_submodule(layer).weight.shape
            # As transformers names the layers of the class with a projection, and files those of all text encoders.
            name = f"text_model.{layer}" if part == "text_encoder_2" else layer
            down = torch.randn(2, inputs, *kernel, generator=generator)
            state[f"{name}.lora_A.weight"] = down / math.sqrt(inputs * math.prod(kernel))
            state[f"{name}.lora_B.weight"] = 0.3 * torch.randn(outputs, 2, *[1] * len(kernel), generator=generator)
    return states


def flat(states: States) -> dict[str, Tensor]:
    """As a file holds them."""
    return {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
