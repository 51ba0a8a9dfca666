"""Models with EDM's scalings: levels, samplers and a folder's pictures against diffusers' EDM classes and pipeline."""

import inspect
import json

import diffusers
import pytest
import torch

from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.noise import EDMSchedule, NoiseSchedule
from diffusion.pretrained import load_model, save_model
from diffusion.samplers import EDM_SAMPLERS, SAMPLERS, PictureNoise
from diffusion.schedulers import default_name, prepare
from pipelines import TextToImage
from pipelines.inspection import inspect as inspect_model
from tests.small_pipeline import small_pipeline

EULER, SOLVER = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
SHAPE = (3, 5, 4)
PROMPTS = ["a red cat", "dog"]
FEW = {"num_inference_steps": 6, "guidance_scale": 3.0}
VARIANTS = {
    "plain": {},
    "unit": {"sigma_data": 1.0, "sigma_max": 40.0, "sigma_min": 0.01},
    "velocity": {"prediction_type": "v_prediction", "rho": 5.0},
    "exponential": {"sigma_schedule": "exponential"},
    "to the lowest": {"final_sigmas_type": "sigma_min"},
}


def network(x, timestep):
    """Not smooth to the eye, and told the level as these networks are: ln(sigma) / 4."""
    assert -2 < float(timestep) < 1.2
    pattern = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
    return torch.tanh(1.5 * x + torch.sin(5 * torch.as_tensor(timestep)).float() + pattern)


def noises():
    return PictureNoise([torch.Generator().manual_seed(seed) for seed in (5, 6)], SHAPE)


def plain_loop(scheduler, steps):
    """As any script over diffusers does it."""
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    x = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators]) * scheduler.init_noise_sigma
    arguments = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, timestep), timestep), timestep, x, **arguments)
        x = x.prev_sample
    return x


def run(scheduler, schedule, steps):
    trajectory = prepare(scheduler, schedule, steps)

    def denoise(x, sigma):
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in = schedule.scaling(level)
        return c_skip * x + c_out * network(c_in * x, schedule.timestep(level))

    noise = noises()
    *_, last = trajectory.run(denoise, noise() * trajectory.start, noise=noise)
    return last.x_BCHW


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("class_name", [EULER, SOLVER])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_levels_and_steps(class_name, options, steps):
    config = {"_class_name": class_name, **options}
    schedule = NoiseSchedule.from_config(config)
    assert isinstance(schedule, EDMSchedule)
    name = default_name(class_name, config)
    assert name == {EULER: "euler", SOLVER: "dpmpp_2m"}[class_name]
    theirs = getattr(diffusers, class_name).from_config(config)
    expected = plain_loop(theirs, steps)
    sigmas = prepare(name, schedule, steps).sigmas
    torch.testing.assert_close(sigmas, theirs.sigmas.double(), rtol=1e-5, atol=0)
    for scheduler in (name, class_name, theirs):
        assert (run(scheduler, schedule, steps) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_solver_with_noise_and_options():
    theirs = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    schedule = NoiseSchedule.from_config({"_class_name": EULER})
    expected = plain_loop(theirs, 20)
    for scheduler in ("dpmpp_2m_sde", f"{SOLVER}:algorithm_type=sde-dpmsolver++", theirs):
        assert (run(scheduler, schedule, 20) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert default_name(SOLVER, {**theirs.config, "_class_name": SOLVER}) == SOLVER
    third = diffusers.EDMDPMSolverMultistepScheduler(solver_order=3, solver_type="heun")
    expected = plain_loop(third, 20)
    assert (run(f"{SOLVER}:solver_order=3,solver_type=heun", schedule, 20) - expected).abs().max() < 1e-4


def test_options_of_the_levels():
    schedule = NoiseSchedule.from_config({"_class_name": EULER})
    theirs = diffusers.EDMEulerScheduler(sigma_max=20.0, sigma_schedule="exponential")
    theirs.set_timesteps(7)
    ours = prepare("heun:sigma_max=20,sigma_schedule=exponential", schedule, 7).sigmas
    torch.testing.assert_close(ours, theirs.sigmas.double(), rtol=1e-5, atol=0)
    assert torch.equal(prepare("euler", schedule, 7, "karras").sigmas, prepare("euler", schedule, 7).sigmas)
    assert prepare("euler", schedule, 7, "beta").sigmas[1] != prepare("euler", schedule, 7).sigmas[1]


def exact(x, sigma):
    """The best denoiser of pictures of deviation 1/2."""
    return x * 0.25 / (0.25 + sigma**2)


@pytest.mark.parametrize("name", EDM_SAMPLERS)
def test_every_sampler_draws_the_distribution(name):
    """x at level 0 is its start times the probability flow's factor, or of as wide a distribution."""
    schedule = NoiseSchedule.from_config({"_class_name": EULER})
    method = EDM_SAMPLERS[name]
    assert (method.order, method.stochastic, method.calls(9)) == (
        SAMPLERS[name].order,
        SAMPLERS[name].stochastic,
        SAMPLERS[name].calls(9),
    )
    noise = PictureNoise([torch.Generator().manual_seed(0)], (4, 64, 64))
    trajectory = prepare(name, schedule, 200)
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return exact(x, sigma)

    *_, last = trajectory.run(denoise, noise() * trajectory.start, noise=noise)
    assert len(calls) == method.calls(200)
    # At the last level above 0 the mean of all pictures is taken: their spread within it, 0.002, is lost.
    assert last.x_BCHW.std().item() == pytest.approx(0.5, rel=0.05 if name != "lcm" else 1)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (diffusers.EDMEulerScheduler(sigma_data=1.0), "made for other noise levels"),
        ("lms", r"(?s)lms does not fit a model with EDM's scalings.*one of ddim, euler"),
        ("FlowMatchEulerDiscreteScheduler", "does not fit a model with EDM's scalings"),
        ("KarrasVeScheduler", "scalings of its own"),
        ("euler:sigma_min=90", "sigma_min"),
        ("euler:timestep_spacing=leading", "no option 'timestep_spacing'"),
        ("euler:rho=0", "rho is 0"),
    ],
)
def test_what_does_not_fit_is_refused(scheduler, says):
    with pytest.raises(GazeError, match=says):
        prepare(scheduler, NoiseSchedule.from_config({"_class_name": EULER}), 4)


def test_spacings_and_steps_that_cannot_be():
    schedule = NoiseSchedule.from_config({"_class_name": EULER})
    with pytest.raises(GazeError, match="EDM's scalings have no trailing spacing"):
        prepare("euler", schedule, 4, "trailing")
    with pytest.raises(GazeError, match="EDMEulerScheduler has no karras spacing"):
        prepare(EULER, schedule, 4, "karras")
    with pytest.raises(GazeError, match="1001 sampling steps"):
        prepare("euler", schedule, 1001)
    with pytest.raises(GazeError, match="does not fit a model with a table"):
        prepare(EULER, NoiseSchedule.from_config({}), 4)


@pytest.fixture(scope="module")
def theirs():
    pipeline = small_pipeline()
    pipeline.scheduler = diffusers.EDMEulerScheduler(sigma_data=1.0, sigma_max=30.0, prediction_type="v_prediction")
    return pipeline


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return folder


def by_diffusers(pipeline):
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    return pipeline(PROMPTS, generator=generators, output_type="pt", **FEW).images * 2 - 1


def test_the_picture_of_diffusers_pipeline(theirs, folder):
    pipe = TextToImage.from_pretrained(folder)
    for scheduler, name in ((theirs.scheduler, "euler"), (diffusers.EDMDPMSolverMultistepScheduler, "dpmpp_2m")):
        if isinstance(scheduler, type):
            theirs.scheduler = scheduler.from_config(theirs.scheduler.config)
        expected = by_diffusers(theirs)
        assert (expected[0] - expected[1]).abs().max() > 0.05
        for asked in (name, type(theirs.scheduler).__name__, theirs.scheduler):
            found = pipe(PROMPTS, scheduler=asked, seed=5, **FEW).pixels_BCHW.clamp(-1, 1)
            assert (found - expected).abs().max() < 1e-3
    assert pipe(PROMPTS, seed=5, **FEW).settings[0]["scheduler"] == "euler"


def test_what_else_opens_a_folder(folder, tmp_path):
    assert inspect_model(folder)["prediction_type"] == "edm"
    model = load_model(folder)
    save_model(model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert again["_class_name"] == EULER
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again").scheduler.config.sigma_max == 30
    pipe, other = TextToImage.from_pretrained(folder), TextToImage.from_pretrained(tmp_path / "again")
    assert torch.equal(other("dog", seed=1, **FEW).pixels_BCHW, pipe("dog", seed=1, **FEW).pixels_BCHW)
    with pytest.raises(GazeError, match="one file"):
        convert(folder, tmp_path / "model.safetensors")
