"""Narrow models of Stable Diffusion's own structures, put together by diffusers: what a single file can tell, it tells
of these (32 groups, 8 heads or heads of width 64), unlike of `small_pipeline`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.small_pipeline import WINDOW, tokenizer

FAMILIES = ("sd1", "sd2", "sdxl")
NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
# Three levels, so that the first, the last and one between differ.
ATTENDS = {"sd1": (True, True, False), "sd2": (True, True, False), "sdxl": (False, True, True)}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "sd2": {
        "block_out_channels": (64, 128, 128),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 64 + 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96 + 6 * 32,
    },
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def text_config(width: int, act: str, **options: Any) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=WINDOW,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **options,
    )


def narrow_pipeline(family: str, prediction_type: str | None = None) -> DiffusionPipeline:
    """32-pixel pictures from 16x16 latents; the weights are always the same."""
    attends = ATTENDS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            layers_per_block=2,
            down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            **UNETS[family],
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            sample_size=32,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        )
        text_encoder = CLIPTextModel(text_config(64, "gelu" if family == "sd2" else "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(128, "gelu", projection_dim=96))
        for part in (unet, vae, text_encoder, text_encoder_2):  # biases and norms of fresh weights are all alike
            for weight in part.parameters():
                weight.data += 0.02 * torch.randn_like(weight)
    schedule = {**SCHEDULE, "prediction_type": PREDICTION[family] if prediction_type is None else prediction_type}
    common = {"unet": unet, "vae": vae, "text_encoder": text_encoder.eval(), "tokenizer": tokenizer()}
    if family == "sdxl":
        second = {"text_encoder_2": text_encoder_2.eval(), "tokenizer_2": tokenizer()}
        pipeline = StableDiffusionXLPipeline(scheduler=EulerDiscreteScheduler(**schedule), **common, **second)
    else:
        pipeline = StableDiffusionPipeline(
            scheduler=DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **common,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
