"""Half precision through Accelerate. Master weights are float32; fp16 has its losses scaled so that small gradients do
not vanish (Micikevicius et al. 2018, section 3.2).

A step whose gradient overflows is left out: its pictures count as seen, the weights stay what they are, and so they
are averaged, for the averages are over pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler

from diffusion.errors import GazeError

LEAST = 1.0  # scale; a gradient that overflows below it would do so without one


def check_precision(precision: str, device: torch.device) -> None:
    """Raises GazeError for fp16 on a CPU, where Accelerate would train in float32 without a word."""
    if precision == "fp16" and device.type == "cpu":
        raise GazeError("mixed_precision=fp16 needs a GPU, and this run is on the CPU", "mixed_precision=bf16, or no")


def skips(scaler: GradScaler | None, norm: Tensor) -> bool:
    """Whether the scaler leaves out the step of a gradient of this norm and tries the next with half the scale, as it
    does a few times in every run with fp16."""
    return scaler is not None and not bool(norm.isfinite()) and scaler.get_scale() > LEAST


def scale_of(scaler: GradScaler | None) -> dict[str, float]:
    """What the losses are multiplied with, for the log; {} where they are not."""
    return {} if scaler is None else {"loss_scale": scaler.get_scale()}
