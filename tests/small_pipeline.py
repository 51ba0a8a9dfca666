"""A Stable Diffusion pipeline of small random parts, put together by diffusers: what our pipeline is held against."""

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WINDOW = 16  # tokens, of which start and end take two
SIZE = 32  # pixels
LATENTS = (4, 16, 16)

# What Stable Diffusion 1.x and 2.x folders say; the rest they have in common.
STRUCTURES: dict[str, dict[str, Any]] = {
    "sd1": {"use_linear_projection": False, "attention_head_dim": 2},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
}
ACTIVATIONS = {"sd1": "quick_gelu", "sd2": "gelu"}


def tokenizer() -> CLIPTokenizer:
    """One token a letter, but for a few words."""
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"]
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges], model_max_length=WINDOW)


def small_pipeline(structure: str = "sd1", prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """32-pixel pictures from 16x16 latents; the weights are always the same."""
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=WINDOW,
                hidden_act=ACTIVATIONS[structure],
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=LATENTS[-1],
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            norm_num_groups=8,
            **STRUCTURES[structure],
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=SIZE,
        )
        # As they are, fresh weights make a grey picture that hardly depends on the words.
        with torch.no_grad():
            vae.decoder.conv_out.weight *= 1.5
            for name, weight in unet.named_parameters():
                if "attn2.to_" in name and name.endswith("weight"):
                    weight *= 3
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
