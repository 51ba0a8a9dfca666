"""A flow-matching model's folder: pictures against a plain loop over diffusers' U-Net, scheduler and autoencoder."""

import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from PIL import Image

from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.pretrained import load_model, save_model
from pipelines import TextToImage
from pipelines.images import to_tensor
from pipelines.inspection import inspect as inspect_model
from tests.small_pipeline import LATENTS, small_pipeline

PROMPTS = ["a red cat", "dog"]
FEW = {"num_inference_steps": 6, "guidance_scale": 3.0, "seed": 5}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.fixture(scope="module")
def theirs():
    return small_pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return TextToImage.from_pretrained(folder)


@torch.no_grad()
def plain_loop(parts, scheduler, pixels=None, first=0):
    """Pixels in about [-1, 1]. pixels: of a picture to start from, at the timestep of that number."""
    scheduler.set_timesteps(FEW["num_inference_steps"])
    generators = [torch.Generator().manual_seed(FEW["seed"] + i) for i in range(len(PROMPTS))]
    arguments = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    cond, uncond = parts.encode_prompt(PROMPTS, "cpu", 1, True)
    if pixels is not None:
        latents = parts.vae.encode(pixels.repeat(2, 1, 1, 1)).latent_dist.sample(generators)
        latents = latents * parts.vae.config.scaling_factor
    x = torch.stack([torch.randn(LATENTS, generator=generator) for generator in generators])
    if pixels is not None:
        x = scheduler.scale_noise(latents, scheduler.timesteps[first : first + 1].repeat(2), x)
        scheduler.set_begin_index(first)
    for timestep in scheduler.timesteps[first:]:
        empty, full = parts.unet(torch.cat([x, x]), timestep, torch.cat([uncond, cond])).sample.chunk(2)
        output = empty + FEW["guidance_scale"] * (full - empty)
        x = scheduler.step(output, timestep, x, **arguments).prev_sample
    return parts.vae.decode(x / parts.vae.config.scaling_factor).sample


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        (None, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("euler", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("heun", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        ("UniPCMultistepScheduler", diffusers.UniPCMultistepScheduler(**FLOW)),
        ("FlowMatchLCMScheduler", diffusers.FlowMatchLCMScheduler(shift=3.0)),
        ("lcm", diffusers.FlowMatchLCMScheduler(shift=3.0)),
    ],
)
def test_the_picture_of_a_plain_loop(pipe, theirs, name, scheduler):
    expected = plain_loop(theirs, scheduler)
    assert expected.std() > 0.05
    assert (expected[0] - expected[1]).abs().max() > 0.05
    result = pipe(PROMPTS, scheduler=name, **FEW)
    assert (result.pixels_BCHW - expected).abs().max() < 1e-4
    if name is None:
        assert result.settings[0]["scheduler"] == "euler"
    else:
        assert (pipe(PROMPTS, scheduler=scheduler, **FEW).pixels_BCHW - expected).abs().max() < 1e-4


@pytest.mark.parametrize("strength, first", [(0.5, 3), (1.0, 0)])
def test_image_to_image(pipe, theirs, strength, first):
    levels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(levels.numpy())
    expected = plain_loop(theirs, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), to_tensor(picture), first)
    result = pipe(PROMPTS, image=picture, strength=strength, **FEW)
    assert (result.pixels_BCHW - expected).abs().max() < 1e-4
    foreign = pipe(PROMPTS, image=picture, strength=strength, scheduler="FlowMatchEulerDiscreteScheduler", **FEW)
    assert (foreign.pixels_BCHW - expected).abs().max() < 1e-4


def test_previews_and_batches(pipe):
    previews = list(pipe.steps(PROMPTS, scheduler="heun", **FEW))
    assert [preview.sigma for preview in previews] == sorted((p.sigma for p in previews), reverse=True)
    assert all(preview.images()[1].size == (32, 32) for preview in previews)
    alone = pipe(PROMPTS[1], scheduler="heun", **FEW | {"seed": 6})
    assert (alone.pixels_BCHW - previews[-1].result().pixels_BCHW[1:]).abs().max() < 1e-4


@pytest.mark.usefixtures("one_core")
def test_threads_with_mixed_schedulers_give_the_pictures_of_one(pipe):
    names = ["euler", "heun:s_churn=3", "unipc", "lcm", "deis", "sde-dpmsolver++", "FlowMatchHeunDiscreteScheduler"]

    def draw(name):
        return pipe("dog", scheduler=name, **FEW).pixels_BCHW

    serial = [draw(name) for name in names]
    with ThreadPoolExecutor(16) as threads:
        parallel = list(threads.map(draw, names * 2))
    assert all(torch.equal(one, other) for one, other in zip(parallel, serial * 2, strict=True))
    assert len({picture.numpy().tobytes() for picture in serial}) == len(names)


def test_what_else_opens_a_folder(pipe, folder, tmp_path):
    assert inspect_model(folder)["prediction_type"] == "flow_prediction"
    model = load_model(folder)
    assert model.scheduler == "euler"
    save_model(model, tmp_path / "again")
    again = TextToImage.from_pretrained(tmp_path / "again")
    assert torch.equal(again("dog", **FEW).pixels_BCHW, pipe("dog", **FEW).pixels_BCHW)
    with pytest.raises(GazeError, match="prediction_type = 'epsilon'"):
        load_model(folder, prediction_type="epsilon")
    with pytest.raises(GazeError, match="one file"):
        convert(folder, tmp_path / "model.safetensors")
    with pytest.raises(GazeError, match=r"(?s)lms does not fit a flow-matching model.*one of ddim, euler"):
        pipe.steps("dog", scheduler="lms")
