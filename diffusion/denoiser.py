"""U-Net + noise schedule + scaling + condition + guidance = one function (x, sigma) -> clean.

Shape letters: B batch, C channels, H W latent size; R rows of a condition: B, or 2B with a negative prompt for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import same_rows
from .condition import Condition, join
from .guidance import Guidance, classifier_free, projected, rescaled
from .noise import NoiseSchedule

if TYPE_CHECKING:
    from .unet import KeysValues, UNet


class Predictor:
    """The U-Net's output for one condition. Keys and values of the text are computed once, at the first call, and so
    are the time shifts of all levels in `sigmas`; any other level works too."""

    def __init__(
        self, unet: UNet, schedule: NoiseSchedule, condition: Condition, sigmas: Tensor, beside_BCHW: Tensor | None
    ) -> None:
        self.unet, self.schedule, self.condition, self.sigmas = unet, schedule, condition, sigmas
        self.beside_BCHW = beside_BCHW

    @cached_property
    def texts(self) -> Sequence[KeysValues]:
        return self.unet.project_context(self.condition.context_BSE, self.condition.weight_BS)

    @cached_property
    def shifts(self) -> dict[float, list[Tensor]]:
        return self.tabulate(self.sigmas)

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

    def __call__(self, input_BCHW: Tensor, sigma: float) -> Tensor:
        """RCHW, in the dtype of the input. The rows of the condition are a multiple of the input's."""
        x_BCHW = input_BCHW if self.beside_BCHW is None else torch.cat([input_BCHW, self.beside_BCHW], dim=1)
        x_BCHW = x_BCHW.to(self.condition.context_BSE.dtype)
        if self.condition.vector_BV is not None:
            # With a vector the time shifts have a row per prompt, so the rows differ from the first layer on.
            x_BCHW = x_BCHW.repeat(len(self.condition) // len(x_BCHW), 1, 1, 1)
        shifts = self.shifts.get(sigma) or self.tabulate(torch.tensor([sigma], dtype=torch.float64))[sigma]
        output_RCHW, _ = same_rows(self.unet.denoise(x_BCHW, shifts, self.texts), self.condition.context_BSE)
        return output_RCHW.to(input_BCHW.dtype)


class Denoiser:
    """What a model says the clean picture is, given a noisy one. The caller decides whether gradients are kept.

    unet: with project_context, embed_time and denoise as in `UNet`.
    condition: one row per picture, in the dtype and on the device of the unet.
    empty: the negative prompt, one row or one per picture. Without it, or where guidance does not act, a call costs
        one batch instead of two.
    sigmas: levels that will be asked for.
    beside_BCHW: further channels of the network's input, which no noise was added to (inpainting).
    """

    def __init__(
        self,
        unet: UNet,
        schedule: NoiseSchedule,
        condition: Condition,
        empty: Condition | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008, because it is frozen
        sigmas: Tensor | Sequence[float] = (),
        beside_BCHW: Tensor | None = None,
    ) -> None:
        self.schedule, self.guidance = schedule, guidance
        levels = torch.as_tensor(sigmas, dtype=torch.float64)
        acts = torch.tensor([empty is not None and guidance.acts(level) for level in levels.tolist()], dtype=torch.bool)
        self.alone = Predictor(unet, schedule, condition, levels[~acts], beside_BCHW)
        self.both = None
        if empty is not None:
            both = join([empty.expand(len(condition)), condition])
            self.both = Predictor(unet, schedule, both, levels[acts], beside_BCHW)
        self.running: Tensor | float = 0.0  # of projected guidance

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        """The clean picture clean_BCHW seen in x_BCHW at noise level sigma > 0, in the dtype of x."""
        guidance = self.guidance
        c_skip, c_out, c_in = self.schedule.scaling(torch.tensor(sigma, dtype=torch.float64))
        if self.both is None or not guidance.acts(sigma):
            return c_skip * x_BCHW + c_out * self.alone(c_in * x_BCHW, sigma)
        uncond, cond = self.both(c_in * x_BCHW, sigma).chunk(2)
        if guidance.projected:
            self.running = c_out * (cond - uncond) + guidance.momentum * self.running
            clean = c_skip * x_BCHW + c_out * cond
            return projected(clean, self.running, guidance.scale, guidance.eta, guidance.norm)
        output = classifier_free(uncond, cond, guidance.scale)
        if guidance.rescale:
            output = rescaled(output, cond, guidance.rescale)
        return c_skip * x_BCHW + c_out * output
