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
from diffusion.packed import pack
from diffusion.pretrained import Model, load_model
from diffusion.samplers import Sampler, Step, sampler

from .images import to_pil

DEFAULT_MODEL = Path(__file__).parent / "models" / "emoji"


@dataclass(frozen=True)
class Request:
    """What a caller asks for. Names and meanings are diffusers'; None takes the model's default.

    prompt: one or several; "" is a prompt too and means any picture.
    negative_prompt: one for all prompts or one for each; no effect at guidance_scale 1.
    seed: picture i has seed + i, counted over the prompts and for each over num_images; None draws one.
    scheduler: name of a sampler.
    height, width: pixels, multiples of the autoencoder's factor.
    latents: start noise of unit variance, BCHW, instead of the seeds' own.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_images: int = 1
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    latents: Tensor | None = None


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
    sampler: Sampler
    sigmas: Tensor
    guidance_scale: float
    height: int
    width: int
    start_BCHW: Tensor | None
    dropped: list[str]

    def settings(self) -> list[dict[str, Any]]:
        common = {
            "scheduler": self.sampler.name,
            "num_inference_steps": len(self.sigmas) - 1,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        pictures = zip(self.prompts, self.negative_prompts, self.seeds, strict=True)
        return [{"prompt": p, "negative_prompt": n, "seed": s, **common} for p, n, s in pictures]


@dataclass(frozen=True)
class Preview:
    """One step done: `index` of `total`, counted from 1."""

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
    def from_pretrained(cls, folder: str | Path | None = None) -> TextToImage:
        """Opens a folder that StableDiffusionPipeline.save_pretrained or our training wrote; None: the shipped model.

        Raises GazeError when the folder is missing, broken or of another kind.
        """
        model = load_model(DEFAULT_MODEL if folder is None else folder)
        pack(model.unet)
        return cls(model)

    def to(self, *args: Any, **kwargs: Any) -> TextToImage:
        """Moves the model to a device, a dtype or both, as torch.nn.Module.to does."""
        for module in (self.model.unet, self.model.autoencoder, self.model.text.model):
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
        condition = self._encode(plan.prompts)
        empty = self._encode(plan.negative_prompts) if plan.guidance_scale != 1 else None
        generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds]
        shape = self._latent_shape(plan.height, plan.width)

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        schedule, sigmas = self.model.schedule, plan.sigmas
        denoiser = Denoiser(self.model.unet, schedule, condition, empty, plan.guidance_scale, sigmas)
        start_BCHW = noise() if plan.start_BCHW is None else plan.start_BCHW.to(self.device, torch.float32)
        x_BCHW = start_BCHW * plan.sampler.start(schedule, sigmas)
        for index, step in enumerate(plan.sampler.run(denoiser, x_BCHW, sigmas, noise), start=1):
            yield Preview(index, len(sigmas) - 1, step, plan, self)

    def _encode(self, prompts: list[str]) -> Condition:
        """One row per prompt; a prompt that occurs again is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        condition = self.model.text.encode(distinct)
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
        method = sampler(_first(request.scheduler, defaults.get("scheduler"), self.model.scheduler))
        steps = _first(request.num_inference_steps, defaults.get("num_inference_steps"), 50)
        scale = _number("guidance_scale", _first(request.guidance_scale, defaults.get("guidance_scale"), 7.5))
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
            sampler=method,
            sigmas=method.sigmas(self.model.schedule, _whole("num_inference_steps", steps, 1)),
            guidance_scale=scale,
            height=height,
            width=width,
            start_BCHW=start_BCHW,
            dropped=[end for prompt in dict.fromkeys(read) if (end := self.model.text.dropped(prompt))],
        )

    def _size(self, request: Request) -> tuple[int, int]:
        """Height and width in pixels: asked for, else those the model was trained at."""
        factor = self.model.autoencoder.factor
        trained = self.model.unet.config.sample_size
        own = trained if isinstance(trained, tuple) else (trained, trained)
        sides = []
        for name, asked, latent in zip(("height", "width"), (request.height, request.width), own, strict=True):
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
        raise GazeError(f"{name} is {value!r}", "a number such as 7.5; 1 turns guidance off")
    return float(value)


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise GazeError(f"{name} is {value!r}", "a text or a list of texts")
    return texts
