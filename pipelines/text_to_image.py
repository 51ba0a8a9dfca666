"""Prompts -> pictures: text, start noise, sampler and decoder, one after the other.

Shapes: B pictures of one call, C latent channels, H W latent or picture size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.condition import Condition
from diffusion.denoiser import Denoiser
from diffusion.excite import excited
from diffusion.lora import add_lora
from diffusion.packed import pack
from diffusion.placement import check_dtype, visiting
from diffusion.pretrained import Model, load_model
from diffusion.samplers import Denoise, PictureNoise, Step
from diffusion.words import words_of

from .canvas import Start, start
from .images import to_pil
from .request import Plan, Request, make_plan
from .shipped import place_of
from .word_maps import Group, PixelMaps, Recording, WordMaps, pixel_maps, word_maps

Around = Callable[[Denoiser, list[int]], Denoise]


@dataclass(frozen=True)
class Result:
    """settings: of every picture, what makes it again. dropped: the ends of prompts that the model could not read.
    word_maps, pixel_maps: of every picture, where they were asked for."""

    images: list[Image.Image]
    seeds: list[int]
    settings: list[dict[str, Any]]
    pixels_BCHW: Tensor = field(repr=False)  # float, on the CPU, in about [-1, 1]
    dropped: list[str] = field(default_factory=list)
    word_maps: list[WordMaps] = field(default_factory=list)
    pixel_maps: list[PixelMaps] = field(default_factory=list)


@dataclass(frozen=True)
class Preview:
    """One step done: `index` of `total`, counted from 1. Of a diffusers scheduler, one network call."""

    index: int
    total: int
    step: Step
    plan: Plan = field(repr=False)
    pipe: TextToImage = field(repr=False)
    recorded: list[Group] = field(default_factory=list, repr=False)

    @property
    def sigma(self) -> float:
        """The noise level left."""
        return self.step.sigma

    @property
    def word_maps(self) -> list[WordMaps]:
        """Of each picture, of the steps so far; none where none were asked for or the first of them is to come."""
        return word_maps(self.plan, self.recorded)

    @property
    def pixel_maps(self) -> list[PixelMaps]:
        """As `word_maps`."""
        return pixel_maps(self.plan, self.recorded)

    def images(self) -> list[Image.Image]:
        """What the pictures would be if the model's present guess were the end; after the last step, what they are."""
        return to_pil(self._pixels_BCHW())

    def result(self) -> Result:
        """The pictures as `images` has them, with all that belongs to them."""
        pixels_BCHW = self._pixels_BCHW().float().cpu()
        return Result(
            to_pil(pixels_BCHW),
            self.plan.seeds,
            self.plan.settings(),
            pixels_BCHW,
            self.plan.dropped,
            self.word_maps,
            self.pixel_maps,
        )

    def _pixels_BCHW(self) -> Tensor:
        if self.index < self.total:
            return self.pipe.decode(self.step.clean_BCHW)
        # A schedule may end above zero noise; diffusers then decodes what is left, brought to unit variance.
        return self.pipe.decode(self.step.x_BCHW / math.hypot(1.0, self.step.sigma))


class TextToImage:
    """A model, ready to make pictures. Calls leave nothing behind: threads may share it."""

    def __init__(self, model: Model):
        self.model = model
        self.tile: int | None = None
        self._loras: list[dict[str, Any]] = []
        self._added = ExitStack()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TextToImage:
        """Opens a folder that StableDiffusionPipeline.save_pretrained or our training wrote, a model of the hub by its
        id, a single file in the original key layout, or a shipped model by its name, "emoji" or "shapes"; None: the
        former. The other arguments: see `load_model`.

        Raises GazeError when the model is missing, broken or of another kind.
        """
        model = load_model(place_of(path), tokenizer, prediction_type, dtype)
        pack(model.unet)
        return cls(model)

    def to(self, *args: Any, **kwargs: Any) -> TextToImage:
        """Moves the model to a device, a dtype or both, as torch.nn.Module.to does."""
        for module in self.model.modules.values():
            module.to(*args, **kwargs)
        return self

    def offload(self) -> TextToImage:
        """Keeps all networks but the U-Net on the CPU; each then moves to the U-Net's device for as long as it is used.

        `to` moves all of them, so the order is pipe.to("cuda").offload().
        """
        for name, module in self.model.modules.items():
            if name != "unet":
                module.to("cpu")
        return self

    def tile_vae(self, tile: int | None = 512) -> TextToImage:
        """Has pictures decoded and encoded one by one, in tiles as `Autoencoder.decode` says; None: all and whole.

        Raises GazeError for a size that this model cannot have.
        """
        if tile is not None:
            self.model.autoencoder.latent_overlap(tile)
        self.tile = tile
        return self

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Adds a LoRA to every picture from now on; several add up. Files, weights and errors are those of `add_lora`.

        No other thread may be making pictures meanwhile.
        """
        self._added.callback(add_lora(self.model.modules, path, weight))
        self._loras.append({"path": str(path), "weight": weight})

    def unload_lora(self) -> None:
        """Takes off all that `load_lora` added; pictures are then bit-equal to those before. Threads as there."""
        self._added.close()
        self._loras.clear()

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
        return self.run(plan)

    def plan(self, request: Request) -> Plan:
        """Checks a request and fills in the model's defaults. Raises GazeError."""
        check_dtype(next(self.model.unet.parameters()).dtype, self.device)
        return make_plan(self.model, request, self._loras)

    @torch.inference_mode()
    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> mean and standard deviation of their scaled latents, each BCHW."""
        autoencoder = self.model.autoencoder
        with visiting(autoencoder, self.device):
            return autoencoder.encode(pixels_BCHW.to(next(autoencoder.parameters())), self.tile)

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents -> pixels in about [-1, 1], BCHW."""
        autoencoder = self.model.autoencoder
        with visiting(autoencoder, self.device):
            return autoencoder.decode(latents_BCHW.to(next(autoencoder.parameters()).dtype), self.tile)

    @torch.inference_mode()
    def run(self, plan: Plan, around: Around | None = None) -> Iterator[Preview]:
        """Carries a plan out. around: makes another denoiser of one and the numbers of the pictures it is for, called
        once for each group of prompts of equal length; to watch or to steer."""
        generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds]
        shape = self.model.autoencoder.latent_shape(plan.height, plan.width)
        noise = PictureNoise(generators, shape, self.device)
        begin = self._start(plan, noise)
        recording = None if plan.maps is None else Recording(plan, plan.maps, self.model.text.window)
        around = around if recording is None else recording.around(around)
        denoise = begin.around(self.denoiser(plan, begin.beside_BCHW, around))
        sigmas = plan.trajectory.sigmas[plan.first :]
        total = len(sigmas) - 1
        for index, step in enumerate(plan.trajectory.run(denoise, begin.x_BCHW, noise=noise, sigmas=sigmas), start=1):
            recorded = [] if recording is None else recording.end_step()
            yield Preview(index, total, begin.end(step) if index == total else step, plan, self, recorded)

    def _start(self, plan: Plan, noise: PictureNoise) -> Start:
        trajectory, given_BCHW = plan.trajectory, plan.start_BCHW
        sigma = trajectory.sigmas[plan.first].item()

        def first_noise() -> Tensor:
            return noise() if given_BCHW is None else given_BCHW.to(self.device, torch.float32)

        def encode(pixels_BCHW: Tensor) -> Tensor:
            mean_BCHW, deviation_BCHW = self.encode(pixels_BCHW)
            return mean_BCHW.float() + deviation_BCHW.float() * noise()

        if plan.canvas is None:
            return Start(first_noise() * trajectory.start, sigma)
        return start(plan.canvas, encode, first_noise, sigma, trajectory.start, self.model.inpaints)

    @torch.inference_mode()
    def denoiser(self, plan: Plan, beside_BCHW: Tensor | None = None, around: Around | None = None) -> Denoise:
        """The denoiser of all pictures of a plan. Prompts of as many chunks share calls of the U-Net; a picture is then
        the same whatever else is made with it. beside_BCHW: see `Denoiser`; around: see `run`."""
        parts: list[tuple[list[int], Denoise]] = []
        guided, lengths = plan.guidance.scale != 1, plan.chunks
        model, sigmas = self.model, plan.trajectory.sigmas[plan.first :]
        with ExitStack() as stack:
            for text in model.texts.values():
                stack.enter_context(visiting(text.model, self.device))
            for length in sorted(set(lengths)):
                rows = [row for row, own in enumerate(lengths) if own == length]
                condition = self._encode(plan, [plan.prompts[row] for row in rows], length)
                empty = self._encode(plan, [plan.negative_prompts[row] for row in rows], length) if guided else None
                beside = None if beside_BCHW is None else beside_BCHW[rows]
                denoiser = Denoiser(model.unet, model.schedule, condition, empty, plan.guidance, sigmas, beside)
                alone = denoiser if around is None else around(denoiser, rows)
                parts.append((rows, self._excited(plan, rows, length, denoiser, alone) if plan.excite else alone))
        if len(parts) == 1:
            return parts[0][1]

        def denoise(x_BCHW: Tensor, sigma: float) -> Tensor:
            clean_BCHW = torch.empty_like(x_BCHW)
            for rows, denoiser in parts:
                clean_BCHW[rows] = denoiser(x_BCHW[rows], sigma)
            return clean_BCHW

        return denoise

    def _excited(self, plan: Plan, rows: list[int], chunks: int, denoiser: Denoiser, denoise: Denoise) -> Denoise:
        """See `excite.excited`."""
        sigmas, tokens = plan.trajectory.sigmas[plan.first :], []
        for row in rows:
            words = words_of(plan.readings[plan.prompts[row]][0], self.model.text.window, chunks)
            tokens.append([words.tokens(*words.numbers(word)) for word in plan.excite])
        return excited(denoise, denoiser, tokens, sigmas.tolist())

    def _encode(self, plan: Plan, prompts: Sequence[str | None], chunks: int) -> Condition:
        """One row per prompt; a prompt that occurs again is encoded once. None is a row of zeros."""
        distinct = list(dict.fromkeys(prompts))
        readings = [None if prompt is None else plan.readings[prompt] for prompt in distinct]
        condition = self.model.encode(readings, plan.sizes, chunks, plan.weighting)
        return condition.pick([distinct.index(prompt) for prompt in prompts])
