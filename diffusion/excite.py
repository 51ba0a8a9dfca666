"""No named word is forgotten: pictures are moved until each has a place that attends to it.

Chefer et al. 2023 (Attend-and-Excite), eq. 1 and 2. They move the noisy picture by a fixed factor of the slope, tuned
for one model and one solver. Here the denoiser's answer is moved, as Dhariwal & Nichol 2021 guide by a classifier
(algorithm 2), so that every solver takes it; the slope's own length, which differs between models by orders of
magnitude, does not count.
"""

# Shapes: B pictures, C channels, H W latent size or size of a map, L heads, D width of a head, N tokens of the picture,
# S tokens of the text, K named words.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_sites import Site, attending, sites
from .denoiser import Denoiser, Predictor
from .errors import GazeError
from .methods import Denoise
from .unet import UNet

STRENGTH = 0.5  # how far x moves while its level falls to 1/e, in deviations of x, where a word is not attended to
LEVEL = 2  # of the maps: a quarter of the latents' sides, the paper's 16x16
TAPS = (0.1065, 0.7870, 0.1065)  # Gaussian of standard deviation 0.5, as in the paper

Tokens = Sequence[Sequence[Sequence[int]]]  # of each picture, for each named word, the places of its tokens


def coarse(unet: UNet) -> list[Site]:
    """The attentions to the text whose maps are nearest to a quarter of the latents' sides. Raises GazeError when the
    U-Net has none."""
    places = sites(unet, cross=True)
    if not places:
        raise GazeError("excite needs attention to the text, which this model does not have", "leave excite out")
    level = min((site.level for site in places), key=lambda level: abs(level - LEVEL))
    return [site for site in places if site.level == level]


def strongest(
    places: Sequence[Site], predict: Callable[[Tensor, float], Tensor], input_BCHW: Tensor, sigma: float, tokens: Tokens
) -> Tensor:
    """strongest_BK: of each named word the largest value of its map, the mean over layers and heads of its tokens'
    share of the attention, smoothed. input_BCHW, sigma: as `predict` takes them; of places of one level."""
    shares = []

    def attend(site: Site, usual: Callable[..., Tensor], q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor, *bias: Tensor):
        weights_BLNS = site.layer.weights(q_BLND, k_BLSD, *bias)
        shares.append(weights_BLNS.mean(1))
        return weights_BLNS.to(v_BLSD.dtype) @ v_BLSD

    with attending(places, attend):
        predict(input_BCHW, sigma)
    share_BSN = torch.stack(shares).mean(0).mT
    maps_BKN = torch.stack([
        torch.stack([share_SN[places_of_word].sum(0) for places_of_word in words])
        for share_SN, words in zip(share_BSN, tokens, strict=True)
    ])  # fmt: skip
    taps = torch.tensor(TAPS).to(maps_BKN)
    kernel_11HW = (taps[:, None] * taps)[None, None]
    maps_BKHW = maps_BKN.unflatten(2, places[0].size(*input_BCHW.shape[2:]))
    padded_XHW = F.pad(maps_BKHW.flatten(0, 1), (1, 1, 1, 1), mode="replicate")  # also a map of one value can be padded
    return F.conv2d(padded_XHW[:, None], kernel_11HW).flatten(1).amax(1).view(maps_BKN.shape[:2])


def excited(denoise: Denoise, denoiser: Denoiser, tokens: Tokens, sigmas: Sequence[float]) -> Denoise:
    """`denoise` with its answers moved, in the first half of the steps, so that the word attended to least is attended
    to more: along the slope of its strongest attention, by what that one lacks to 1.

    A step to a level moves x by a part of what the answer is moved by, so this is in proportion to the deviation of x
    there. denoiser: tells network and prompts, without the negative ones. sigmas: the levels of the run. Each move
    costs a call of the network on a row per picture, and its gradient. Nothing of it stays; inference mode may be on.
    Raises GazeError as `coarse`.
    """
    alone, sigma_data = denoiser.alone, denoiser.schedule.sigma_data
    places = coarse(alone.unet)
    rows = [*range(len(alone.condition))]

    def inside(x_BCHW: Tensor, sigma: float) -> Tensor:
        clean_BCHW = denoise(x_BCHW, sigma)
        if sigma <= sigmas[len(sigmas) // 2]:
            return clean_BCHW
        deviation = math.hypot(sigma_data, max(lower for lower in sigmas if lower < sigma))
        level = torch.tensor(sigma, dtype=torch.float64)
        # Tensors made in inference mode take no part in gradients; copies made here do, and so do what is made of them.
        with torch.inference_mode(False), torch.enable_grad():
            beside_BCHW = None if alone.beside_BCHW is None else alone.beside_BCHW.clone()
            predict = Predictor(alone.unet, alone.schedule, alone.condition.pick(rows), level[None], beside_BCHW)
            input_BCHW = (denoiser.schedule.scaling(level).c_in * x_BCHW).detach().requires_grad_()
            least_B = strongest(places, predict, input_BCHW, sigma, tokens).amin(1)
            (slope_BCHW,) = torch.autograd.grad(least_B.sum(), input_BCHW)
        # 0 moves nothing, and less than the smallest number that has a square moves little.
        spread_B111 = slope_BCHW.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-19)
        lacking_B111 = (1 - least_B.detach())[:, None, None, None]
        return clean_BCHW + (STRENGTH * deviation) * lacking_B111 * slope_BCHW / spread_B111

    return inside
