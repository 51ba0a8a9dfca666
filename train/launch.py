"""What Accelerate is told: precision, accumulation, and how the processes of this run share the work."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn

from diffusion.errors import GazeError

from . import zero
from .company import meeting
from .config import Recipe
from .optimizer import make_optimizer
from .precision import check_precision
from .processes import Processes

# Longest that an operation over all processes may take: the first may write and encode for long while others wait. That
# one of them is gone is found sooner (company.py).
PATIENCE = timedelta(hours=6)
# Parts that are called as modules and hold most of the weights; the U-Net reads the others (time, text) directly.
BLOCKS = {"Conv2d", "FeedForward"}


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's object for this process. Raises GazeError for a precision that the device cannot do, and
    when the processes cannot meet."""
    partitioned = zero.zero_plugin(recipe) if zero.wanted() else None
    try:
        with meeting():
            accelerator = Accelerator(
                mixed_precision="no" if partitioned else recipe.mixed_precision,
                # As a number it would give way to the launcher's.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation_steps),
                deepspeed_plugin=partitioned,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
    except dist.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise GazeError(
            f"the processes cannot meet at {place}: {' '.join(str(error).split())[:200]}",
            "where the port is in use, another one: --main_process_port of accelerate, --master-port of torchrun, or "
            "MASTER_PORT; see docs/many-gpus.md",
        ) from None
    check_precision(recipe.mixed_precision, accelerator.device)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on accelerators only, torch and DeepSpeed on a CPU too: so it can be tried without a GPU.
        for shared in (accelerator.state._shared_state, PartialState._shared_state) if sharded or partitioned else ():
            shared["distributed_type"] = DistributedType.FSDP if sharded else DistributedType.DEEPSPEED
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin() if sharded else None
        accelerator.state.deepspeed_plugins = partitioned
    if partitioned and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise GazeError("DeepSpeed is asked for on the CPU, with one process", "python -m train CONFIG, without it")
    if sharded and not accelerator.is_fsdp2 and accelerator.num_processes > 1:
        raise GazeError("FSDP version 1 is asked for", "fsdp_version: 2, as in configs/accelerate/fsdp.yaml")
    return accelerator


def prepared(accelerator: Accelerator, recipe: Recipe, module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module, wrapped for what the processes share, and its optimizer."""
    if accelerator.is_fsdp2 and recipe.optimizer.name == "adamw_8bit":
        raise GazeError(
            "optimizer.name=adamw_8bit does not go with FSDP2, which cuts through its blocks of numbers",
            "adamw, or muon; or all on each device, configs/accelerate/8-gpus.yaml",
        )
    optimizer = make_optimizer(module, recipe.optimizer)
    if accelerator.is_fsdp2:
        # Autocast does it. FSDP2's own way would round timesteps too, and sum gradients in half precision.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        _name_blocks(accelerator.state.fsdp_plugin, module)
        # It warns of views that are changed in place; the networks change nothing in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.prepare(accelerator, recipe, module, optimizer)
    return accelerator.prepare(module, optimizer)


def _name_blocks(plugin: FullyShardedDataParallelPlugin, module: nn.Module) -> None:
    """Tells FSDP2 by which parts to gather the module, unless the launcher has."""
    there = {type(part).__name__ for part in module.modules()}
    for name in plugin.transformer_cls_names_to_wrap or ():
        if name not in there:
            raise GazeError(f"fsdp_transformer_layer_cls_to_wrap has {name}, which is no part of what trains",
                            f"leave it out, for {', '.join(sorted(BLOCKS & there)) or 'all in one'}")  # fmt: skip
    module._no_split_modules = sorted(BLOCKS & there)  # type: ignore[assignment]  # as transformers names it


def leave(accelerator: Accelerator) -> None:
    """Ends the group of processes and waits for its threads, which may still need Python's lock.

    Nothing else may hold a wrapped module: the group would die with it, later, joined under that lock (pytorch issue
    56297), or with the interpreter, which ends threads that ask for the lock by abort.
    """
    accelerator.free_memory()
    accelerator.end_training()


def processes_of(accelerator: Accelerator) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
