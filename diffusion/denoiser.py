"""U-Net + noise schedule + scaling + condition + guidance = one function (x, sigma) -> clean.

Shape letters: B batch, C channels, H W latent size; R rows of a condition: B, or 2B with a negative prompt for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .condition import Condition, join
from .guidance import classifier_free
from .noise import NoiseSchedule, scaling

if TYPE_CHECKING:
    from .unet import UNet


class Denoiser:
    """What a model says the clean picture is, given a noisy one.

    Keys and values of the text are computed here, once, and so are the time shifts of all levels in `sigmas`; any other
    level works too. The caller decides whether gradients are kept.

    unet: with project_context, embed_time and denoise as in `UNet`.
    condition: one row per picture, in the dtype and on the device of the unet.
    empty: the negative prompt, one row or one per picture. Without it, or at guidance scale 1, where it has no
        weight, a call costs one batch instead of two.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        condition: Condition,
        empty: Condition | None = None,
        guidance_scale: float = 1.0,
        sigmas: Tensor | Sequence[float] = (),
    ) -> None:
        self.unet, self.schedule, self.guidance_scale = unet, schedule, guidance_scale
        self.guided = empty is not None and guidance_scale != 1
        if empty is not None and self.guided:
            condition = join([empty.expand(len(condition)), condition])
        self.condition = condition
        self.texts = unet.project_context(condition.context_BSE)
        self.shifts = self.tabulate(torch.as_tensor(sigmas, dtype=torch.float64))

    def tabulate(self, sigmas: Tensor) -> dict[float, list[Tensor]]:
        """The time shifts of each level above 0, from one pass through the time embedding for all."""
        sigmas = sigmas[sigmas > 0]
        if len(sigmas) == 0:
            return {}
        vector_RV = self.condition.vector_BV
        rows = 1 if vector_RV is None else len(vector_RV)
        timesteps = self.schedule.timestep(sigmas).repeat_interleave(rows)
        vectors = None if vector_RV is None else vector_RV.repeat(len(sigmas), 1)
        blocks = [shift.split(rows) for shift in self.unet.embed_time(timesteps, vectors)]
        return {sigma: [block[i] for block in blocks] for i, sigma in enumerate(sigmas.tolist())}

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        """The clean picture clean_BCHW seen in x_BCHW at noise level sigma > 0, in the dtype of x."""
        level = torch.tensor(sigma, dtype=torch.float64)
        shifts = self.shifts.get(sigma) or self.tabulate(level[None])[sigma]
        c_skip, c_out, c_in = scaling(self.schedule.prediction_type, level)
        input_BCHW = (c_in * x_BCHW).to(self.condition.context_BSE.dtype)
        if self.guided and self.condition.vector_BV is not None:
            # With a vector the time shifts have a row per prompt, so both halves differ from the first layer on.
            input_BCHW = input_BCHW.repeat(2, 1, 1, 1)
        output = self.unet.denoise(input_BCHW, shifts, self.texts).to(x_BCHW.dtype)
        if self.guided:
            uncond, cond = output.chunk(2)
            output = classifier_free(uncond, cond, self.guidance_scale)
        return c_skip * x_BCHW + c_out * output
