"""What a caller asks for, checked against a model: a request becomes a plan.

Shapes: B pictures of one call, C latent channels, H W latent or picture size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError, nearest
from diffusion.excite import coarse
from diffusion.guidance import Guidance
from diffusion.pretrained import Model
from diffusion.samplers import Trajectory
from diffusion.schedulers import prepare
from diffusion.text import EMBEDDING, WEIGHTINGS, Readings
from diffusion.words import words_of

from .canvas import Canvas, canvas
from .checks import MOST, first, interval, number, picture_size, texts, two, whole
from .word_maps import Wanted, wanted_maps

Picture = Image.Image | str | Path

STEPS, GUIDANCE = 50, 7.5  # where neither the request nor the model says, as in diffusers


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
    image: a picture, or its file, to start from. strength: how far to leave it, above 0 up to 1; 0.8, with a mask 1.
    mask_image: of the image's size; it is painted anew where this is white.
    guidance_rescale, guidance_interval, projected_guidance: as in `Guidance`; an end of the interval may be None.
    weighting: what weights in a prompt act on: "embedding" moves the word's states, "attention" its shares, see
        `TextEncoder.encode`.
    excite: words that no prompt may forget, see `excite.excited`; each has to be in every prompt.
    lora: what must be loaded, as in `Result.settings`; None: whatever is.
    original_size, crops_coords_top_left, target_size: what SDXL is told, pixels, height (top) first; by default the
        picture's size and (0, 0).
    word_maps: record which words each pixel looks at. pixel_maps: of these pixels, (x, y) from the left and from the
        top, which pixels they look at. The pictures stay the same to the bit.
    map_layers, map_steps, map_heads: of which attentions the maps are the mean: patterns of their names as
        "up_blocks.*", the numbers of steps and of heads, from 1; None: all. map_each_step: keep those of each step too.
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
    image: Picture | None = None
    strength: float | None = None
    mask_image: Picture | None = None
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float | None] | None = None
    projected_guidance: bool = False
    weighting: str = EMBEDDING
    excite: Sequence[str] | None = None
    lora: Sequence[dict[str, Any]] | None = None
    original_size: Sequence[int] | None = None
    crops_coords_top_left: Sequence[int] | None = None
    target_size: Sequence[int] | None = None
    word_maps: bool = False
    pixel_maps: Sequence[Sequence[int]] = ()
    map_layers: Sequence[str] | None = None
    map_steps: Sequence[int] | None = None
    map_heads: Sequence[int] | None = None
    map_each_step: bool = False


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in and every value checked.

    first: the noise level, by its number, that the run begins at; above 0 only with a picture to start from.
    sizes: SDXL's six numbers. maps: what is recorded meanwhile. noted: settings of every picture beside its own prompts
    and seed.
    """

    prompts: list[str]  # one per picture, as are the two below
    negative_prompts: list[str | None]
    seeds: list[int]
    readings: dict[str, Readings]
    trajectory: Trajectory
    guidance: Guidance
    weighting: str
    excite: list[str]
    height: int
    width: int
    start_BCHW: Tensor | None
    canvas: Canvas | None
    first: int
    sizes: list[int]
    maps: Wanted | None
    dropped: list[str]
    noted: dict[str, Any]

    @property
    def chunks(self) -> list[int]:
        """Of each picture, the chunks that its prompt and, under guidance, its negative prompt take."""

        def count(prompt: str | None) -> int:
            return 1 if prompt is None else max(len(reading.chunks) for reading in self.readings[prompt])

        negatives = self.negative_prompts if self.guidance.scale != 1 else [None] * len(self.prompts)
        return [max(count(p), count(n)) for p, n in zip(self.prompts, negatives, strict=True)]

    def settings(self) -> list[dict[str, Any]]:
        pictures = zip(self.prompts, self.negative_prompts, self.seeds, strict=True)
        return [{"prompt": p, "negative_prompt": n, "seed": s, **self.noted} for p, n, s in pictures]


def make_plan(model: Model, request: Request, loras: Sequence[dict[str, Any]] = ()) -> Plan:
    """Checks a request and fills in the model's defaults. loras: what is loaded. Raises GazeError."""
    defaults = model.defaults
    prompts = texts("prompt", request.prompt)
    none = None if model.zeros else ""
    negatives = [none] if request.negative_prompt is None else texts("negative_prompt", request.negative_prompt)
    if len(negatives) not in (1, len(prompts)):
        raise GazeError(f"{len(prompts)} prompts have {len(negatives)} negative prompts", "one for all, or one each")
    negatives = negatives * (len(prompts) // len(negatives))
    count = whole("num_images", request.num_images, 1, MOST)
    total = whole("the number of pictures", len(prompts) * count, 1, MOST)
    steps = first(request.num_inference_steps, defaults.get("num_inference_steps"), STEPS)
    scheduler = first(request.scheduler, defaults.get("scheduler"), model.scheduler)
    trajectory = prepare(scheduler, model.schedule, whole("num_inference_steps", steps, 1), request.spacing)
    guidance = Guidance(
        number("guidance_scale", first(request.guidance_scale, defaults.get("guidance_scale"), GUIDANCE)),
        number("guidance_rescale", request.guidance_rescale),
        interval(request.guidance_interval),
        request.projected_guidance,
    )
    drawn = random.SystemRandom().randrange(2**32) if request.seed is None else request.seed
    seed = whole("seed", drawn, 0, 2**63 - total)
    factor = model.autoencoder.factor
    picture = canvas(request.image, request.mask_image, request.strength, request.height, request.width, factor)
    if model.inpaints and (picture is None or picture.mask_BCHW is None):
        raise GazeError("this model paints into pictures", "a picture and a mask: image and mask_image, --init, --mask")
    if picture is None:
        height, width = picture_size(model.unet.config.sample_size, factor, request.height, request.width)
    else:
        height, width = picture.pixels_BCHW.shape[-2:]
    expected = (total, *model.autoencoder.latent_shape(height, width))
    if request.latents is not None and not isinstance(request.latents, Tensor):
        raise GazeError(f"latents are {type(request.latents).__name__}", "a torch tensor")
    if request.latents is not None and not bool(request.latents.isfinite().all()):
        raise GazeError("latents have values that are no finite numbers", "torch.randn of their shape")
    if request.latents is not None and tuple(request.latents.shape) != expected:
        raise GazeError(
            f"latents are {tuple(request.latents.shape)}, but {total} pictures of {height}x{width} take {expected}",
            "torch.randn of that shape",
        )
    if request.lora is not None and [*request.lora] != [*loras]:
        raise GazeError(f"the lora asked for is {request.lora}, loaded is {loras}", "unload_lora, load_lora")
    if request.weighting not in WEIGHTINGS:
        raise GazeError(f"unknown weighting {request.weighting!r:.100}", nearest(str(request.weighting), WEIGHTINGS))
    excite = [] if request.excite in (None, [], ()) else texts("excite", request.excite)
    if excite:
        coarse(model.unet)
    guided = [negative for negative in negatives if negative is not None] if guidance.scale != 1 else []
    readings = {prompt: model.read(prompt) for prompt in dict.fromkeys([*prompts, *guided])}
    for prompt in prompts:
        words = words_of(readings[prompt][0], model.text.window)
        for word in excite:
            words.numbers(word)
    ends = [next((reading.dropped for reading in each if reading.dropped), "") for each in readings.values()]
    sizes, told = _sizes(model, request, height, width)
    begin = 0 if picture is None else trajectory.begin(picture.strength)
    return Plan(
        prompts=[prompt for prompt in prompts for _ in range(count)],
        negative_prompts=[negative for negative in negatives for _ in range(count)],
        seeds=list(range(seed, seed + total)),
        readings=readings,
        trajectory=trajectory,
        guidance=guidance,
        weighting=request.weighting,
        excite=excite,
        height=height,
        width=width,
        start_BCHW=request.latents,
        canvas=picture,
        first=begin,
        sizes=sizes,
        maps=wanted_maps(model.unet, request, height, width, len(trajectory.sigmas) - 1 - begin),
        dropped=[end for end in ends if end],
        noted=_noted(trajectory, guidance, height, width)
        | ({} if picture is None else picture.noted)
        | ({} if request.weighting == EMBEDDING else {"weighting": request.weighting})
        | ({"excite": excite} if excite else {})
        | ({"lora": [*loras]} if loras else {})
        | told,
    )


def _noted(trajectory: Trajectory, guidance: Guidance, height: int, width: int) -> dict[str, Any]:
    noted: dict[str, Any] = {
        "scheduler": trajectory.name,
        **({} if trajectory.spacing is None else {"spacing": trajectory.spacing}),
        "num_inference_steps": trajectory.steps,
        "guidance_scale": guidance.scale,
        "height": height,
        "width": width,
    }
    if guidance.rescale:
        noted["guidance_rescale"] = guidance.rescale
    if guidance.interval != Guidance.interval:
        low, high = guidance.interval
        noted["guidance_interval"] = [low, high if math.isfinite(high) else None]
    if guidance.projected:
        noted["projected_guidance"] = True
    return noted


def _sizes(model: Model, request: Request, height: int, width: int) -> tuple[list[int], dict[str, Any]]:
    """What SDXL is told of the picture's sizes, and those that were asked for."""
    asked = {
        "original_size": request.original_size,
        "crops_coords_top_left": request.crops_coords_top_left,
        "target_size": request.target_size,
    }
    pairs = {name: two(name, pair) for name, pair in asked.items() if pair is not None}
    told = {name: [whole(name, number, 0, 2**20) for number in pair] for name, pair in pairs.items()}
    if told and model.text_2 is None:
        raise GazeError(f"{next(iter(told))} was given, but this model is not told sizes", "leave it out")
    own = {"original_size": [height, width], "crops_coords_top_left": [0, 0], "target_size": [height, width]}
    return [number for pair in (own | told).values() for number in pair], told
