"""A typed, validated recipe. Defaults < recipe file < `key.path=value` on the command line; YAML holds values only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffusion.errors import GazeError, nearest

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    folder: Path | None = None  # captioned pictures; None only with `drawn`
    drawn: NotNegative = 0  # draw this many pictures of coloured shapes into the run's folder instead
    size: Positive = 64  # pixels; pictures are cropped to the central square and resized
    caption_dropout: Share = 0.1  # share of visits whose caption becomes the empty prompt, anew each visit
    workers: NotNegative = 0  # processes that decode pictures
    cache_latents: bool = True  # encode each picture once, before training; needs memory for all latents


class Text(Section):
    """The text encoder (CLIP structure) and the tokenizer learned from the captions."""

    vocab_size: Positive = 4096
    window: Annotated[int, Field(ge=4)] = 32  # tokens
    width: Positive = 192
    layers: Positive = 3
    heads: Positive = 4
    token_std: Annotated[float, Field(gt=0)] = 0.5  # of fresh token embeddings

    @model_validator(mode="after")
    def _consistent(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class Model(Section):
    autoencoder: dict[str, Any] = {}  # diffusers' AutoencoderKL config, trained in the autoencoder phase
    autoencoder_from: Path | None = None  # vae/ folder for the later phases; None = the shipped model's
    text_from: Path | None = None  # folder of the text phase, to begin from; `text` then does not apply
    unet: dict[str, Any] = {}  # diffusers' UNet2DConditionModel config; latent and text sizes are filled in
    text: Text = Text()
    scheduler: dict[str, Any] = {}  # diffusers' scheduler_config.json
    save_as: Literal["float32", "float16"] = "float32"  # the exported weights
    defaults: dict[str, Any] = {}  # steps, guidance scale and sampler to suggest with the model


class Objective(Section):
    density: Literal["uniform", "log_normal"] = "uniform"  # of sigma
    log_mean: float = 0.0  # of ln sigma, for log_normal
    log_std: Annotated[float, Field(gt=0)] = 1.2
    weighting: Literal["uniform", "min_snr"] = "uniform"
    gamma: Annotated[float, Field(gt=0)] = 5.0  # of min_snr
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6  # of the autoencoder phase, per latent value


class Optimizer(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    text_share: Annotated[float, Field(gt=0)] = 1.0  # of the learning rate, for the text encoder
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    warmup: NotNegative = 0  # pictures
    decay: Literal["constant", "cosine"] = "cosine"  # to zero at the last picture
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm


class Validation(Section):
    every: NotNegative = 0  # pictures between sample grids; 0 = none
    prompts: tuple[str, ...] = ()
    seed: NotNegative = 0


class Recipe(Section):
    phase: Literal["autoencoder", "text", "diffusion"]
    out: Path  # where the run writes
    seed: NotNegative = 0
    resume: Literal["auto", "never"] = "auto"
    pictures: Positive  # how many are seen in the whole run
    batch_size: Positive = 64  # pictures per optimizer step, over all processes and accumulation steps
    gradient_accumulation_steps: Positive = 1
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    ema_half_life: NotNegative = 10_000  # pictures; 0 = no averaging
    checkpoint_every: Positive = 20_000  # pictures
    keep: Annotated[int, Field(ge=2)] = 2  # checkpoints
    log_every: Positive = 1_000  # pictures
    data: Data = Data()
    model: Model = Model()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.data.folder is None) == (self.data.drawn == 0):
            raise ValueError("data: give either folder (captioned pictures) or drawn (a number of shapes to draw)")
        if self.validation.every and not self.validation.prompts and self.phase != "autoencoder":
            raise ValueError("validation.every is set but validation.prompts is empty")
        return self

    def identity(self) -> str:
        """A hash of everything that a checkpoint depends on; where and how often a run writes is left out.

        Options at their defaults do not count, so that one added in a later version leaves old runs resumable.
        """
        values = self.model_dump(mode="json", exclude=_MAY_CHANGE, exclude_defaults=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_MAY_CHANGE: dict[str, Any] = dict.fromkeys(
    ("out", "resume", "checkpoint_every", "keep", "log_every", "validation", "compile"), True
) | {"data": {"folder", "workers"}}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe; `overrides` are `key.path=value`, the value in YAML.

    Raises GazeError that names the file or key and the nearest right one.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GazeError(f"recipe {str(path)!r} cannot be read: {error.strerror}", "one of configs/") from None
    except Exception as error:  # PyYAML has its own errors for syntax, but any for a value such as 2001-99-99
        raise GazeError(f"recipe {path} is not YAML: {error}", "check the line that the message names") from None
    if not isinstance(values, dict):
        raise GazeError(f"recipe {path} holds no keys", "start from a recipe in configs/")
    for text in overrides:
        _override(values, text)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise GazeError(f"recipe {path}: {_explain(error)}", _hint(error)) from None


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise GazeError(f"{text!r} is not of the form key.path=value", "optimizer.learning_rate=3e-4")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise GazeError(f"{text!r}: {parent!r} holds a value, not a section", "python -m train --help")
    try:
        values[last] = yaml.safe_load(value)
    except Exception as error:
        raise GazeError(f"{text!r}: the value is not YAML: {error}", "put it in quotes") from None


def _explain(error: ValidationError) -> str:
    problems = [f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()]
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def _hint(error: ValidationError) -> str:
    """For an unknown key: the keys of that section, nearest first."""
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            *parents, key = map(str, item["loc"])
            section: Any = Recipe
            for parent in parents:
                section = section.model_fields[parent].annotation
            return nearest(key, section.model_fields)
    return "the keys and their meanings stand in train/config.py"
