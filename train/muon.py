"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are applied; AdamW for the rest.

The size of a step is Liu et al. 2025's (section 2.2): as large, root mean square, as AdamW's usually is, so that one
learning rate and one weight decay serve both. torch.optim.Muon takes matrices only; here a convolution is the matrix
that it applies to each patch, (out, in * height * width), and a fused projection is the matrices that it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .sharding import parted_like, whole

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so that five steps do
LIKE_ADAMW = 0.2  # root mean square of AdamW's usual update (Liu et al. 2025, section 2.2)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups whose "matrices" is not 0: of how many matrices, one above the other, each weight of the
    group consists. Options beside momentum are AdamW's."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.momentum = momentum
        self._step_supports_amp_scaling = False  # fused AdamW would take scaled gradients, which are not orthogonal

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained if group["matrices"] else ():
                self._step(parameter, group)
                parameter.grad = None  # AdamW then passes it over
        return super().step(closure)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(state["momentum"], self.momentum)  # Nesterov's
        # A part of a matrix has no orthogonal form of its own, so with FSDP2 every process makes that of the whole.
        all_of_it = whole(update)
        matrices = all_of_it.flatten(1).chunk(group["matrices"])
        size = LIKE_ADAMW * sqrt(max(matrices[0].shape))
        step = torch.cat([orthogonal(matrix) for matrix in matrices]).view_as(all_of_it).to(parameter.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(parted_like(parameter, step), alpha=-group["lr"] * size)


def muon_flops(group: dict[str, Any]) -> int:
    """Of one step for a group of `Muon`."""
    total = 0
    for parameter in group["params"] if group["matrices"] else ():
        rows = len(parameter) // group["matrices"]
        short, long = sorted((rows, parameter.numel() // len(parameter)))
        total += group["matrices"] * STEPS * (4 * short**2 * long + 2 * short**3)
    return total


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """The orthogonal matrix nearest to it, about: singular values between .7 and 1.2, in bf16, by Newton-Schulz steps
    (Jordan et al. 2024). A zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    wide = matrix_MN.shape[0] <= matrix_MN.shape[1]
    x_MN = (matrix_MN if wide else matrix_MN.T).bfloat16()
    x_MN = x_MN / x_MN.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram_MM = x_MN @ x_MN.T
        x_MN = torch.addmm(x_MN, torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c), x_MN, beta=a)
    return x_MN if wide else x_MN.T
