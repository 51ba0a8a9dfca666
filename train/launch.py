"""What Accelerate is told: precision, accumulation, and how the processes of this run share the work."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from diffusion.errors import GazeError

from .config import Recipe
from .precision import check_precision
from .processes import Processes

# Longest that an operation over all processes may take: the first may write and encode for long while others wait. That
# one of them is gone is found sooner (company.py).
PATIENCE = timedelta(hours=6)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's object for this process. Raises GazeError for a precision that the device cannot do."""
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    check_precision(recipe.mixed_precision, accelerator.device)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate offers FSDP on accelerators only, torch on a CPU as well: so sharding can be tried without a GPU.
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if sharded and not accelerator.is_fsdp2 and accelerator.num_processes > 1:
        raise GazeError("FSDP version 1 is asked for", "fsdp_version: 2, as in configs/accelerate/fsdp.yaml")
    return accelerator


def processes_of(accelerator: Accelerator) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
