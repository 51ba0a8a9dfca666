"""Schedulers in the pipeline: by name, as an object, from the model's folder, from many threads."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch

from diffusion.errors import GazeError
from diffusion.samplers import PictureNoise
from diffusion.schedulers import prepare
from pipelines import TextToImage
from tests.small_pipeline import small_pipeline

FEW = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 5}
MIXED = [
    {"scheduler": "euler"},
    {"scheduler": "euler_ancestral"},
    {"scheduler": "ddim:eta=0.5"},
    {"scheduler": "dpmpp_2m", "spacing": "karras"},
    {"scheduler": "dpmpp_2m_sde"},
    {"scheduler": "dpmpp_3m_sde", "spacing": "exponential"},
    {"scheduler": "unipc", "spacing": "beta"},
    {"scheduler": "heun", "spacing": "trailing"},
    {"scheduler": "deis"},
    {"scheduler": "dpmsolver++:solver_order=3"},
    {"scheduler": "sde-dpmsolver++"},
    {"scheduler": "kdpm2_ancestral"},
    {"scheduler": "pndm"},
    {"scheduler": "lms", "spacing": "karras"},
    {"scheduler": "tcd"},
    {"scheduler": "sasolver"},
]


@pytest.fixture(scope="module")
def theirs():
    return small_pipeline()


def by_diffusers(pipeline, scheduler, prompts, steps=5):
    """Pixels in [-1, 1] of diffusers' own pipeline."""
    pipeline.scheduler = scheduler
    generators = [torch.Generator().manual_seed(FEW["seed"] + i) for i in range(len(prompts))]
    options = {"num_inference_steps": steps, "guidance_scale": FEW["guidance_scale"], "generator": generators}
    # The pipeline passes on eta 0 if nothing is said, which is not TCD's default.
    options |= {"eta": 0.3} if isinstance(scheduler, diffusers.TCDScheduler) else {}
    return pipeline(prompts, output_type="pt", **options).images * 2 - 1


def difference(result, expected):
    return (result.pixels_BCHW.clamp(-1, 1) - expected).abs().max().item()


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("deis", "DEISMultistepScheduler", {}),
        ("kdpm2_ancestral", "KDPM2AncestralDiscreteScheduler", {}),
        ("lcm", "LCMScheduler", {}),
        ("pndm", "PNDMScheduler", {}),
        ("sde-dpmsolver++", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("tcd", "TCDScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
def test_same_picture_as_diffusers_pipeline(pipe, theirs, folder, name, class_name, options):
    scheduler = getattr(diffusers, class_name).from_pretrained(folder / "scheduler", **options)
    prompts = ["a red cat", "dog"]
    expected = by_diffusers(theirs, scheduler, prompts)
    result = pipe(prompts, scheduler=name, **FEW)
    assert result.seeds == [5, 6]
    assert difference(result, expected) < 1e-4
    as_object = pipe(prompts, scheduler=scheduler, **FEW)
    assert difference(as_object, expected) < 1e-4


@pytest.mark.parametrize(
    ("class_name", "options", "name"),
    [
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "DEISMultistepScheduler"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "UniPCMultistepScheduler"),
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler"),
    ],
)
def test_the_folders_own_scheduler_is_the_default(tmp_path, folder, theirs, class_name, options, name):
    shutil.copytree(folder, tmp_path / "model")
    scheduler = getattr(diffusers, class_name).from_pretrained(folder / "scheduler", **options)
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", class_name]}))
    result = TextToImage.from_pretrained(tmp_path / "model")("cat", **FEW)
    assert result.settings[0]["scheduler"] == name
    # Our Euler's levels between whole timesteps are exact where diffusers' are rounded to a float32 timestep.
    assert difference(result, by_diffusers(theirs, scheduler, ["cat"])) < 1e-3


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "model")
    diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    other = {"scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | other))
    with pytest.raises(GazeError, match="CMStochasticIterativeScheduler"):
        TextToImage.from_pretrained(tmp_path / "model")


def test_settings_of_an_object_make_the_picture_again(pipe):
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.model.schedule.config, solver_order=3)
    first = pipe(["cat", "dog"], scheduler=scheduler, spacing="karras", **FEW)
    assert json.loads(json.dumps(first.settings)) == first.settings
    again = pipe(**first.settings[1])
    assert again.settings == [first.settings[1]]
    assert difference(again, first.pixels_BCHW[1:].clamp(-1, 1)) < 1e-5
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize(("scheduler", "calls"), [("heun", 5), ("HeunDiscreteScheduler", 9), ("pndm", 6)])
def test_steps_asked_for_are_the_steps_reported(pipe, scheduler, calls):
    previews = list(pipe.steps("cat", scheduler=scheduler, **FEW))
    assert [preview.index for preview in previews] == list(range(1, calls + 1))
    assert {preview.total for preview in previews} == {calls}
    assert previews[-1].result().settings[0]["num_inference_steps"] == 5
    assert previews[2].images()[0].size == previews[-1].images()[0].size


def test_guidance_and_batches_are_those_of_any_sampler(pipe):
    for scheduler in ("deis", "tcd"):
        together = pipe(["a red cat", "dog"], scheduler=scheduler, **FEW)
        alone = pipe("dog", scheduler=scheduler, **FEW | {"seed": 6})
        assert difference(alone, together.pixels_BCHW[1:].clamp(-1, 1)) < 1e-4
        off = pipe("dog", scheduler=scheduler, **FEW | {"seed": 6, "guidance_scale": 1})
        assert difference(off, alone.pixels_BCHW.clamp(-1, 1)) > 0.01


@pytest.mark.parametrize("name", ["lms", "lms:order=2", "pndm", "deis", "dpmsolver++", "unipc", "heun", "kdpm2"])
def test_a_run_that_begins_in_the_middle_is_no_worse_than_eulers(pipe, name):
    """On data of unit variance, whose best denoiser and probability flow are formulas."""

    def error(name):
        trajectory = prepare(name, pipe.model.schedule, 20, "leading")
        begin = trajectory.begin(0.5)
        sigmas = trajectory.sigmas[begin:]
        noise = PictureNoise([torch.Generator().manual_seed(0)], (1, 1, 1))
        x = torch.full((1, 1, 1, 1), sigmas[0].item(), dtype=torch.float64)
        *_, last = trajectory.run(lambda x, sigma: x / (1 + sigma**2), x, noise=noise, sigmas=sigmas)
        exact = x * ((1 + last.sigma**2) / (1 + sigmas[0] ** 2)) ** 0.5
        return (last.x_BCHW - exact).abs().item()

    assert error(name) < error("euler") + 1e-6


@pytest.mark.usefixtures("one_core")
def test_threads_with_mixed_schedulers_give_the_pictures_of_one(pipe):
    shared = diffusers.UniPCMultistepScheduler.from_config(pipe.model.schedule.config)
    requests = [*MIXED, *({"scheduler": shared, "seed": seed} for seed in (5, 6, 7, 8))]

    def draw(request):
        return pipe("a red cat", **FEW | request).pixels_BCHW

    serial = [draw(request) for request in requests]
    with ThreadPoolExecutor(16) as threads:
        parallel = list(threads.map(draw, requests))
    assert all(torch.equal(one, other) for one, other in zip(parallel, serial, strict=True))
    assert len({picture.numpy().tobytes() for picture in serial}) == len(serial)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, r"(?s)flow-matching model.*one of ddim, euler"),
        ({"scheduler": diffusers.EulerDiscreteScheduler()}, "other noise levels"),
        ({"scheduler": "tcd", "num_inference_steps": 51}, "tcd cannot do 51 steps"),
        ({"scheduler": "pndm", "spacing": "karras"}, r"(?s)pndm has no karras spacing.*one of leading"),
        ({"scheduler": "euler", "spacing": "log"}, "unknown spacing 'log'"),
        ({"scheduler": 3}, "'int'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_call(pipe, options, says):
    with pytest.raises(GazeError, match=says):
        pipe.steps("cat", **FEW | options)
