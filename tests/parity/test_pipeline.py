"""A folder that diffusers saved gives, from the same start noise, the picture that diffusers makes of it."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from pipelines import TextToImage
from tests.small_pipeline import LATENTS, small_pipeline

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
KINDS = [("sd1", "epsilon"), ("sd1", "v_prediction"), ("sd2", "epsilon"), ("sd2", "v_prediction")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request, tmp_path_factory):
    """diffusers' pipeline, ours opened from what it saved, and the folder."""
    theirs = small_pipeline(*request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, TextToImage.from_pretrained(folder), folder


def both(pair, scheduler, prompt, latents=None, **options):
    """Pictures as numbers in [0, 1], BCHW: theirs, ours."""
    theirs, ours, folder = pair
    # The pipeline itself switches clip_sample off, but only in the scheduler that it is made with.
    theirs.scheduler = SCHEDULERS[scheduler].from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    expected = theirs(prompt, latents=latents, output_type="pt", **options).images
    options.pop("generator", None)
    result = ours(prompt, latents=latents, scheduler=scheduler, seed=5, **options)
    return expected, (result.pixels_BCHW / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale"), [("ddim", 7.5), ("ddim", 1.0), ("euler", 7.5), ("dpmpp_2m", 7.5), ("heun", 7.5)]
)
def test_same_picture_from_the_same_noise(pair, scheduler, guidance_scale):
    latents = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 8, "guidance_scale": guidance_scale}
    expected, ours = both(pair, scheduler, ["a red cat", "dog"], latents, **options)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.8  # not hidden by clamping
    assert expected.std() > 0.05
    assert (expected[0] - expected[1]).abs().max() > 0.05
    assert (ours - expected).abs().max() < 1e-3


def test_same_picture_with_a_negative_prompt_at_another_size(pair):
    latents = torch.randn(1, 4, 8, 20, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 4, "height": 16, "width": 40}
    expected, ours = both(pair, "ddim", "a red cat", latents, negative_prompt="dog", **options)
    plain, _ = both(pair, "ddim", "a red cat", latents, **options)
    assert (expected - plain).abs().max() > 0.01
    assert (ours - expected).abs().max() < 1e-3


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_a_seed_means_the_same_as_in_diffusers(pair, scheduler):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected, ours = both(pair, scheduler, ["a red cat", "dog"], num_inference_steps=4, generator=generators)
    assert (ours - expected).abs().max() < 1e-3
