"""One picture, drawn again with other words: prompt-to-prompt (Hertz et al. 2022), also of a real picture.

Shapes: B pictures (source, target), C channels, H W latent or picture size, S tokens of the text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.alignment import Alignment, Pair, align
from diffusion.attention_sites import attending, sites
from diffusion.denoiser import Denoiser
from diffusion.errors import GazeError
from diffusion.injection import inject_cross, inject_self
from diffusion.inversion import ROUNDS, invert
from diffusion.samplers import Denoise
from diffusion.words import words_of

from .canvas import canvas
from .checks import number, whole
from .request import Plan, Request
from .text_to_image import Preview, TextToImage

CROSS, SELF = 0.8, 0.4
RESOLUTION = 32  # the paper's limit at a picture of 512 pixels


@dataclass(frozen=True)
class Edit:
    """source, target: the two pictures. alignment: which words became which. settings: of each of the two what makes it
    alone. pixels_BCHW: both, float, on the CPU, in about [-1, 1]. psnr: of the source, where it is a picture redrawn,
    dB against the "picture" and against the picture after the "autoencoder"."""

    source: Image.Image
    target: Image.Image
    alignment: list[Pair]
    settings: list[dict[str, Any]]
    pixels_BCHW: Tensor = field(repr=False)
    psnr: dict[str, float] | None = None


def edit(
    pipe: TextToImage,
    source: str,
    target: str,
    cross_steps: float = CROSS,
    self_steps: float = SELF,
    weights: Mapping[str, float] | None = None,
    resolution: int = RESOLUTION,
    show: Callable[[Preview], None] | None = None,
    rounds: int = ROUNDS,
    **options: Any,
) -> Edit:
    """Draws both prompts from the same noise, the target with the attention of the source: to the text in the first
    `cross_steps` (a share, 0 to 1) of the steps, of the picture to itself in the first `self_steps`, where a map's
    sides are at most `resolution`. 0 and 0 is the target drawn alone.

    weights: by what a word's share of the target's attention is multiplied, in the steps of cross_steps; any number.
    options: fields of `Request`. With an `image` its noise is found first: see `inverted`, also for rounds. Both are
    then guided away from the source's prompt, if no negative prompt is given (Miyake et al. 2023): this is no guidance
    for the source, so that it becomes the picture again. show: is shown every step.
    Raises GazeError for prompts whose words do not align, a weighed word that is not in the target, shares that are
    none, a model without attention to the text, and as `TextToImage.plan`.
    """
    shares = {"cross_steps": cross_steps, "self_steps": self_steps}
    for name, share in shares.items():
        if not 0 <= number(name, share) <= 1:
            raise GazeError(f"{name} is {share}", "a share of the steps, from 0 to 1")
    if not isinstance(weights, Mapping | None) or not all(isinstance(word, str) for word in weights or ()):
        raise GazeError(f"weights is {weights!r}", 'words and their numbers, such as {"hat": 2}')
    crossing = sites(pipe.model.unet, cross=True)
    if not crossing:
        raise GazeError("an edit needs attention to the text, which this model does not have", "another model")
    resolution, rounds = whole("resolution", resolution, 1), whole("rounds", rounds, 1)
    pixels_BCHW = _opened(pipe, options)
    if pixels_BCHW is not None:
        negative = options.get("negative_prompt")
        options |= {"negative_prompt": [source, source if negative is None else negative]}
    plan = pipe.plan(Request([source, target], **options))
    if plan.maps is not None:
        raise GazeError("word_maps or pixel_maps was given, but an edit has none", "the maps of one prompt, from pipe")
    if len(plan.prompts) != 2:
        raise GazeError(f"num_images is {options['num_images']}", "one edit at a time, with a seed each")
    for end in plan.dropped:
        warnings.warn(f"the prompt is longer than the model can read; ignored: {end!r}", stacklevel=2)
    alignment, scale_S = _aligned(pipe, plan, weights or {})
    # The same seed for both: a scheduler that adds noise adds the same to both.
    plan, found = replace(plan, seeds=plan.seeds[:1] * 2), None
    if pixels_BCHW is not None:
        found = inverted(pipe, source, pixels_BCHW, rounds, options)
        plan = replace(plan, start_BCHW=found.noise_BCHW.repeat(2, 1, 1, 1))

    factor = pipe.model.autoencoder.factor
    size = (plan.height // factor, plan.width // factor)
    looking = [site for site in sites(pipe.model.unet, cross=False) if max(site.size(*size)) <= resolution]
    done, total = 0, len(plan.trajectory.sigmas) - 1

    def around(denoiser: Denoiser, rows: list[int]) -> Denoise:
        cross = inject_cross(alignment, scale_S)

        def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
            with ExitStack() as stack:
                if done < round(cross_steps * total):
                    stack.enter_context(attending(crossing, cross))
                if done < round(self_steps * total):
                    stack.enter_context(attending(looking, inject_self))
                return denoiser(x_BCHW, sigma)

        return denoise

    for preview in pipe.run(plan, around):
        done = preview.index
        if show is not None:
            show(preview)
    result = preview.result()
    near = None if found is None else found.psnr(result.pixels_BCHW[:1])
    before, after = result.images
    return Edit(before, after, alignment.pairs, result.settings, result.pixels_BCHW, near)


@dataclass(frozen=True, eq=False)
class Inverted:
    """noise_BCHW: start noise of unit variance that a picture is drawn from, B = 1. pixels_BCHW: the picture in
    [-1, 1]. coded_BCHW: the picture after the autoencoder."""

    noise_BCHW: Tensor
    pixels_BCHW: Tensor
    coded_BCHW: Tensor

    def psnr(self, pixels_BCHW: Tensor) -> dict[str, float]:
        """dB of a picture against both."""
        return {"picture": psnr(pixels_BCHW, self.pixels_BCHW), "autoencoder": psnr(pixels_BCHW, self.coded_BCHW)}


@torch.inference_mode()
def inverted(
    pipe: TextToImage, prompt: str, pixels_BCHW: Tensor, rounds: int = ROUNDS, options: Mapping[str, Any] | None = None
) -> Inverted:
    """The noise of a picture in [-1, 1]: see `invert`, along the levels of the scheduler that draws, with the prompt
    alone. options: fields of `Request`; guidance, negative prompt, excite and size do not count. Raises GazeError as
    `TextToImage.plan`."""
    height, width = pixels_BCHW.shape[2:]
    alone = {"guidance_scale": 1.0, "negative_prompt": None, "excite": None, "height": height, "width": width}
    plan = pipe.plan(Request(prompt, **{**(options or {}), **alone}))
    latents_BCHW = pipe.encode(pixels_BCHW)[0].float()
    sigmas, sigma_data = plan.trajectory.sigmas, pipe.model.schedule.sigma_data
    x_BCHW = invert(pipe.denoiser(plan), latents_BCHW, sigmas, sigma_data, rounds)
    coded_BCHW = pipe.decode(latents_BCHW).float().cpu()
    return Inverted(x_BCHW / plan.trajectory.start, pixels_BCHW, coded_BCHW)


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> float:
    """dB between pixels in [-1, 1]; values beyond are clamped."""
    error = (a_BCHW.clamp(-1, 1) - b_BCHW.clamp(-1, 1)).square().mean()
    return (10 * torch.log10(4 / error)).item()


def _opened(pipe: TextToImage, options: dict[str, Any]) -> Tensor | None:
    """The pixels_BCHW of the picture among the options, if there is one; its size takes its place there."""
    picture = options.pop("image", None)
    if picture is None:
        return None
    for name in ("latents", "mask_image", "strength"):
        if options.get(name) is not None:
            raise GazeError(f"{name} was given beside a picture to edit, whose noise is found", f"leave {name} out")
    factor = pipe.model.autoencoder.factor
    opened = canvas(picture, None, None, options.get("height"), options.get("width"), factor)
    assert opened is not None
    options["height"], options["width"] = opened.pixels_BCHW.shape[2:]
    return opened.pixels_BCHW


def _aligned(pipe: TextToImage, plan: Plan, weights: Mapping[str, float]) -> tuple[Alignment, Tensor]:
    """Which words of the source, the plan's first prompt, are which of the target, and scale_S of `inject_cross`."""
    chunks = plan.chunks
    if chunks[0] != chunks[1]:
        raise GazeError(
            f"the source takes {chunks[0]} windows of the text encoder, the target {chunks[1]}",
            "prompts of about the same length",
        )
    source, target = (words_of(plan.readings[prompt][0], pipe.model.text.window, chunks[0]) for prompt in plan.prompts)
    scale_S = torch.ones(len(target.of_S))
    for word, weight in weights.items():
        scale_S[target.tokens(*target.numbers(word))] = number(f"the weight of {word!r}", weight)
    return align(source, target), scale_S
