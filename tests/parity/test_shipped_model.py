"""The model inside the package: small enough, of one piece, and the same in diffusers' own pipeline."""

import numpy as np
import pytest
import torch

from pipelines import TextToImage
from pipelines.text_to_image import DEFAULT_MODEL


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


def test_size_and_kind_of_its_files():
    files = [path for path in DEFAULT_MODEL.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 40e6
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_diffusers_opens_it_and_draws_the_same_picture(pipe):
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    peer = diffusers.StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "latents": latents}
    prompts = ["red apple", "a woman scientist with dark skin tone"]
    ours = (pipe(prompts, scheduler="ddim", **options).pixels_BCHW / 2 + 0.5).clamp(0, 1)
    theirs = peer(prompts, output_type="np", **options).images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 1e-3


def test_the_prompt_decides_the_picture(pipe):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    words = ("grinning face", "rocket", "red heart", "flag: Japan")
    pictures = [pipe(word, latents=latents, num_inference_steps=8).pixels_BCHW for word in words]
    differences = [float((a - b).abs().mean()) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(differences) > 0.05
