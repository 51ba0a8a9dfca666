"""A diffusers model folder <-> the objects of this package. The one file of `diffusion` that touches the disk.

A folder holds model_index.json and unet/, vae/, text_encoder/, tokenizer/, scheduler/, weights as safetensors only.
generation_config.json, which diffusers ignores, holds the steps, guidance scale and sampler that suit the model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
STEM = "diffusion_pytorch_model"


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
        if not index.get(part) or not (folder / part).is_dir():
            raise GazeError(
                f"{folder} has no {part!r}, which a text-to-image model needs",
                "save the whole pipeline with save_pretrained",
            )
    if index.get("text_encoder_2"):
        raise GazeError(
            f"{folder} is a {index.get('_class_name')} with two text encoders, which the pipeline does not run yet",
            "a model of Stable Diffusion 1.x or 2.x structure",
        )
    scheduler_class = index["scheduler"][1]
    if scheduler_class not in SAMPLER_OF_CLASS:
        raise GazeError(f"{folder}/scheduler is a {scheduler_class}", nearest(scheduler_class, SAMPLER_OF_CLASS))
    defaults = folder / "generation_config.json"
    return Model(
        unet=UNet.from_pretrained(folder / "unet").eval(),
        autoencoder=Autoencoder.from_pretrained(folder / "vae"),
        text=TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        scheduler=SAMPLER_OF_CLASS[scheduler_class],
        defaults=read_json(defaults) if defaults.is_file() else {},
    )


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model as a StableDiffusionPipeline folder that diffusers opens. Replaces `folder` in one rename."""
    import diffusers

    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    absent = [None, None]
    write_json(
        aside / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
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
    replace_folder(aside, folder)


def replace_folder(new: Path, old: Path) -> None:
    """Puts folder `new` in the place of `old`, which is removed only once `new` stands."""
    gone = old.with_name(f".{old.name}-old-{uuid.uuid4().hex[:8]}")
    if old.exists():
        os.rename(old, gone)
    os.rename(new, old)
    shutil.rmtree(gone, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; GazeError names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GazeError(f"{path} is missing", "a folder written by diffusers' save_pretrained has it") from None
    except (OSError, ValueError) as error:
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
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a part, fp32 preferred over the fp16 variant."""
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if any(Path(name).name != name for name in names):
                raise GazeError(f"{index} points outside its folder", "use a copy from a source you trust")
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
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads a state dict whose names and shapes must be exactly the module's; else a GazeError with the first misfits."""
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
    module.load_state_dict(state, strict=True)
