"""The structure of a whole model, as keys and shapes of Stable Diffusion's original layout (1.x, 2.x, XL) tell it.

What they do not tell is told by metadata (`modelspec.prediction_type`, `modelspec.resolution`:
github.com/Stability-AI/ModelSpec), else by what the published models of the family have in common.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .autoencoder import Autoencoder, AutoencoderConfig
from .clip import CLIPText, CLIPTextConfig
from .errors import GazeError, nearest
from .files import shapes_of
from .header import Header
from .noise import PREDICTION_TYPES
from .original_names import Counts, original_names, original_shape
from .unet import UNet, UNetConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
HEAD_WIDTH = 64  # of every published CLIP, and of the U-Nets since Stable Diffusion 2
SIZE_NUMBERS = 6  # of a picture, embedded beside the pooled text (Podell et al. 2023, section 2.2)
IGNORED = {
    r"model_ema\.": "an averaged copy of the U-Net for training on; programs that draw take the other",
    r"first_stage_model\.loss\.": "for training the autoencoder",
    r"cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection$)": "2.x ends one layer before these",
    r".*\.(position_ids|attn_mask)$": "counts up, or hides what comes later, in every model",
    r".*\.logit_scale$": "for comparing texts with pictures",
    r".*\.transformer\.text_projection\.weight$": "of the first text encoder, whose states are taken before it",
    r"\w*(betas|alphas_cumprod\w*|variance\w*|mean_coef[12])$": "follows from the schedule",
    r"(logvar|lvlb_weights|scale_factor|denoiser\.sigmas)$": "follows from the schedule or the family",
    r"(v_pred|ztsnr)$": "without content; read as a mark of the prediction type and the schedule",
}
UNUSED = re.compile("|".join(IGNORED))
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True)
class Family:
    """What the models of a family share and a file does not say.

    mark: a key that only this family has. texts: kind (of NAMES) and prefix of each text encoder. pixels: the side of
    the pictures it was trained on, by prediction type, the default first. heads: of every level; None: HEAD_WIDTH.
    """

    name: str
    pipeline: str
    scheduler: str
    mark: str
    texts: dict[str, tuple[str, str]]
    pixels: dict[str, int]
    scaling_factor: float = 0.18215
    heads: int | None = None


SD1 = Family(
    name="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    scheduler="DDIMScheduler",
    mark="cond_stage_model.transformer.text_model.final_layer_norm.weight",
    texts={"text_encoder": ("clip", "cond_stage_model.transformer.text_model.")},
    pixels={"epsilon": 512},
    heads=8,
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    pipeline="StableDiffusionPipeline",
    scheduler="DDIMScheduler",
    mark="cond_stage_model.model.ln_final.weight",
    texts={"text_encoder": ("open_clip", "cond_stage_model.model.")},
    pixels={"v_prediction": 768, "epsilon": 512},
)
SDXL = Family(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    scheduler="EulerDiscreteScheduler",
    mark="conditioner.embedders.1.model.ln_final.weight",
    texts={
        "text_encoder": ("clip", "conditioner.embedders.0.transformer.text_model."),
        "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
    },
    pixels={"epsilon": 1024},
    scaling_factor=0.13025,
)
FAMILIES = (SD1, SD2, SDXL)


@dataclass(frozen=True)
class Structure:
    """All of a model but its weights. pooled: width of the second text encoder's pooled vector. schedule: the content
    of scheduler_config.json."""

    family: Family
    unet: UNetConfig
    vae: AutoencoderConfig
    texts: dict[str, CLIPTextConfig]
    pooled: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Names here and shapes of every tensor, by part."""
        with torch.device("meta"):
            parts = {"unet": UNet(self.unet), "vae": Autoencoder(self.vae)}
            parts |= {part: self.text_encoder(part) for part in self.texts}
        return {part: shapes_of(module.state_dict()) for part, module in parts.items()}

    def text_encoder(self, part: str) -> CLIPText:
        """A text encoder without its weights; the second one has a projection."""
        return CLIPText(self.texts[part], self.pooled if part == "text_encoder_2" else None)


class Place(NamedTuple):
    """Where an original tensor belongs: the names here of its equal parts along the rows. shape: of the original."""

    part: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


def unet_counts(unet: UNetConfig) -> Counts:
    attends = [kind.startswith("CrossAttn") for kind in unet.up_block_types]
    return Counts(len(attends), unet.per_level("layers_per_block")[0], attends)


def layout(structure: Structure) -> dict[str, Place]:
    """The place of every original tensor of a model: what both directions of a conversion go by."""
    vae = structure.vae
    kinds = {
        "unet": ("unet", UNET, unet_counts(structure.unet)),
        "vae": ("vae", VAE, Counts(len(vae.block_out_channels), vae.layers_per_block)),
        **{part: (kind, prefix, Counts()) for part, (kind, prefix) in structure.family.texts.items()},
    }
    places = {}
    for part, shapes in structure.shapes().items():
        kind, prefix, counts = kinds[part]
        names: dict[str, list[str]] = {}
        for name, original in original_names(kind, shapes, counts).items():
            names.setdefault(prefix + original, []).append(name)
        for original, own in names.items():
            shape = original_shape(original, [shapes[name] for name in own])
            places[original] = Place(part, tuple(own), shape)
    return places


def recognise(header: Header, prediction_type: str | None = None) -> Structure:
    """The structure of a model in the original layout. prediction_type: instead of what the file or its family says.

    Raises GazeError when a key that the structure is read from is missing or has another rank.
    """
    shapes = {name: entry.shape for name, entry in header.tensors.items() if not UNUSED.match(name)}
    family = next((family for family in FAMILIES if family.mark in shapes), None)
    if family is None:
        known = ", ".join(f"{family.mark} ({family.name})" for family in FAMILIES)
        raise GazeError(f"its keys are of no known structure, which has {known}", "a whole Stable Diffusion checkpoint")
    default = next(iter(family.pixels)) if side(shapes, f"{UNET}input_blocks.0.0.weight", 1) == 4 else "epsilon"
    asked = _first(prediction_type, _stated_prediction(header), default)
    if asked not in PREDICTION_TYPES:
        raise GazeError(f"unknown prediction_type {asked!r}", nearest(asked, PREDICTION_TYPES))
    texts = {part: _text_config(shapes, *names) for part, names in family.texts.items()}
    pooled = side(shapes, "conditioner.embedders.1.model.text_projection", 1) if "text_encoder_2" in texts else None
    height, width = _stated_size(header) or (family.pixels.get(asked, max(family.pixels.values())),) * 2
    vae = _vae_config(shapes, family.scaling_factor, max(height, width))
    factor = 2 ** (len(vae.block_out_channels) - 1)
    latents = (height // factor, width // factor)
    unet = _unet_config(shapes, family.heads, pooled, latents[0] if height == width else latents)
    schedule = {"_class_name": family.scheduler, **SCHEDULE, "prediction_type": asked}
    return Structure(family, unet, vae, texts, pooled, schedule | {"rescale_betas_zero_snr": "ztsnr" in header.tensors})


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _stated_prediction(header: Header) -> str | None:
    metadata = header.metadata
    stated = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key"))
    marked = "v" if "v_pred" in header.tensors else None
    return {"v": "v_prediction"}.get(stated or marked or "", stated or marked)


def _stated_size(header: Header) -> tuple[int, int] | None:
    """Height and width in pixels."""
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", header.metadata.get("modelspec.resolution", ""))
    return (int(match[2]), int(match[1])) if match else None


def side(shapes: Mapping[str, Sequence[int]], name: str, axis: int) -> int:
    """One side of a tensor. Raises GazeError when the tensor is missing or has no such side."""
    if name not in shapes:
        raise GazeError(f"missing {name}", "a whole checkpoint")
    if axis >= len(shapes[name]):
        raise GazeError(f"{name} is {list(shapes[name])}, which has too few dimensions", "a whole checkpoint")
    return shapes[name][axis]


def count(shapes: Mapping[str, Any], pattern: str, first: int = 0, stride: int = 1) -> int:
    """How many of pattern.format(first), pattern.format(first + stride), ... there are before one that is not."""
    return next(i for i, n in enumerate(itertools.count(first, stride)) if pattern.format(n) not in shapes)


def _unet_config(
    shapes: Mapping[str, Sequence[int]], heads: int | None, pooled: int | None, sample_size: int | tuple[int, int]
) -> UNetConfig:
    block, attention = f"{UNET}input_blocks.{{}}", ".1.transformer_blocks.{}.norm1.weight"
    layers = count(shapes, f"{block}.0.in_layers.0.weight", 1)
    levels = count(shapes, f"{block}.0.in_layers.0.weight", 1, layers + 1)
    starts = [block.format(1 + level * (layers + 1)) for level in range(levels)]
    channels = tuple(side(shapes, f"{start}.0.out_layers.3.weight", 0) for start in starts)
    attends = [f"{start}.1.norm.weight" in shapes for start in starts]
    # The last level's depth is the middle's; it may have attention nowhere else.
    depths = [max(count(shapes, start + attention), 1) for start in starts[:-1]]
    depths.append(count(shapes, f"{UNET}middle_block{attention}"))
    vector: dict[str, Any] = {}
    if pooled is not None:
        width = side(shapes, f"{UNET}label_emb.0.0.weight", 1)
        vector = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": width}
        vector["addition_time_embed_dim"] = (width - pooled) // SIZE_NUMBERS
    return UNetConfig(
        sample_size=sample_size,
        in_channels=side(shapes, f"{UNET}input_blocks.0.0.weight", 1),
        out_channels=side(shapes, f"{UNET}out.2.weight", 0),
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=channels,
        layers_per_block=layers,
        transformer_layers_per_block=tuple(depths),
        attention_head_dim=tuple(c // HEAD_WIDTH if heads is None else heads for c in channels),
        cross_attention_dim=side(shapes, f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        use_linear_projection=len(shapes.get(f"{UNET}middle_block.1.proj_in.weight", ())) == 2,
        **vector,
    )


def _vae_config(shapes: Mapping[str, Sequence[int]], scaling_factor: float, sample_size: int) -> AutoencoderConfig:
    levels = count(shapes, f"{VAE}encoder.down.{{}}.block.0.norm1.weight")
    layers = count(shapes, f"{VAE}encoder.down.0.block.{{}}.norm1.weight")
    return AutoencoderConfig(
        in_channels=side(shapes, f"{VAE}encoder.conv_in.weight", 1),
        out_channels=side(shapes, f"{VAE}decoder.conv_out.weight", 0),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(side(shapes, f"{VAE}encoder.down.{n}.block.0.conv2.weight", 0) for n in range(levels)),
        layers_per_block=layers,
        latent_channels=side(shapes, f"{VAE}decoder.conv_in.weight", 1),
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def _text_config(shapes: Mapping[str, Sequence[int]], kind: str, prefix: str) -> CLIPTextConfig:
    def original(name: str) -> str:
        return prefix + original_names(kind, [name], Counts())[name]

    layer = original("encoder.layers.0.layer_norm1.weight").removeprefix(prefix).replace(".0.", ".{}.")
    layers = count(shapes, prefix + layer)
    tokens, width = (side(shapes, original("embeddings.token_embedding.weight"), axis) for axis in (0, 1))
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=side(shapes, original("encoder.layers.0.mlp.fc1.weight"), 0),
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=side(shapes, original("embeddings.position_embedding.weight"), 0),
        hidden_act="quick_gelu" if kind == "clip" else "gelu",
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
    )
