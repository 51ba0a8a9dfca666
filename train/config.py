"""A typed, validated recipe. Defaults < recipe file < `key.path=value` on the command line; YAML holds values only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator, with_config
from typing_extensions import TypedDict  # before Python 3.12 pydantic does not take typing's

from diffusion.errors import GazeError, nearest


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


MOST = 2**53  # whole numbers that any reader of JSON takes exactly
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Whole, Field(gt=0, le=MOST)]
NotNegative = Annotated[Whole, Field(ge=0, le=MOST)]
Few = Annotated[Whole, Field(gt=0, le=2**16)]  # what memory or time ends far below
Share = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
# YAML takes a bare `no` for false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Captioned pictures: exactly one of folder, shards, table, dataset and drawn."""

    folder: Path | None = None  # pictures with metadata.jsonl, or with a .txt beside each
    shards: str | None = None  # folder or URL of tar shards that `python -m train data pack` wrote
    table: Path | None = None  # parquet file, or a folder of them
    dataset: str | None = None  # of the `datasets` library: a folder of save_to_disk, or a name on the hub
    drawn: NotNegative = 0  # draw this many pictures of coloured shapes into the run's folder instead
    image_column: str = "image"  # of table and dataset
    text_column: str = "text"
    split: str = "train"  # of dataset
    size: Annotated[Whole, Field(gt=0, le=8192)] = 64  # pixels of a side; with buckets, of a square of as many pixels
    bucket_step: NotNegative = 0  # sides are multiples of it and keep the picture's shape; 0 = squares only
    longest: Annotated[Real, Field(ge=1)] = 2.0  # of a bucket: the long side over the short one
    crop: Literal["center", "random"] = "center"
    flip: Share = 0.0  # share of visits whose picture is mirrored
    background: str = "white"  # under transparent pictures: a name or #rrggbb
    caption_dropout: Share = 0.1  # share of visits whose caption becomes the empty prompt, anew each visit
    held_out: Annotated[Real, Field(ge=0, lt=1)] = 0.0  # share of pictures never trained on, for the held-out loss
    window: NotNegative = 0  # shards that are shuffled together; 0 = all
    workers: Annotated[Whole, Field(ge=0, le=1024)] = 0  # processes that decode pictures
    cache_latents: bool = True  # encode each picture once, before training
    cache_text: bool = True  # encode each caption once, where the text encoders are frozen
    cache: Path | None = None  # where encoded pictures and captions are kept, for other runs too; None = out/cache


class Text(Section):
    """The text encoder (CLIP structure) and the tokenizer learned from the captions."""

    vocab_size: Annotated[Whole, Field(ge=514, le=2**20)] = 4096  # 514: each byte in and at the end of a word, two ends
    window: Annotated[Whole, Field(ge=4, le=2**16)] = 32  # tokens
    width: Few = 192
    layers: Few = 3
    heads: Few = 4
    token_std: Annotated[Real, Field(gt=0)] = 0.5  # of fresh token embeddings

    @model_validator(mode="after")
    def _consistent(self) -> Text:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class Lora(Section):
    """Low-rank matrices beside frozen layers instead of training these (Hu et al. 2021)."""

    rank: Annotated[Whole, Field(ge=0, le=2**16)] = 0  # 0 = none
    alpha: Annotated[Real, Field(gt=0)] | None = None  # None = the rank
    layers: tuple[str, ...] = (  # ends of the names of layers; the second line is what text encoders have
        "to_q", "to_k", "to_v", "to_out.0",
        "q_proj", "k_proj", "v_proj", "out_proj",
    )  # fmt: skip


@with_config(extra="forbid")
class Defaults(TypedDict, total=False):
    """What a model suggests; values as the pipeline takes them, which checks them before the run begins."""

    num_inference_steps: Any
    guidance_scale: Any
    scheduler: Any


class Model(Section):
    init_from: str | None = None  # folder, single file or hub name of a model to fine-tune; its own config then counts
    # patterns of parameter names, as "unet.*attn2*"; None = all that is fresh, and the U-Net alone with init_from
    train: tuple[str, ...] | None = None
    lora: Lora = Lora()
    autoencoder: dict[str, Any] = {}  # diffusers' AutoencoderKL config, trained in the autoencoder phase
    autoencoder_from: Path | None = None  # vae/ folder for the later phases; None = the shipped model's
    text_from: Path | None = None  # folder of the text phase, to begin from; `text` then does not apply
    # diffusers' UNet2DConditionModel config, and what docs/kinds.md adds; latent and text sizes are filled in
    unet: dict[str, Any] = {}
    text: Text = Text()
    mask_padding: bool = False  # hide the tokens past a prompt's end from the U-Net
    scheduler: dict[str, Any] = {}  # diffusers' scheduler_config.json: what is predicted, and at which noise levels
    save_as: Literal["float32", "float16"] = "float32"  # the exported weights
    defaults: Defaults = {}  # steps, guidance scale and sampler to suggest with the model

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        own = ("unet", "text", "text_from", "autoencoder", "autoencoder_from")
        spare = [name for name in own if getattr(self, name) != Model.model_fields[name].default]
        if self.init_from is not None and spare:
            raise ValueError(f"{spare[0]} does not go with init_from, whose model has its own")
        return self


class Objective(Section):
    density: Literal["uniform", "log_normal"] = "uniform"  # of sigma
    log_mean: Real = 0.0  # of ln sigma, for log_normal
    log_std: Annotated[Real, Field(gt=0)] = 1.2
    stratified: bool = True  # the levels of a global batch fall one into each of batch_size equal parts of the density
    weighting: Literal["uniform", "min_snr", "soft_min_snr", "edm"] = "uniform"
    gamma: Annotated[Real, Field(gt=0)] = 5.0  # of min_snr and soft_min_snr
    offset_noise: Annotated[Real, Field(ge=0)] = 0.0  # deviation of a constant added to each channel's noise
    grounding: Annotated[Real, Field(ge=0)] = 0.0  # of attention that lies beside the masks of its words' objects
    noises: Few = 1  # drawn per picture, of which the nearest to its latents is taken (immiscible diffusion)
    kl_weight: Annotated[Real, Field(ge=0)] = 1e-6  # of the autoencoder phase, per latent value


class Optimizer(Section):
    name: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    learning_rate: Annotated[Real, Field(gt=0)] = 1e-4
    text_share: Annotated[Real, Field(gt=0)] = 1.0  # of the learning rate, for the text encoder
    muon_share: Annotated[Real, Field(gt=0)] = 1.0  # of the learning rate, for what Muon trains
    weight_decay: Annotated[Real, Field(ge=0)] = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    momentum: Decay = 0.95  # of Muon
    warmup: NotNegative = 0  # pictures
    decay: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    decay_from: NotNegative = 0  # pictures; the rate is constant between warm-up and this
    final_share: Share = 0.0  # of the learning rate, where linear and cosine end at the last picture
    clip: Annotated[Real, Field(gt=0)] = 1.0  # largest gradient norm

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        if self.decay == "rsqrt" and not self.warmup and not self.decay_from:
            raise ValueError("decay rsqrt falls from decay_from on, or from the end of the warm-up; both are 0")
        return self


class Ema(Section):
    half_life: NotNegative = 10_000  # pictures; 0 = no averaging
    snapshots_every: NotNegative = 0  # pictures between snapshots for post-hoc averages; 0 = none
    widths: tuple[Annotated[Real, Field(gt=0, lt=0.28)], ...] = (0.05, 0.10)  # of the power functions in them

    @model_validator(mode="after")
    def _consistent(self) -> Ema:
        if self.snapshots_every and not self.widths:
            raise ValueError("snapshots_every is set, but widths is empty: nothing would be stored")
        return self


class Judging(Section):
    """How validation.judges score the averaged weights: by pictures that these draw of the judge's own prompts."""

    every: NotNegative = 0  # pictures seen between scores; 0 = as validation.every
    prompts: Positive = 120  # of each judge
    split: Literal["heldout", "seen"] = "heldout"  # what the prompts ask for: what no picture shows that trains, or not
    seed: NotNegative = 0  # picture i begins from seed + i
    batch: Few = 8  # pictures drawn at once
    num_inference_steps: Few | None = None  # None = the model's, as of guidance_scale
    guidance_scale: Real | None = None
    best: str | None = None  # the figure by which out/best is kept, as shapes/counting; None = the first judge's score


class Validation(Section):
    every: NotNegative = 0  # pictures between held-out losses and sample grids; 0 = none
    prompts: tuple[str, ...] = ()
    seed: NotNegative = 0
    bins: Few = 8  # of noise level, for the held-out loss
    pictures: Positive = 256  # at most so many of the held-out ones
    attention: bool = False  # log how these attend to the words of their captions
    judges: tuple[Literal["shapes", "scenes", "retrieval"], ...] = ()  # of what is drawn, for out/best
    judging: Judging = Judging()

    @property
    def looks(self) -> dict[str, int]:
        """In what ways a run looks at itself, and how many pictures lie between; 0 = never."""
        return {"validation": self.every, "judges": (self.judging.every or self.every) if self.judges else 0}


class Recipe(Section):
    phase: Literal["autoencoder", "text", "diffusion"]
    out: Path  # where the run writes
    seed: NotNegative = 0
    resume: str = "auto"  # auto: from the newest sound checkpoint, if any; never; or a checkpoint's folder
    pictures: Positive  # how many are seen in the whole run
    # pictures per optimizer step, over all processes and accumulation steps
    batch_size: Annotated[Whole, Field(gt=0, le=2**24)] = 64
    gradient_accumulation_steps: Positive = 1
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    mixed_precision: Precision = "no"
    compile: bool = False
    checkpoint_every: Positive = 20_000  # pictures
    keep: Annotated[Whole, Field(ge=2, le=MOST)] = 2  # checkpoints
    log_every: Positive = 1_000  # pictures
    log_samples: bool = False  # write which pictures each step saw to samples-RANK.jsonl
    trackers: tuple[str, ...] = ()  # of Accelerate: tensorboard, wandb, ...
    data: Data = Data()
    model: Model = Model()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        data = self.data
        given = [name for name in ("folder", "shards", "table", "dataset") if getattr(data, name) is not None]
        if len(given) + (data.drawn > 0) != 1:
            raise ValueError("data: give one of folder, shards, table, dataset, or drawn (a number of shapes to draw)")
        if self.pictures < self.batch_size:
            raise ValueError(f"pictures {self.pictures} is less than batch_size {self.batch_size}: not one step")
        shown = self.validation.prompts or self.validation.judges or data.held_out or self.phase == "autoencoder"
        if self.validation.every and not shown:
            raise ValueError("validation.every is set, but validation.prompts is empty and data.held_out is 0")
        if self.validation.judges and self.phase != "diffusion":
            raise ValueError(f"validation.judges look at what phase diffusion draws; this is phase {self.phase}")
        if self.validation.judges and not self.validation.looks["judges"]:
            raise ValueError("validation.judges is set, but validation.every and validation.judging.every are 0")
        if self.validation.attention and (self.phase != "diffusion" or not data.held_out):
            raise ValueError("validation.attention is of held-out pictures of phase diffusion; it needs data.held_out")
        if self.objective.grounding and (self.phase != "diffusion" or data.folder is None):
            raise ValueError("objective.grounding is of phase diffusion, with the masks of a data.folder")
        if self.objective.grounding and (self.gradient_checkpointing or self.compile):
            option = "gradient_checkpointing" if self.gradient_checkpointing else "compile"
            raise ValueError(f"objective.grounding needs the weights of attention, which {option} does not keep")
        if data.crop == "random" and data.cache_latents and self.phase != "autoencoder":
            raise ValueError("data.crop=random gives other latents at each visit; it needs data.cache_latents=false")
        if self.model.lora.rank and self.model.init_from is None:
            raise ValueError("model.lora trains beside a model's frozen layers; it needs model.init_from")
        if self.model.init_from is not None and self.phase != "diffusion":
            raise ValueError(f"model.init_from is for phase diffusion, not {self.phase}")
        return self

    def lasting(self) -> dict[str, Any]:
        """What a checkpoint depends on, as JSON; where and how often a run writes is left out."""
        return self.model_dump(mode="json", exclude=_MAY_CHANGE)

    def identity(self) -> str:
        """A hash of what a checkpoint depends on.

        Options at their defaults do not count, so that one added in a later version leaves old runs resumable.
        """
        values = self.model_dump(mode="json", exclude=_MAY_CHANGE, exclude_defaults=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_MAY_CHANGE: dict[str, Any] = dict.fromkeys(
    ("out", "resume", "checkpoint_every", "keep", "log_every", "log_samples", "trackers", "validation", "compile",
     "gradient_checkpointing"), True
) | {"data": {"folder", "shards", "table", "dataset", "workers", "cache", "cache_latents", "cache_text"}}  # fmt: skip


# Where pydantic's own words speak of Python.
SECTION = "give its keys, as {key: value}, or leave it out"
SAYS = {"extra_forbidden": "there is no such key", "missing": "it is missing", "tuple_type": "give a list, as [a, b]",
        "model_type": SECTION, "dict_type": SECTION}  # fmt: skip


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe; `overrides` are `key.path=value`, the value in YAML.

    Raises GazeError that names the file, the line or the override, and the key with the nearest right one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        json.dumps(values, default=str)  # fails where an alias leads back to where it stands
    except OSError as error:
        raise GazeError(f"recipe {str(path)!r} cannot be read: {error.strerror}", "one of configs/") from None
    except Exception as error:  # PyYAML has its own errors for syntax, but any for a value such as 2001-99-99
        raise GazeError(f"recipe {path} is not YAML: {error}", "check the line that the message names") from None
    if not isinstance(values, dict) or tree is None:
        raise GazeError(f"recipe {path} holds no keys", "start from a recipe in configs/")
    if twice := _twice(tree):
        line = twice.start_mark.line + 1
        raise GazeError(f"recipe {path}, line {line}: {twice.value!r} was given before", "one of the two")
    for override in overrides:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise GazeError(f"recipe {path}: {_explain(error, tree, overrides)}", _hint(error)) from None
    for part, (known, read) in _options_of_parts().items():
        for key in getattr(recipe.model, part):
            if key not in known and not key.startswith("_"):  # which marks notes
                place = _place(("model", part, key), tree, overrides)
                raise GazeError(f"recipe {path}: model.{part}.{key}{place}: there is no such key", nearest(key, read))
    return recipe


def _options_of_parts() -> dict[str, tuple[set[str], set[str]]]:
    """Of those parts of `model` that have a config of their own: the options that there may be, those that count."""
    from diffusion.autoencoder import AutoencoderConfig
    from diffusion.config import Config
    from diffusion.scheduler_config import READ, known_options
    from diffusion.unet import UNetConfig

    networks: dict[str, type[Config]] = {"unet": UNetConfig, "autoencoder": AutoencoderConfig}
    return {part: (of.known(), of.read()) for part, of in networks.items()} | {"scheduler": (known_options(), {*READ})}


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


def _explain(error: ValidationError, tree: yaml.Node, overrides: Sequence[str]) -> str:
    """Each problem with its key and where that stands."""
    problems = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        says = SAYS.get(item["type"], item["msg"].removeprefix("Value error, "))
        problems.append(f"{key}{_place(item['loc'], tree, overrides)}: {says}" if key else says)
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def _place(location: Sequence[int | str], tree: yaml.Node, overrides: Sequence[str]) -> str:
    """Where the key was given, in words: on the command line or in a line of the file; "" where it was not."""
    line = None
    for part in location:
        found = [pair for pair in _pairs(tree) if pair[0].value == part]
        if not found:
            break
        key, tree = found[-1]
        line = key.start_mark.line + 1
    names = [*map(str, location)]
    given = [text.partition("=")[0].split(".") for text in overrides]
    if any(key == names[: len(key)] or (line is None and names and key[: len(names)] == names) for key in given):
        return " (on the command line)"
    return "" if line is None else f" (line {line})"


def _pairs(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a section; none of a value."""
    return node.value if isinstance(node, yaml.MappingNode) else []


def _twice(tree: yaml.Node) -> yaml.Node | None:
    """A key that its section has already: YAML would take the later one without a word."""
    pending, met = [tree], set()
    while pending:
        node, names = pending.pop(), set()
        for key, value in _pairs(node) if id(node) not in met else ():
            if key.value in names:
                return key
            names.add(key.value)
            pending.append(value)
        met.add(id(node))  # an alias may lead back to where it stands
    return None


def _hint(error: ValidationError) -> str:
    """For an unknown key: the keys of that section, nearest first."""
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            *parents, key = map(str, item["loc"])
            section: Any = Recipe
            for parent in parents:
                section = section.model_fields[parent].annotation
            return nearest(key, section.__annotations__)
    return "the keys and their meanings stand in train/config.py"
