"""DeepSpeed's ZeRO, stages 1 and 2 (Rajbhandari et al. 2020): each process keeps the optimizer's state, and with
stage 2 the gradients, of a part of the weights only. The weights themselves are whole everywhere.

DeepSpeed reduces, clips, steps and shares the new weights out. When to step, the learning rate and the checkpoint stay
with the loop: what is here lets it see an optimizer like any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, convert_outputs_to_fp32, is_deepspeed_available
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from diffusion.errors import GazeError

from .config import Recipe
from .optimizer import make_state

INSTEAD = "FSDP2 instead, configs/accelerate/fsdp.yaml"


def wanted() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def zero_plugin(recipe: Recipe) -> DeepSpeedPlugin:
    """What Accelerate is told of ZeRO: the launcher's settings, and the recipe's. Raises GazeError for what does not go
    together."""
    if not is_deepspeed_available():
        raise GazeError("DeepSpeed is asked for and not installed", "pip install 'gaze-diffusion[deepspeed]'")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise GazeError(
            "deepspeed_config_file has settings that are the recipe's, such as clipping and precision",
            "zero_stage in Accelerate's own file, as in configs/accelerate/zero2.yaml",
        )
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=recipe.gradient_accumulation_steps,
                             gradient_clipping=recipe.optimizer.clip)  # fmt: skip
    if plugin.zero_stage == 0:
        raise GazeError("zero_stage: 0 shares nothing out", "plain data parallelism, configs/accelerate/8-gpus.yaml")
    if plugin.zero_stage == 3:
        raise GazeError("zero_stage: 3 puts the weights in parts, which Gaze does by FSDP2 only", INSTEAD)
    if plugin.offload_optimizer_device != "none":
        raise GazeError("offload_optimizer_device has another AdamW than the recipe's", f"none; or {INSTEAD}")
    refused = {
        f"optimizer.name={recipe.optimizer.name}": recipe.optimizer.name != "adamw",  # ZeRO's pieces cut across weights
        "mixed_precision=fp16": recipe.mixed_precision == "fp16",  # its scale would be DeepSpeed's to keep
        "compile=true": recipe.compile,  # it would trace DeepSpeed's own hooks
    }
    for option in (option for option, given in refused.items() if given):
        raise GazeError(f"{option} does not go with DeepSpeed", f"{INSTEAD}, or another value")
    return plugin


def prepare(
    accelerator: Accelerator, recipe: Recipe, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What `accelerator.prepare` gives, such that the step is made by the optimizer's `step` and not by `backward`."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    steps = recipe.gradient_accumulation_steps * accelerator.num_processes
    config["train_micro_batch_size_per_gpu"] = max(recipe.batch_size // steps, 1)  # what does not divide is said later
    if recipe.mixed_precision == "bf16":  # DeepSpeed's own would round the weights
        half = torch.autocast(accelerator.device.type, torch.bfloat16)
        module.forward = convert_outputs_to_fp32(half(module.forward))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    engine, _ = accelerator.prepare(module, optimizer)
    accelerator.deepspeed_engine_wrapped = _Backward(engine)
    return engine, cast(torch.optim.Optimizer, ZeroOptimizer(engine, groups))


def follow_weights(optimizer: object) -> None:
    """To be called when a module's weights were set: ZeRO steps from copies of its own. For others there is nothing to
    do."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.engine.optimizer.refresh_fp32_params()


class _Backward(DeepSpeedEngineWrapper):
    """Accelerate's makes the step within `backward`, before anyone has seen whether the gradient is finite."""

    def backward(self, loss: Tensor, sync_gradients: bool = True) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> Tensor:
        """Of the gradients as they are; the step clips them. Infinite where one is not finite."""
        return self.engine.optimizer.scaled_global_norm()


class ZeroOptimizer:
    """A DeepSpeed engine as a torch optimizer: param_groups, state, step and zero_grad.

    groups: the parameters of each group. The engine's own optimizer has one flat part of each group instead.
    """

    def __init__(self, engine: Any, groups: Sequence[Sequence[Tensor]]) -> None:
        self.engine, self.groups = engine, groups
        self.parts = engine.optimizer.optimizer
        # DeepSpeed looks for the parameters' states after the first group's first step, when other groups have none.
        make_state(self.parts, [flat for group in self.parts.param_groups for flat in group["params"]])
        for state in self.parts.state.values():
            state["step"].zero_()
        engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.parts.param_groups

    @property
    def state(self) -> dict[Tensor, Mapping[str, Any]]:
        """Of each parameter, its pieces; the count of steps is that of its group."""
        flats = [group["params"][0] for group in self.param_groups]
        return {
            parameter: {
                key: Piece(parameter, key) if value.shape == flat.shape else value
                for key, value in self.parts.state[flat].items()
            }
            for flat, parameters in zip(flats, self.groups, strict=True)
            for parameter in parameters
        }

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """`step` does it."""


class Piece:
    """One state of a parameter, of which each process holds what falls into its part."""

    def __init__(self, parameter: Tensor, key: str) -> None:
        self.parameter, self.key = parameter, key
        self.shape, self.dtype, self.device = parameter.shape, torch.float32, parameter.device

    def numel(self) -> int:
        return self.parameter.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def full_tensor(self) -> Tensor:
        """All of it, on every process, which all must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(self.parameter, self.key)

    def copy_(self, value: Tensor) -> None:
        """value: all of it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(self.parameter, value, self.key)
