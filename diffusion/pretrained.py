"""A diffusers model folder <-> the objects of this package.

A folder holds model_index.json and unet/, vae/, text_encoder/, tokenizer/, scheduler/, weights as safetensors only.
generation_config.json, which diffusers ignores, holds the steps, guidance scale and sampler that suit the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .autoencoder import Autoencoder
from .errors import GazeError, nearest
from .files import read_json, replacing, write_json
from .noise import NoiseSchedule
from .text import TextEncoder
from .unet import UNet

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
