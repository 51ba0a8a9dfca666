"""A diffusers model folder, or a single file, <-> the objects of this package.

A folder holds model_index.json and unet/, vae/, text_encoder/, tokenizer/, scheduler/, weights as safetensors only.
generation_config.json, which diffusers ignores, holds the steps, guidance scale and sampler that suit the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .autoencoder import Autoencoder
from .clip import CLIPText
from .errors import GazeError
from .files import load_strictly, read_json, replacing, write_json
from .noise import NoiseSchedule
from .schedulers import default_name
from .single_file import open_single_file, tokenizer_folder, tokenizer_of
from .text import TextEncoder
from .unet import UNet

PARTS = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
EXTRA: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": [None, None], "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    },
}


@dataclass
class Model:
    """Everything that a prompt needs to become a picture.

    scheduler: name of the sampler that the folder's scheduler class and options ask for.
    defaults: num_inference_steps, guidance_scale and scheduler that suit the model; may be empty.
    """

    unet: UNet
    autoencoder: Autoencoder
    text: TextEncoder
    schedule: NoiseSchedule
    scheduler: str = "ddim"
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks, by the names of their folders."""
        return {"unet": self.unet, "vae": self.autoencoder, "text_encoder": self.text.model}


def load_model(path: str | Path, tokenizer: str | Path | None = None, prediction_type: str | None = None) -> Model:
    """Opens a model of Stable Diffusion 1.x or 2.x structure, weights as float32.

    path: a StableDiffusionPipeline folder, or a safetensors file in the original key layout.
    tokenizer: a tokenizer/ folder, or a model's folder that has one, instead of the model's own; a single file has none
    and takes the one beside it. prediction_type: instead of what the model says.
    Raises GazeError when the model, a part or a weight is missing or broken.
    """
    path = Path(path)
    if not path.exists():
        raise GazeError(f"model {str(path)!r} does not exist", "check the path, or leave --model out")
    model = (_from_folder if path.is_dir() else _from_file)(path, tokenizer, prediction_type)
    check_fit(model, path)
    return model


def _from_folder(folder: Path, tokenizer: str | Path | None, prediction_type: str | None) -> Model:
    index = read_json(folder / "model_index.json")
    for part in PARTS:
        entry = index.get(part)
        if not isinstance(entry, list) or not entry or None in entry or not (folder / part).is_dir():
            raise GazeError(
                f"{folder} has no {part!r}, which a text-to-image model needs",
                "save the whole pipeline with save_pretrained",
            )
    if index.get("text_encoder_2"):
        raise _two_text_encoders(folder, index.get("_class_name"))
    defaults = folder / "generation_config.json"
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(
        unet=UNet.from_pretrained(folder / "unet").eval(),
        autoencoder=Autoencoder.from_pretrained(folder / "vae"),
        text=TextEncoder.from_pretrained(
            folder / "text_encoder", tokenizer_folder(folder if tokenizer is None else tokenizer)
        ),
        schedule=NoiseSchedule.from_config(
            schedule if prediction_type is None else schedule | {"prediction_type": prediction_type}
        ),
        scheduler=default_name(str(index["scheduler"][-1]), schedule),
        defaults=read_json(defaults) if defaults.is_file() else {},
    )


def _from_file(path: Path, tokenizer: str | Path | None, prediction_type: str | None) -> Model:
    file = open_single_file(path, prediction_type)
    structure = file.structure
    if structure.pooled is not None:
        raise _two_text_encoders(path, structure.family.pipeline)
    words = tokenizer_of(file, "text_encoder", tokenizer)
    text = load_strictly(partial(CLIPText, structure.texts["text_encoder"]), file.read("text_encoder"), path)
    autoencoder = load_strictly(partial(Autoencoder, structure.vae), file.read("vae"), path)
    return Model(
        unet=load_strictly(partial(UNet, structure.unet), file.read("unet"), path).eval(),
        autoencoder=autoencoder.eval().requires_grad_(False),
        text=TextEncoder(text.eval().requires_grad_(False), words),
        schedule=NoiseSchedule.from_config(structure.schedule),
        scheduler=default_name(structure.family.scheduler, structure.schedule),
    )


def _two_text_encoders(path: Path, pipeline: object) -> GazeError:
    return GazeError(
        f"{path} is a {pipeline} with two text encoders, which the pipeline does not run yet",
        "a model of Stable Diffusion 1.x or 2.x structure",
    )


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


def model_index(pipeline: str, scheduler: str) -> dict[str, Any]:
    """The content of model_index.json. pipeline, scheduler: diffusers' classes."""
    absent = [None, None]
    common: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": version("diffusers"), **PARTS}
    common |= {"scheduler": ["diffusers", scheduler], "feature_extractor": absent, "image_encoder": absent}
    return common | EXTRA[pipeline]


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model as a StableDiffusionPipeline folder that diffusers opens, in the place of one that is there.

    Raises GazeError when `folder` holds something else.
    """
    with replacing(folder) as aside:
        scheduler = model.schedule.config["_class_name"]
        write_json(aside / "model_index.json", model_index("StableDiffusionPipeline", scheduler))
        write_json(aside / "scheduler" / "scheduler_config.json", model.schedule.config)
        write_json(aside / "generation_config.json", model.defaults)
        model.unet.save_pretrained(aside / "unet", dtype)
        model.autoencoder.save_pretrained(aside / "vae", dtype)
        model.text.save_pretrained(aside / "text_encoder", aside / "tokenizer", dtype)
