"""Prompts -> pictures: text, start noise, sampler and decoder, one after the other.

Shapes: B pictures of one call, C latent channels, H W latent or picture size.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.condition import Condition
from diffusion.denoiser import Denoiser
from diffusion.errors import GazeError
from diffusion.guidance import Guidance
from diffusion.packed import pack
from diffusion.pretrained import Model, load_model
from diffusion.samplers import Denoise, PictureNoise, Step, Trajectory
from diffusion.schedulers import prepare

from .images import to_pil

DEFAULT_MODEL = Path(__file__).parent / "models" / "emoji"


@dataclass(frozen=True)
class Request:
    """What a caller asks for. Names and meanings are diffusers'; None takes the model's default.

    prompt: one or several; "" is a prompt too and means any picture.
    negative_prompt: one for all prompts or one for each; no effect at guidance_scale 1.
    seed: picture i has seed + i, counted over the prompts and for each over num_images; None draws one.
    scheduler: name of a sampler, with options as in "ddim:eta=0.5", or a diffusers scheduler object (it is copied).
    spacing: of its noise levels: karras, exponential, beta, linear, trailing or leading.
    height, width: pixels, multiples of the autoencoder's factor.
    latents: start noise of unit variance, BCHW, instead of the seeds' own.
    guidance_rescale, guidance_interval, projected_guidance: as in `Guidance`; an end of the interval may be None.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_images: int = 1
    scheduler: Any = None
    spacing: str | None = None
    height: int | None = None
    width: int | None = None
    latents: Tensor | None = None
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float | None] | None = None
    projected_guidance: bool = False


@dataclass(frozen=True)
class Result:
    """settings: of every picture, what makes it again. dropped: the ends of prompts that the model could not read."""

    images: list[Image.Image]
    seeds: list[int]
    settings: list[dict[str, Any]]
    pixels_BCHW: Tensor = field(repr=False)  # float, on the CPU, in about [-1, 1]
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in and every value checked."""

    prompts: list[str]  # one per picture, as are the two below
    negative_prompts: list[str]
    seeds: list[int]
    trajectory: Trajectory
    guidance: Guidance
    height: int
    width: int
    start_BCHW: Tensor | None
    dropped: list[str]

    def settings(self) -> list[dict[str, Any]]:
        spacing = self.trajectory.spacing
        common: dict[str, Any] = {
            "scheduler": self.trajectory.name,
            **({} if spacing is None else {"spacing": spacing}),
            "num_inference_steps": self.trajectory.steps,
            "guidance_scale": self.guidance.scale,
            "height": self.height,
            "width": self.width,
        }
        if self.guidance.rescale:
            common["guidance_rescale"] = self.guidance.rescale
        if self.guidance.interval != Guidance.interval:
            low, high = self.guidance.interval
            common["guidance_interval"] = [low, high if math.isfinite(high) else None]
        if self.guidance.projected:
            common["projected_guidance"] = True
        pictures = zip(self.prompts, self.negative_prompts, self.seeds, strict=True)
        return [{"prompt": p, "negative_prompt": n, "seed": s, **common} for p, n, s in pictures]


@dataclass(frozen=True)
class Preview:
    """One step done: `index` of `total`, counted from 1. Of a diffusers scheduler, one network call."""

    index: int
    total: int
    step: Step
    plan: Plan = field(repr=False)
    pipe: TextToImage = field(repr=False)

    @property
    def sigma(self) -> float:
        """The noise level left."""
        return self.step.sigma

    def images(self) -> list[Image.Image]:
        """What the pictures would be if the model's present guess were the end; after the last step, what they are."""
        return to_pil(self._pixels_BCHW())

    def result(self) -> Result:
        """The pictures as `images` has them, with all that belongs to them."""
        pixels_BCHW = self._pixels_BCHW().float().cpu()
        return Result(to_pil(pixels_BCHW), self.plan.seeds, self.plan.settings(), pixels_BCHW, self.plan.dropped)

    def _pixels_BCHW(self) -> Tensor:
        if self.index < self.total:
            return self.pipe.decode(self.step.clean_BCHW)
        # A schedule may end above zero noise; diffusers then decodes what is left, brought to unit variance.
        return self.pipe.decode(self.step.x_BCHW / math.hypot(1.0, self.step.sigma))


class TextToImage:
    """A model, ready to make pictures. Holds no state between calls: threads may share it."""

    def __init__(self, model: Model):
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
    ) -> TextToImage:
        """Opens a folder that StableDiffusionPipeline.save_pretrained or our training wrote, or a single file in the
        original key layout; None: the shipped model. tokenizer, prediction_type: see `load_model`.

        Raises GazeError when the model is missing, broken or of another kind.
        """
        model = load_model(DEFAULT_MODEL if path is None else path, tokenizer, prediction_type)
        pack(model.unet)
        return cls(model)

    def to(self, *args: Any, **kwargs: Any) -> TextToImage:
        """Moves the model to a device, a dtype or both, as torch.nn.Module.to does."""
        for module in self.model.modules.values():
            module.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> Result:
        """Makes the pictures. Options: the fields of `Request`. Raises GazeError for a value that cannot be met."""
        for preview in self.steps(prompt, **options):
            last = preview
        return last.result()

    def steps(self, prompt: str | Sequence[str], **options: Any) -> Iterator[Preview]:
        """The same work one step at a time: the caller's loop may show previews, stop, or take the last's result().

        Arguments and errors as above; errors come with the call. Warns when a prompt is longer than the model can read.
        """
        plan = self.plan(Request(prompt, **options))
        for end in plan.dropped:
            warnings.warn(f"the prompt is longer than the model can read; ignored: {end!r}", stacklevel=2)
        return self._run(plan)

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> pixels in about [-1, 1], BCHW."""
        autoencoder = self.model.autoencoder
        return autoencoder.decode(latents_BCHW.to(next(autoencoder.parameters()).dtype))

    @torch.inference_mode()
    def _run(self, plan: Plan) -> Iterator[Preview]:
        generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds]
        noise = PictureNoise(generators, self._latent_shape(plan.height, plan.width), self.device)
        start_BCHW = noise() if plan.start_BCHW is None else plan.start_BCHW.to(self.device, torch.float32)
        x_BCHW = start_BCHW * plan.trajectory.start
        for index, step in enumerate(plan.trajectory.run(self._denoiser(plan), x_BCHW, noise=noise), start=1):
            yield Preview(index, len(plan.trajectory.sigmas) - 1, step, plan, self)

    def _denoiser(self, plan: Plan) -> Denoise:
        """The denoiser of all pictures. Prompts of as many chunks share calls of the U-Net; a picture is then the same
        whatever else is made with it."""
        text, sigmas, parts = self.model.text, plan.trajectory.sigmas, []
        guided = plan.guidance.scale != 1
        lengths = [max(len(text.read(words).chunks) for words in ((prompt, negative) if guided else (prompt,)))
                   for prompt, negative in zip(plan.prompts, plan.negative_prompts, strict=True)]  # fmt: skip
        for length in sorted(set(lengths)):
            rows = [row for row, chunks in enumerate(lengths) if chunks == length]
            condition = self._encode([plan.prompts[row] for row in rows], length)
            empty = self._encode([plan.negative_prompts[row] for row in rows], length) if guided else None
            denoiser = Denoiser(self.model.unet, self.model.schedule, condition, empty, plan.guidance, sigmas)
            parts.append((rows, denoiser))
        if len(parts) == 1:
            return parts[0][1]

        def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
            clean_BCHW = torch.empty_like(x_BCHW)
            for rows, denoiser in parts:
                clean_BCHW[rows] = denoiser(x_BCHW[rows], sigma)
            return clean_BCHW

        return denoise

    def _encode(self, prompts: list[str], chunks: int) -> Condition:
        """One row per prompt; a prompt that occurs again is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        condition = self.model.text.encode(distinct, chunks)
        rows = [distinct.index(prompt) for prompt in prompts]
        vector_BV = condition.vector_BV
        return Condition(condition.context_BSE[rows], None if vector_BV is None else vector_BV[rows])

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        autoencoder = self.model.autoencoder
        return autoencoder.latent_channels, height // autoencoder.factor, width // autoencoder.factor

    def plan(self, request: Request) -> Plan:
        """Checks a request and fills in the model's defaults. Raises GazeError."""
        defaults = self.model.defaults
        prompts = _texts("prompt", request.prompt)
        negatives = _texts("negative_prompt", "" if request.negative_prompt is None else request.negative_prompt)
        if len(negatives) not in (1, len(prompts)):
            raise GazeError(
                f"{len(prompts)} prompts have {len(negatives)} negative prompts", "one for all, or one each"
            )
        negatives = negatives * (len(prompts) // len(negatives))
        count = _whole("num_images", request.num_images, 1)
        total = len(prompts) * count
        scheduler = _first(request.scheduler, defaults.get("scheduler"), self.model.scheduler)
        steps = _first(request.num_inference_steps, defaults.get("num_inference_steps"), 50)
        scale = _number("guidance_scale", _first(request.guidance_scale, defaults.get("guidance_scale"), 7.5))
        rescale = _number("guidance_rescale", request.guidance_rescale)
        low, high = _interval(request.guidance_interval)
        first = random.SystemRandom().randrange(2**32) if request.seed is None else request.seed
        seed = _whole("seed", first, 0, 2**63 - total)
        height, width = self._size(request)
        start_BCHW, expected = request.latents, (total, *self._latent_shape(height, width))
        if start_BCHW is not None and tuple(start_BCHW.shape) != expected:
            raise GazeError(
                f"latents are {tuple(start_BCHW.shape)}, but {total} pictures of {height}x{width} take {expected}",
                "torch.randn of that shape",
            )
        read = prompts + negatives if scale != 1 else prompts
        return Plan(
            prompts=[prompt for prompt in prompts for _ in range(count)],
            negative_prompts=[negative for negative in negatives for _ in range(count)],
            seeds=list(range(seed, seed + total)),
            trajectory=prepare(
                scheduler, self.model.schedule, _whole("num_inference_steps", steps, 1), request.spacing
            ),
            guidance=Guidance(scale, rescale, (low, high), request.projected_guidance),
            height=height,
            width=width,
            start_BCHW=start_BCHW,
            dropped=[end for prompt in dict.fromkeys(read) if (end := self.model.text.read(prompt).dropped)],
        )

    def _size(self, request: Request) -> tuple[int, int]:
        trained, factor = self.model.unet.config.sample_size, self.model.autoencoder.factor
        return picture_size(trained, factor, request.height, request.width)


def picture_size(
    trained: int | tuple[int, int] | None, factor: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels: asked for, else those the model was trained at, which are given as latents.

    Raises GazeError when neither is known, and for a side that the factor does not divide.
    """
    own = trained if isinstance(trained, tuple) else (trained, trained)
    sides = []
    for name, asked, latent in zip(("height", "width"), (height, width), own, strict=True):
        side = asked if asked is not None or latent is None else latent * factor
        if side is None:
            raise GazeError(f"this model does not say its picture size, and no {name} was given", f"{name}=512")
        if _whole(name, side, 1) % factor:
            below, above = max(side // factor, 1) * factor, (side // factor + 1) * factor
            raise GazeError(f"{name} is {side}; this model makes multiples of {factor}", f"{below} or {above}")
        sides.append(side)
    return sides[0], sides[1]


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _whole(name: str, value: Any, least: int, most: int = 2**63) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = "" if most == 2**63 else f" and at most {most}"
        raise GazeError(f"{name} is {value!r}", f"a whole number, at least {least}{limit}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GazeError(f"{name} is {value!r}", "a number; guidance_scale 1 turns guidance off")
    return float(value)


def _interval(value: Any) -> tuple[float, float]:
    ends = [None, None] if value is None else value if isinstance(value, list | tuple) else []
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float | None) for end in ends):
        raise GazeError(f"guidance_interval is {value!r}", "two noise levels, the lower first, such as (0.2, 5)")
    low, high = (whole if end is None else float(end) for end, whole in zip(ends, Guidance.interval, strict=True))
    return low, high


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise GazeError(f"{name} is {value!r}", "a text or a list of texts")
    return texts
