"""A diffusers model folder <-> the objects of this package. The one file of `diffusion` that touches the disk.

A folder holds model_index.json and unet/, vae/, text_encoder/, tokenizer/, scheduler/, weights as safetensors only.
generation_config.json, which diffusers ignores, holds the steps, guidance scale and sampler that suit the model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GazeError, nearest
from .noise import NoiseSchedule
from .unet import UNet

if TYPE_CHECKING:  # transformers and diffusers take seconds to import
    from .autoencoder import Autoencoder
    from .text import TextEncoder

SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",  # pseudo-linear multistep is not built; ddim shares its schedule and spacing
    "DDPMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LMSDiscreteScheduler": "euler",
}
PARTS = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MARKS = ("model_index.json", "vae")  # a folder with one of them holds a model, or its first part
STEM = "diffusion_pytorch_model"
M = TypeVar("M", bound=torch.nn.Module)


@dataclass
class Model:
    """Everything that a prompt needs to become a picture.

    scheduler: name of the sampler that matches the folder's scheduler class.
    defaults: num_inference_steps, guidance_scale and scheduler that suit the model; may be empty.
    """

    unet: UNet
    autoencoder: Autoencoder
    text: TextEncoder
    schedule: NoiseSchedule
    scheduler: str = "ddim"
    defaults: dict[str, Any] = field(default_factory=dict)


def load_model(folder: str | Path) -> Model:
    """Opens a StableDiffusionPipeline folder (Stable Diffusion 1.x and 2.x structure), weights as float32.

    Raises GazeError when the folder, a part or a weight is missing or broken.
    """
    from .autoencoder import Autoencoder
    from .text import TextEncoder

    folder = Path(folder)
    if not folder.is_dir():
        raise GazeError(f"model folder {str(folder)!r} does not exist", "check the path, or leave --model out")
    index = read_json(folder / "model_index.json")
    for part in PARTS:
        entry = index.get(part)
        if not isinstance(entry, list) or not entry or None in entry or not (folder / part).is_dir():
            raise GazeError(
                f"{folder} has no {part!r}, which a text-to-image model needs",
                "save the whole pipeline with save_pretrained",
            )
    if index.get("text_encoder_2"):
        raise GazeError(
            f"{folder} is a {index.get('_class_name')} with two text encoders, which the pipeline does not run yet",
            "a model of Stable Diffusion 1.x or 2.x structure",
        )
    scheduler_class = str(index["scheduler"][-1])
    if scheduler_class not in SAMPLER_OF_CLASS:
        raise GazeError(f"{folder}/scheduler is a {scheduler_class}", nearest(scheduler_class, SAMPLER_OF_CLASS))
    defaults = folder / "generation_config.json"
    model = Model(
        unet=UNet.from_pretrained(folder / "unet").eval(),
        autoencoder=Autoencoder.from_pretrained(folder / "vae"),
        text=TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        scheduler=SAMPLER_OF_CLASS[scheduler_class],
        defaults=read_json(defaults) if defaults.is_file() else {},
    )
    check_fit(model, folder)
    return model


def check_fit(model: Model, folder: Path) -> None:
    """Raises GazeError when the parts of a model cannot work together."""
    config = model.unet.config
    for option, wanted, source in (
        ("in_channels", model.autoencoder.latent_channels, "the channels of vae/"),
        ("out_channels", model.autoencoder.latent_channels, "the channels of vae/"),
        ("cross_attention_dim", model.text.width, "the width of text_encoder/"),
    ):
        if getattr(config, option) != wanted:
            raise GazeError(
                f"{folder}/unet has {option} {getattr(config, option)}, but {source} is {wanted}",
                "a text-to-image model (inpainting and upscaling models take other inputs)",
            )


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model as a StableDiffusionPipeline folder that diffusers opens, in the place of one that is there.

    Raises GazeError when `folder` holds something else.
    """
    absent = [None, None]
    with replacing(folder) as aside:
        write_json(
            aside / "model_index.json",
            {"_class_name": "StableDiffusionPipeline", "_diffusers_version": version("diffusers")}
            | {"feature_extractor": absent, "image_encoder": absent, "safety_checker": absent}
            | {"requires_safety_checker": False}
            | PARTS
            | {"scheduler": ["diffusers", model.schedule.config["_class_name"]]},
        )
        write_json(aside / "scheduler" / "scheduler_config.json", model.schedule.config)
        write_json(aside / "generation_config.json", model.defaults)
        model.unet.save_pretrained(aside / "unet", dtype)
        model.autoencoder.save_pretrained(aside / "vae", dtype)
        model.text.save_pretrained(aside / "text_encoder", aside / "tokenizer", dtype)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write into; after the block it stands in the place of `folder`, after an error nothing
    has changed. Raises GazeError when `folder` has content that is no model: it would be lost."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in MARKS):
        raise GazeError(f"{folder} holds something that is not a model; it is not overwritten", "another folder")
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    gone = folder.with_name(f"{aside.name}-old")
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            os.rename(folder, gone)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(gone, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; GazeError names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GazeError(f"{path} is missing", "a folder written by diffusers' save_pretrained has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GazeError(f"{path} cannot be read as JSON: {error}", "copy the file again") from None
    if not isinstance(value, dict):
        raise GazeError(f"{path} holds {type(value).__name__}, not a JSON object", "copy the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_weights(folder: str | Path, stem: str = STEM) -> dict[str, Tensor]:
    """The tensors of one part as float32: one file or shards, with or without the fp16 variant.

    Raises GazeError when no safetensors file is there (pickle files are never opened) or one is broken.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise GazeError(f"{path} cannot be read: {error}", "copy the file again; it may be cut short") from None
    # Copies, because what safetensors gives is the file itself, mapped into memory.
    return {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a part, fp32 preferred over the fp16 variant."""
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            if not names or any(Path(name).name != name for name in names):
                raise GazeError(f"{index} names no files of its folder", "use a copy from a source you trust")
            return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise GazeError(
            f"{folder} holds {pickled[0]}, a pickle, which can run code and is never opened",
            "save it again with save_pretrained(folder, safe_serialization=True)",
        )
    raise GazeError(f"{folder} holds no {stem}.safetensors", "copy the folder again; it may be incomplete")


def write_part(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    stem: str = STEM,
) -> None:
    """Writes config.json and one safetensors file; `dtype` converts the weights, None keeps theirs."""
    folder = Path(folder)
    write_json(folder / "config.json", config)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    weights = folder / f"{stem}.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # safetensors makes files that only their owner can read


def load_strictly(make: Callable[[], M], state: Mapping[str, Tensor], source: str | Path) -> M:
    """The module that `make` makes, with these weights, whose names and shapes must be exactly the module's.

    GazeError: with the first that are not. source: where they come from, for the message.
    """
    with torch.device("meta"):  # random weights would be thrown away
        module = make()
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, the config says {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise GazeError(
            f"the weights in {source} do not fit its config.json: {shown}", "use the config saved with the weights"
        )
    module.load_state_dict(state, strict=True, assign=True)
    return module
