"""Text to image, image to image and inpainting, of every structure: what diffusers draws, from the same seed."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from diffusion.errors import GazeError
from pipelines import TextToImage
from tests.narrow_models import FAMILIES, narrow_pipeline

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
COMMON = {"num_inference_steps": 6, "guidance_scale": 5.0}


def noisy_picture(width=32, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_mask(width=32, height=32):
    levels = np.zeros((height, width), np.uint8)
    levels[:, width // 2 :] = 255
    levels[3:9, 4:15] = 255
    return Image.fromarray(levels)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """diffusers' pipeline, ours opened from what it saved, and the folder."""
    theirs = narrow_pipeline(request.param)
    theirs.vae.decoder.conv_out.weight.data *= 1.5
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, TextToImage.from_pretrained(folder), folder


def with_scheduler(theirs, folder, scheduler):
    theirs.scheduler = SCHEDULERS[scheduler].from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def expected(theirs, prompt, seed, **options):
    return theirs(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **options).images


def drawn(ours, prompt, seed, **options):
    return (ours(prompt, seed=seed, **options).pixels_BCHW / 2 + 0.5).clamp(0, 1)


def difference(a, b):
    assert a.std() > 0.02  # a picture, not a plane
    return (a - b).abs().max().item()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("negative", [None, "dog"])
def test_text_to_image(pair, scheduler, negative):
    theirs, ours, folder = pair
    wanted = expected(with_scheduler(theirs, folder, scheduler), "a red cat", 3, negative_prompt=negative, **COMMON)
    found = drawn(ours, "a red cat", 3, negative_prompt=negative, scheduler=scheduler, **COMMON)
    assert difference(wanted, found) < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_image_to_image(pair, scheduler, strength):
    theirs, ours, folder = pair
    start = {"image": noisy_picture(), "strength": strength}
    peer = with_scheduler(AutoPipelineForImage2Image.from_pipe(theirs), folder, scheduler)
    wanted = expected(peer, "a red cat", 5, **start, **COMMON)
    assert difference(wanted, drawn(ours, "a red cat", 5, scheduler=scheduler, **start, **COMMON)) < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_four_channels(pair, scheduler, strength):
    theirs, ours, folder = pair
    start = {"image": noisy_picture(), "mask_image": half_mask(), "strength": strength}
    peer = with_scheduler(AutoPipelineForInpainting.from_pipe(theirs), folder, scheduler)
    wanted = expected(peer, "a red cat", 7, **start, **COMMON, height=32, width=32)
    assert difference(wanted, drawn(ours, "a red cat", 7, scheduler=scheduler, **start, **COMMON)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_nine_channels(family, strength, tmp_path):
    made = narrow_pipeline(family)
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(made.unet.config, in_channels=9)
    theirs = AutoPipelineForInpainting.from_pipe(made)
    theirs.register_modules(unet=unet.eval())
    theirs.save_pretrained(tmp_path)
    ours = TextToImage.from_pretrained(tmp_path)
    start = {"image": noisy_picture(), "mask_image": half_mask(), "strength": strength}
    for scheduler in SCHEDULERS:
        peer = with_scheduler(theirs, tmp_path, scheduler)
        wanted = expected(peer, "a red cat", 7, **start, **COMMON, height=32, width=32)
        assert difference(wanted, drawn(ours, "a red cat", 7, scheduler=scheduler, **start, **COMMON)) < 1e-4
    with pytest.raises(GazeError, match="paints into pictures"):
        ours("a red cat", **COMMON)
    with pytest.raises(GazeError, match="paints into pictures"):
        ours("a red cat", image=noisy_picture(), **COMMON)


@pytest.mark.parametrize("scheduler, stride", [("HeunDiscreteScheduler", 2), ("EulerAncestralDiscreteScheduler", 1)])
def test_image_to_image_with_a_scheduler_of_diffusers(pair, scheduler, stride):
    theirs, ours, folder = pair
    start = {"image": noisy_picture(), "strength": 0.5}
    peer = AutoPipelineForImage2Image.from_pipe(theirs)
    peer.set_progress_bar_config(disable=True)
    peer.scheduler = getattr(diffusers, scheduler).from_pretrained(folder, subfolder="scheduler")
    wanted = expected(peer, "a red cat", 5, **start, **COMMON)
    assert difference(wanted, drawn(ours, "a red cat", 5, scheduler=scheduler, **start, **COMMON)) < 1e-4
    calls = sum(1 for _ in ours.steps("cat", scheduler=scheduler, seed=0, **start, **COMMON))
    assert calls == 3 * stride - (stride > 1)


def test_what_sdxl_is_told_of_sizes(tmp_path):
    theirs = narrow_pipeline("sdxl")
    theirs.save_pretrained(tmp_path)
    ours = TextToImage.from_pretrained(tmp_path)
    sizes = {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (40, 32)}
    theirs = with_scheduler(theirs, tmp_path, "euler")
    wanted = expected(theirs, "a red cat", 3, height=48, width=32, **sizes, **COMMON)
    result = ours("a red cat", seed=3, scheduler="euler", height=48, width=32, **sizes, **COMMON)
    assert difference(wanted, (result.pixels_BCHW / 2 + 0.5).clamp(0, 1)) < 1e-4
    assert result.settings[0].items() >= {name: list(pair) for name, pair in sizes.items()}.items()
    assert difference(wanted, drawn(ours, "a red cat", 3, scheduler="euler", height=48, width=32, **COMMON)) > 1e-3
    assert torch.equal(ours(**result.settings[0]).pixels_BCHW, result.pixels_BCHW)
