"""A diffusers model folder, or a single file, <-> the objects of this package.

A folder holds model_index.json and unet/, vae/, text_encoder/, tokenizer/, scheduler/, weights as safetensors only.
generation_config.json, which diffusers ignores, holds the steps, guidance scale and sampler that suit the model, and
mask_padding where it was trained so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .autoencoder import Autoencoder
from .condition import Condition, blank
from .errors import GazeError
from .files import load_strictly, read_json, replacing, write_json
from .hub import local_path
from .noise import NoiseSchedule
from .schedulers import default_name
from .single_file import open_single_file, tokenizer_folder, tokenizer_of
from .structure import SIZE_NUMBERS
from .text import EMBEDDING, Readings, TextEncoder, encode
from .unet import UNet

PARTS = {
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PARTS_2 = {
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
OWN_UNET = ["gaze", "UNet"]  # a library that diffusers refuses, where it would else draw something else without a word
EXTRA: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": [None, None], "requires_safety_checker": False},
    "StableDiffusionXLPipeline": PARTS_2,
}
FORCE_ZEROS = "force_zeros_for_empty_prompt"


@dataclass
class Model:
    """Everything that a prompt needs to become a picture.

    scheduler: name of the sampler that the folder's scheduler class and options ask for.
    defaults: num_inference_steps, guidance_scale and scheduler that suit the model, and mask_padding; may be empty.
    text_2: SDXL's second text encoder, whose pooled vector the U-Net takes.
    zeros: no negative prompt means a condition of zeros, not the empty prompt (SDXL).
    """

    unet: UNet
    autoencoder: Autoencoder
    text: TextEncoder
    schedule: NoiseSchedule
    scheduler: str = "ddim"
    defaults: dict[str, Any] = field(default_factory=dict)
    text_2: TextEncoder | None = None
    zeros: bool = False

    @property
    def texts(self) -> dict[str, TextEncoder]:
        """The text encoders, by the names of their folders."""
        return {"text_encoder": self.text} | ({} if self.text_2 is None else {"text_encoder_2": self.text_2})

    @property
    def mask_padding(self) -> bool:
        """Whether the U-Net was trained without the tokens that fill the window after a prompt's end."""
        return self.defaults.get("mask_padding") is True

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net takes a mask and a masked picture's latents beside the noisy latents."""
        return self.unet.config.in_channels > self.autoencoder.latent_channels

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks, by the names of their folders."""
        return {"unet": self.unet, "vae": self.autoencoder} | {part: text.model for part, text in self.texts.items()}

    def read(self, prompt: str) -> Readings:
        """A prompt as each text encoder reads it."""
        return tuple(text.read(prompt) for text in self.texts.values())

    def encode(
        self,
        prompts: Sequence[str | Readings | None],
        sizes: Sequence[int] = (),
        chunks: int = 1,
        weighting: str = EMBEDDING,
    ) -> Condition:
        """Prompts -> their condition, see `TextEncoder.encode`. None is a row of zeros. sizes: SDXL's six numbers, see
        `UNet.vector`."""
        readings = [self.read(prompt or "") if isinstance(prompt, str | None) else prompt for prompt in prompts]
        text = encode([*self.texts.values()], readings, chunks, weighting, self.mask_padding)
        text = blank(text, torch.tensor([prompt is None for prompt in prompts], device=text.context_BSE.device))
        vector_BV = self.unet.vector(text.vector_BV, sizes)
        return Condition(text.context_BSE, vector_BV, text.weight_BS)


def load_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Opens a model of Stable Diffusion 1.x, 2.x or XL structure.

    path: a folder of diffusers' StableDiffusionPipeline or StableDiffusionXLPipeline, or its id on the hub
    (`local_path`), or a safetensors file in the original key layout.
    tokenizer: a tokenizer/ folder, or a model's folder that has one, instead of the model's own; a single file has none
    and takes the one beside it. prediction_type: instead of what the model says. dtype: of the weights.
    Raises GazeError when the model, a part or a weight is missing or broken.
    """
    path = local_path(path)
    if not os.path.exists(path):
        raise GazeError(f"model {str(path)!r} does not exist", "check the path, or leave --model out")
    model = (_from_folder if path.is_dir() else _from_file)(path, tokenizer, prediction_type, dtype)
    check_fit(model, path)
    return model


def _from_folder(folder: Path, tokenizer: str | Path | None, prediction_type: str | None, dtype: torch.dtype) -> Model:
    index = read_json(folder / "model_index.json")
    two = bool(index.get("text_encoder_2"))
    for part in PARTS | (PARTS_2 if two else {}):
        entry = index.get(part)
        if not isinstance(entry, list) or not entry or None in entry or not (folder / part).is_dir():
            raise GazeError(
                f"{folder} has no {part!r}, which a text-to-image model needs",
                "save the whole pipeline with save_pretrained",
            )
    defaults = folder / "generation_config.json"
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")

    def text(part: str) -> TextEncoder:
        own = folder / part.replace("text_encoder", "tokenizer")
        words = own if tokenizer is None else tokenizer_folder(tokenizer)
        return TextEncoder.from_pretrained(
            folder / part, words, dtype, penultimate=two, projected=part == "text_encoder_2"
        )

    return Model(
        unet=UNet.from_pretrained(folder / "unet", dtype).eval(),
        autoencoder=Autoencoder.from_pretrained(folder / "vae", dtype),
        text=text("text_encoder"),
        text_2=text("text_encoder_2") if two else None,
        zeros=two and bool(index.get(FORCE_ZEROS, True)),
        schedule=NoiseSchedule.from_config(
            schedule if prediction_type is None else schedule | {"prediction_type": prediction_type}
        ),
        scheduler=default_name(str(index["scheduler"][-1]), schedule),
        defaults=read_json(defaults) if defaults.is_file() else {},
    )


def _from_file(path: Path, tokenizer: str | Path | None, prediction_type: str | None, dtype: torch.dtype) -> Model:
    file = open_single_file(path, prediction_type)
    structure = file.structure
    words = {part: tokenizer_of(file, part, tokenizer) for part in structure.texts}
    two = "text_encoder_2" in structure.texts

    def text(part: str) -> TextEncoder:
        model = load_strictly(partial(structure.text_encoder, part), file.read(part, dtype), path)
        return TextEncoder(model.eval().requires_grad_(False), words[part], penultimate=two)

    autoencoder = load_strictly(partial(Autoencoder, structure.vae), file.read("vae", dtype), path)
    return Model(
        unet=load_strictly(partial(UNet, structure.unet), file.read("unet", dtype), path).eval(),
        autoencoder=autoencoder.eval().requires_grad_(False),
        text=text("text_encoder"),
        text_2=text("text_encoder_2") if two else None,
        zeros=two,
        schedule=NoiseSchedule.from_config(structure.schedule),
        scheduler=default_name(structure.family.scheduler, structure.schedule),
    )


def check_fit(model: Model, folder: Path) -> None:
    """Raises GazeError when the parts of a model cannot work together."""
    config, latents = model.unet.config, model.autoencoder.latent_channels
    projection = None if model.text_2 is None else model.text_2.model.text_projection
    own = model.text.width if config.addition_embed_type == "pooled" else None
    pooled = own if projection is None else projection.out_features
    vector = None if pooled is None else pooled + SIZE_NUMBERS * (config.addition_time_embed_dim or 0)
    width = sum(text.width for text in model.texts.values())
    for option, wanted, source in (
        ("in_channels", (latents, 2 * latents + 1), "the channels of vae/ ask for {0}, or {1} for inpainting"),
        ("out_channels", (latents,), "the channels of vae/ are {0}"),
        ("cross_attention_dim", (width, None), "the text encoders' width is {0}"),
        ("projection_class_embeddings_input_dim", (vector,), "the pooled text and the size numbers make {0}"),
    ):
        if getattr(config, option) not in wanted:
            raise GazeError(
                f"{folder}/unet has {option} {getattr(config, option)}, but {source.format(*wanted)}",
                "a text-to-image model (upscaling and other models take other inputs)",
            )
    if len({text.window for text in model.texts.values()}) > 1:
        raise GazeError(f"the two tokenizers of {folder} have windows of their own", "copy the folder again")


def model_index(pipeline: str, scheduler: str, zeros: bool = True) -> dict[str, Any]:
    """The content of model_index.json. pipeline, scheduler: diffusers' classes. zeros: of a model with two encoders."""
    absent = [None, None]
    common: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": version("diffusers"), **PARTS}
    common |= {"scheduler": ["diffusers", scheduler], "feature_extractor": absent, "image_encoder": absent}
    return common | EXTRA[pipeline] | ({FORCE_ZEROS: zeros} if EXTRA[pipeline] is PARTS_2 else {})


def save_model(model: Model, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the model as a folder that diffusers opens, in the place of one that is there. A U-Net that diffusers does
    not know is noted as ours in model_index.json.

    Raises GazeError when `folder` holds something else.
    """
    with replacing(folder) as aside:
        scheduler = model.schedule.config["_class_name"]
        pipeline = "StableDiffusionPipeline" if model.text_2 is None else "StableDiffusionXLPipeline"
        index = model_index(pipeline, scheduler, model.zeros)
        own = {} if model.unet.config.is_diffusers else {"unet": OWN_UNET}
        write_json(aside / "model_index.json", index | own)
        write_json(aside / "scheduler" / "scheduler_config.json", model.schedule.config)
        write_json(aside / "generation_config.json", model.defaults)
        model.unet.save_pretrained(aside / "unet", dtype)
        model.autoencoder.save_pretrained(aside / "vae", dtype)
        for part, text in model.texts.items():
            text.save_pretrained(aside / part, aside / part.replace("text_encoder", "tokenizer"), dtype)
