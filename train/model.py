"""What a diffusion run trains: a model from scratch, from a text phase, or one to fine-tune; and which part of it."""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text, E width of the text embedding, P width of
# the pooled vector.

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.autoencoder import Autoencoder
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.pretrained import Model, load_model, save_model
from diffusion.scheduler_config import kind_of
from diffusion.schedulers import default_name
from diffusion.text import TextEncoder
from diffusion.unet import UNet, UNetConfig
from pipelines.shipped import DEFAULT_MODEL, place_of

from . import config, lora
from .choice import networks, text_frozen
from .tokenizer import learn_tokenizer
from .told import condition, read

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "prediction_type": "v_prediction", "timestep_spacing": "trailing",
             "steps_offset": 1, "clip_sample": False}  # fmt: skip

OF_BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}


class Predict(nn.Module):
    """One call for Accelerate to wrap: (x, timestep, text) -> the U-Net's output. Frozen text encoders are not part of
    it, unless another one trains."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.texts = tuple(model.texts.values())
        self.unet = model.unet
        if not text_frozen(model):
            for name, network in networks(model).items():
                self.add_module(name, network)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        tokens: Sequence[Tensor] = (),
        states: tuple[Tensor, Tensor | None] | None = None,
        **told: Tensor,
    ) -> Tensor:
        """tokens: tokens_BS of each text encoder; or, where these are frozen, states: what `read` makes of them. told:
        what else `tell` says."""
        text = condition(self.unet, read(self.texts, tokens) if states is None else states, **told)
        return self.unet(x_BCHW, timestep_B, text.context_BSE, text.vector_BV, text.weight_BS)


def make_model(recipe: config.Recipe, captions: Iterable[str]) -> Model:
    """The model to train: of recipe.model.init_from, or fresh, with weights from torch's global generator.

    captions: those of the data, of which a fresh model's tokenizer is learned.
    Raises GazeError where parts or options do not go together.
    """
    return fresh_model(recipe, captions) if recipe.model.init_from is None else open_model(recipe.model)


def open_model(options: config.Model) -> Model:
    """The model to fine-tune. options.scheduler replaces single options of its own; all of them where it makes a
    flow-matching model of another one, or the other way, because the two have none in common."""
    try:
        model = load_model(place_of(options.init_from))
    except GazeError as error:
        hint = (
            "a tokenizer/ folder beside the file"
            if "--tokenizer" in error.hint
            else error.hint.partition(", or leave --")[0]
        )
        raise GazeError(f"model.init_from: {error.problem}", hint) from None
    if model.inpaints:
        raise GazeError(
            f"model.init_from {options.init_from} paints into pictures: it takes a mask, and the data have none",
            "the model that it was made from",
        )
    schedule, sampler = model.schedule, model.scheduler
    if options.scheduler:
        schedule = NoiseSchedule.from_config(overridden(schedule.config, options.scheduler))
        sampler = default_name(schedule.config["_class_name"], schedule.config)
    defaults = {**model.defaults, **suggested(options)}
    return dataclasses.replace(model, schedule=schedule, scheduler=sampler, defaults=defaults)


def fresh_model(recipe: config.Recipe, captions: Iterable[str]) -> Model:
    options, autoencoder = recipe.model, open_autoencoder(recipe.model)
    text = make_text_encoder(options, captions)
    unet = UNet(fresh_unet(recipe, autoencoder, text.width)).zero_residuals()
    schedule = NoiseSchedule.from_config(overridden(SCHEDULER, options.scheduler))
    sampler = default_name(schedule.config["_class_name"], schedule.config)
    return Model(unet, autoencoder, text, schedule, sampler, suggested(options))


def fresh_unet(recipe: config.Recipe, autoencoder: Autoencoder, text_width: int) -> UNetConfig:
    """recipe.model.unet with the sizes that follow from the other parts. Raises GazeError where it has others."""
    own, channels = recipe.model.unet, autoencoder.latent_channels
    sizes = {"sample_size": recipe.data.size // autoencoder.factor, "in_channels": channels, "out_channels": channels}
    if own.get("cross_attention_dim", text_width) is not None:
        sizes["cross_attention_dim"] = text_width
    if own.get("addition_embed_type") == "pooled":
        sizes["projection_class_embeddings_input_dim"] = text_width
    for option, value in sizes.items():
        if own.get(option, value) != value:
            raise GazeError(
                f"model.unet.{option} is {own[option]}, but the other parts make it {value}", "leave it out"
            )
    return UNetConfig.from_diffusers(sizes | own)


def overridden(scheduler: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with the recipe's own options in it; these alone where they make another kind of model,
    because the kinds have no options in common. Raises GazeError for one that the kind does not know."""
    both = {**scheduler, **own}
    kind = kind_of(both)
    spare = [option for option in own if option in OF_BETAS]
    if kind != kind_of(SCHEDULER) and spare:
        raise GazeError(
            f"model.scheduler.{spare[0]} is of a schedule of betas, and a model of {kind} has none", "leave it out"
        )
    return both if kind == kind_of(scheduler) else own


def suggested(options: config.Model) -> dict[str, Any]:
    """What the pipeline does where it is not told otherwise; what it has to do as training does goes with it."""
    return {**options.defaults, **({"mask_padding": True} if options.mask_padding else {})}


def open_autoencoder(options: config.Model) -> Autoencoder:
    return Autoencoder.from_pretrained(options.autoencoder_from or DEFAULT_MODEL / "vae")


def make_text_encoder(options: config.Model, captions: Iterable[str]) -> TextEncoder:
    """That of options.text_from; else a tokenizer learned from the captions and fresh weights."""
    if options.text_from is not None:
        folder = options.text_from
        text = TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer")
        text.model.train().requires_grad_(True)
        return text
    size = options.text
    tokenizer = learn_tokenizer(captions, size.vocab_size, size.window)
    model = CLIPText(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=size.window,
            hidden_act="gelu",
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.pad,
        )
    ).initialize()
    # CLIP's own 0.02 is far below what the layers add, and a text encoder that learns from pictures alone then forgets
    # which word it saw (docs/experiments.md).
    nn.init.normal_(model.get_parameter("embeddings.token_embedding.weight"), std=size.token_std)
    return TextEncoder(model, tokenizer)


def export(model: Model, options: config.Model, folder: Path) -> None:
    """Writes the model's folder, which diffusers opens and `open_model` too; of LoRA the matrices alone."""
    dtype = torch.float16 if options.save_as == "float16" else torch.float32
    if options.lora.rank:
        lora.save(networks(model), options.lora, folder, dtype)
    else:
        save_model(model, folder, dtype)
