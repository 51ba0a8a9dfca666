"""Flow-matching models: levels, our samplers, and diffusers' classes driven by us, against plain loops over them."""

import inspect
import math

import diffusers
import pytest
import torch

from diffusion.errors import GazeError
from diffusion.foreign import FLOW_FOREIGN
from diffusion.noise import PURE_NOISE, FlowSchedule, NoiseSchedule, scaling
from diffusion.objective import denoising_loss, min_snr_weight, uniform_timesteps
from diffusion.samplers import FLOW_SAMPLERS, PictureNoise
from diffusion.scheduler_config import FLOW_SCHEDULERS
from diffusion.schedulers import FLOWS, TABLE, default_name, prepare
from diffusion.spacing import LEVEL_SPACINGS
from tests.parity.network import LATENT

SHAPE = (3, 5, 4)
SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
MODEL = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def schedule(**options):
    return NoiseSchedule.from_config({**MODEL, **options})


def noises(seeds=(5, 6)):
    return PictureNoise([torch.Generator().manual_seed(seed) for seed in seeds], SHAPE)


def network(x, timestep):
    """The flow towards a picture that depends on the input and the timestep."""
    time = float(timestep) / 1000
    pattern = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
    return (x - torch.tanh(1.5 * x + math.sin(12 * time) + pattern)) / time


def plain_loop(scheduler, steps, exact=False, dtype=torch.float64):
    """The end of a loop over a diffusers class as any script has it, and the timesteps that the network was told.

    exact: tell it those of the scheduler's own levels, which the solvers cut to whole numbers.
    """
    scheduler.set_timesteps(steps)
    told = 1000 * scheduler.sigmas[:-1].double() if exact else scheduler.timesteps
    noise = noises()
    takes = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": list(noise.generators)} if takes else {}
    x = noise().to(dtype)
    for timestep, known in zip(told, scheduler.timesteps, strict=True):
        x = scheduler.step(network(x, timestep), known, x, **arguments).prev_sample
    return x, told.tolist()


def run(scheduler, levels, steps, spacing=None, dtype=torch.float64):
    """The same through our code."""
    trajectory = prepare(scheduler, levels, steps, spacing)
    told, noise = [], noises()

    def denoise(x, sigma):
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in = scaling("flow_prediction", level)
        told.append(levels.timestep(level).item())
        return c_skip * x + c_out * network(c_in * x, told[-1])

    path = list(trajectory.run(denoise, noise().to(dtype) * trajectory.start, noise=noise))
    # Heun's method of ours takes one step where diffusers' has two.
    assert [step.sigma for step in path] == trajectory.sigmas[1:].tolist()
    return path[-1].x_BCHW, told


def assert_same(ours, theirs, tolerance=1e-5, timesteps=1e-4):
    assert ours[1] == pytest.approx(theirs[1], abs=timesteps)
    assert (ours[0] - theirs[0]).abs().max() < tolerance


def make(name, **options):
    """The class behind a name, made without our code."""
    row = FLOW_FOREIGN[name]
    solver = {} if row.class_name in FLOW_SCHEDULERS else SOLVER
    return getattr(diffusers, row.class_name).from_config(
        {"shift": 3.0, "flow_shift": 3.0} | solver | row.options | options
    )


def test_time_is_the_timestep_and_sigma_its_ratio():
    levels = schedule(shift=1.0)
    assert isinstance(levels, FlowSchedule)
    assert levels.prediction_type == "flow_prediction"
    timesteps = torch.cat([torch.arange(1001), torch.rand(5, 7).flatten() * 1000]).double().reshape(-1, 2)
    assert (levels.timestep(levels.sigma(timesteps)) - timesteps).abs().max() < 1e-9
    assert levels.timestep(levels.sigma(torch.tensor(1000))) == 1000
    assert levels.sigma(torch.tensor([0, 250.0, 500, 800])).tolist() == pytest.approx([0, 1 / 3, 1, 4])
    assert levels.sigma(torch.tensor(1000)) == PURE_NOISE == levels.sigmas_T[-1]


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_the_table_is_that_of_diffusers(shift):
    time_T = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0).double()
    sigmas_T = schedule(shift=shift).sigmas_T
    torch.testing.assert_close(sigmas_T / (1 + sigmas_T), time_T, rtol=0, atol=3e-7)
    assert (sigmas_T.diff() > 0).all()
    solver = {"_class_name": "UniPCMultistepScheduler", "flow_shift": shift, **SOLVER}
    assert torch.equal(NoiseSchedule.from_config(solver).sigmas_T, sigmas_T)


@pytest.mark.parametrize("time", [0.001, 0.3, 0.999, 1.0])
def test_scaling_is_the_flow_of_the_models_own_frame(time):
    clean, noise = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = schedule().sigma(torch.tensor(1000 * time))
    c_skip, c_out, c_in = scaling("flow_prediction", sigma)
    x = clean + sigma * noise
    torch.testing.assert_close(c_in * x, (1 - time) * clean + time * noise)
    exact = (1 - time) * clean + time * noise
    torch.testing.assert_close(c_skip * (exact / c_in) + c_out * (noise - clean), clean)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", FLOW_FOREIGN)
def test_every_class_equals_a_plain_loop(name, steps):
    assert_same(run(name, schedule(), steps), plain_loop(make(name), steps))


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("euler", "FlowMatchEulerDiscreteScheduler", {}),
        ("ddim", "FlowMatchEulerDiscreteScheduler", {}),
        ("euler_ancestral:eta=0", "FlowMatchEulerDiscreteScheduler", {}),
        ("heun", "FlowMatchHeunDiscreteScheduler", {}),
        ("lcm", "FlowMatchLCMScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_3m_sde:eta=0", "DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_our_samplers_equal_the_matching_class(name, class_name, options, shift, steps):
    if class_name not in FLOW_SCHEDULERS:
        options = {"flow_shift": shift, **SOLVER, **options}
    else:
        options = {"shift": shift}
    dtype = torch.float32 if name == "lcm" else torch.float64  # its class draws noise in the dtype of x
    theirs = plain_loop(getattr(diffusers, class_name)(**options), steps, exact=True, dtype=dtype)
    # UniPC's first level is 1 - 1e-6, of which float32 leaves half of the digits of log(1 - t).
    assert_same(run(name, schedule(shift=shift), steps, dtype=dtype), theirs, 1e-4 if name == "unipc" else 2e-5)


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_pure_noise_loses_no_digits(name):
    """From time 1, where sigma is infinite: float32 against float64 with a level 2^40 times as high."""
    levels = schedule()
    trajectory = prepare(name, levels, 10)

    def end(dtype, factor):
        sigmas = trajectory.sigmas.clone()
        sigmas[0] *= factor
        noise = noises()

        def denoise(x, sigma):
            return torch.tanh(1.5 * x / (1 + sigma) + math.sin(12 * sigma / (1 + sigma)))

        method = FLOW_SAMPLERS[name]
        path = method.run(denoise, noise().to(dtype) * (1 + sigmas[0].item()), sigmas, lambda: noise().to(dtype))
        return torch.stack([step.x_BCHW / (1 + step.sigma) for step in path])

    exact = end(torch.float64, 1.0)
    assert (end(torch.float32, 1.0) - exact).abs().max() < 1e-5
    if FLOW_SAMPLERS[name].latest == 1 and trajectory.sigmas[0] == PURE_NOISE:
        assert (end(torch.float64, 2.0**40) - exact).abs().max() < 1e-12


@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("euler", "FlowMatchEulerDiscreteScheduler"),
        ("lcm", "FlowMatchLCMScheduler"),
        ("euler_ancestral_rf", "euler_ancestral_rf"),
    ],
)
def test_spacings_are_those_of_diffusers_flow_class(name, class_name, spacing):
    option = f"use_{spacing}_sigmas"
    theirs = plain_loop(make(class_name, **{option: True}), 8, dtype=torch.float32)
    for ours in {name, class_name}:
        assert_same(run(ours, schedule(), 8, spacing, torch.float32), theirs)
        assert_same(run(ours, schedule(**{option: True}), 8, dtype=torch.float32), theirs)
        assert_same(run(f"{ours}:{option}=true", schedule(), 8, dtype=torch.float32), theirs)


def test_linear_is_the_spacing_without_another():
    assert_same(run("euler", schedule(use_karras_sigmas=True), 8, "linear"), run("euler", schedule(), 8), 1e-12)


def test_karras_levels_of_unipc():
    theirs = plain_loop(make("UniPCMultistepScheduler", use_karras_sigmas=True), 8)
    assert_same(run("UniPCMultistepScheduler", schedule(), 8, "karras"), theirs)


@pytest.mark.parametrize(
    ("written", "class_name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler:stochastic_sampling=true", None, {"stochastic_sampling": True}),
        ("FlowMatchEulerDiscreteScheduler:shift=5", None, {"shift": 5.0}),
        ("FlowMatchEulerDiscreteScheduler:shift_terminal=0.1", None, {"shift_terminal": 0.1}),
        ("euler:shift=5", "FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
        ("euler:shift_terminal=0.1", "FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
        ("LTXEulerAncestralRFScheduler:eta=0.3,s_noise=1.01", "euler_ancestral_rf", {"eta": 0.3, "s_noise": 1.01}),
        ("dpmsolver++:solver_order=3", None, {"solver_order": 3}),
        ("deis:flow_shift=2", None, {"flow_shift": 2.0}),
    ],
)
def test_options_by_name(written, class_name, options):
    theirs = plain_loop(make(class_name or written.partition(":")[0], **options), 8)
    assert_same(run(written, schedule(), 8), theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50, 100])
@pytest.mark.parametrize("name", [*FLOW_SAMPLERS, *(name for name in FLOW_FOREIGN if name not in FLOW_SAMPLERS)])
def test_number_of_network_calls(name, steps):
    calls = []
    trajectory = prepare(name, schedule(), steps)

    def denoise(x, sigma):
        calls.append(sigma)
        return x / (1 + sigma) ** 2

    *_, last = trajectory.run(denoise, noises()() * trajectory.start, noise=noises())
    assert len(calls) == steps + (steps - 1) * (name in ("heun", "FlowMatchHeunDiscreteScheduler"))
    assert len(calls) == {**FLOW_SAMPLERS, **FLOW_FOREIGN}[name].calls(steps)
    assert last.sigma == 0
    assert last.x_BCHW.isfinite().all()


@pytest.mark.parametrize("name", [*FLOW_SAMPLERS, *FLOW_FOREIGN])
def test_stochastic_ones_and_only_they_draw_noise(name):
    trajectory = prepare(name, schedule(), 6)

    def end(seeds):
        start = torch.ones(len(seeds), *SHAPE) * trajectory.start
        *_, last = trajectory.run(lambda x, sigma: torch.tanh(x / (1 + sigma)), start, noise=noises(seeds))
        return last.x_BCHW

    pictures = end((1, 2))
    assert (not torch.equal(pictures, end((3, 2)))) == {**FLOW_SAMPLERS, **FLOW_FOREIGN}[name].stochastic
    assert torch.allclose(pictures[1], end((2,))[0], atol=1e-6), "every picture has a generator of its own"


@pytest.mark.parametrize("name", ["ddim:eta=0.5", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "heun:s_churn=20"])
def test_noise_keeps_the_distribution(name):
    # From noise the pictures of a unit normal: fresh noise must add exactly the variance taken away.
    trajectory = prepare(name, schedule(shift=1.0), 100)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20000, generator=generator)

    *_, end = trajectory.run(lambda x, sigma: x / (1 + sigma**2), noise() * trajectory.start, noise=noise)
    assert end.x_BCHW.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", FLOW_FOREIGN)
def test_an_object_gives_what_its_name_gives_and_its_name_makes_it_again(name):
    given = make(name)
    given.set_timesteps(3)
    before = {key: str(value) for key, value in vars(given).items()}
    found = run(given, schedule(), 4)
    assert {key: str(value) for key, value in vars(given).items()} == before
    assert_same(found, run(name, schedule(), 4), 1e-12)
    other = make(name, **{"flow_shift" if name in TABLE.foreign else "shift": 2.0})
    written = prepare(other, schedule(), 4).name
    if name != "FlowMapEulerDiscreteScheduler":
        assert "shift=2" in written
    assert_same(run(written, schedule(), 4), run(other, schedule(), 4), 1e-12)


@pytest.mark.parametrize(
    ("class_name", "options", "name"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "euler"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "FlowMatchEulerDiscreteScheduler"),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun"),
        ("FlowMatchLCMScheduler", {"use_beta_sigmas": True}, "lcm"),
        ("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, "FlowMapEulerDiscreteScheduler"),
        ("LTXEulerAncestralRFScheduler", {"eta": 0.5}, "LTXEulerAncestralRFScheduler"),
        *((name, {"flow_shift": 3.0, **SOLVER}, name) for name in FLOWS.classes if name not in FLOW_SCHEDULERS),
    ],
)
def test_the_models_own_config(class_name, options, name, tmp_path):
    theirs = getattr(diffusers, class_name)(**options)
    theirs.save_pretrained(tmp_path)
    config = theirs.load_config(tmp_path)
    levels = NoiseSchedule.from_config(config)
    assert default_name(class_name, config) == name
    dtype = torch.float32 if name == "lcm" else torch.float64
    assert_same(run(name, levels, 6, dtype=dtype), plain_loop(theirs, 6, dtype=dtype))
    assert_same(run(theirs, levels, 6), plain_loop(theirs, 6))


def test_the_shift_of_a_model_is_known_to_every_class():
    solver = NoiseSchedule.from_config({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, **SOLVER})
    for name in ("euler", "FlowMatchEulerDiscreteScheduler", "deis", "euler_ancestral_rf"):
        assert_same(run(name, solver, 5), run(name, schedule(), 5), 1e-12)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ("pndm", r"(?s)pndm does not fit a flow-matching model: it steps through a table.*one of ddim, euler"),
        ("DDIMScheduler", "DDIMScheduler does not fit a flow-matching model"),
        ("MiniMaxH3Scheduler", "with the other sign"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler does not fit a flow-matching model"),
        (diffusers.UniPCMultistepScheduler(), "prediction_type 'epsilon', which does not fit"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas False"),
        (diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **SOLVER), "levels out of range"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas True"),
        (diffusers.FlowMatchLCMScheduler(scale_factors=[0.5]), r"scale_factors \[0.5\]"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting True"),
        (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "other noise levels"),
        ("dpmsolver++:prediction_type=epsilon", "prediction_type 'epsilon'"),
        ("dpmsolver++:use_flow_sigmas=false", "use_flow_sigmas False"),
        ("euler:shift=0", "shift is 0"),
        ("euler:shift=NaN", "shift is nan"),
        ("euler:shift_terminal=2", "shift_terminal is 2"),
        ("euler:shift_terminal=x", "shift_terminal is 'x'"),
        ("euler:timestep_spacing=trailing", "no option 'timestep_spacing'"),
        ("eular", "did you mean 'euler'"),
    ],
)
def test_what_does_not_fit_is_refused(scheduler, says):
    with pytest.raises(GazeError, match=says) as error:
        prepare(scheduler, schedule(), 4)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "steps", "spacing", "says"),
    [
        ("euler", 0, None, "0 sampling steps"),
        ("euler", 1001, None, "1001 sampling steps"),
        ("deis", 1001, None, "1001 sampling steps"),
        ("euler", 4, "trailing", "no trailing spacing"),
        ("deis", 4, "karras", "deis has no karras spacing"),
        ("FlowMatchHeunDiscreteScheduler", 4, "beta", "has no beta spacing"),
        ("euler:shift_terminal=0.1", 1, None, "no 1 levels"),
    ],
)
def test_steps_and_spacings_that_cannot_be_are_refused(name, steps, spacing, says):
    with pytest.raises(GazeError, match=says):
        prepare(name, schedule(), steps, spacing)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**MODEL, "prediction_type": "epsilon"}, ["prediction_type", "epsilon", "flow_prediction"]),
        ({**MODEL, "shift": -1}, ["shift", "-1"]),
        ({**MODEL, "shift": "3"}, ["shift", "'3'"]),
        ({**MODEL, "num_train_timesteps": 1}, ["num_train_timesteps", "1"]),
        ({**MODEL, "num_train_timesteps": 0.5}, ["num_train_timesteps", "0.5"]),
        ({**MODEL, "use_dynamic_shifting": True}, ["use_dynamic_shifting", "True"]),
        ({**MODEL, "invert_sigmas": True}, ["invert_sigmas", "True"]),
        ({**LATENT, "_class_name": "EulerDiscreteScheduler", **SOLVER}, ["use_flow_sigmas", "True"]),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, ["use_flow_sigmas", "together"]),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, ["shift_terminal", "0.1"]),
    ],
)
def test_config_errors_name_option_and_value(config, words):
    with pytest.raises(GazeError) as error:
        NoiseSchedule.from_config(config)
    assert all(word in str(error.value) for word in words)


def test_the_training_target_is_the_flow_at_every_level():
    levels = schedule()
    sigma = uniform_timesteps(levels)((torch.arange(1000) + 0.5) / 1000)
    assert torch.equal(sigma, levels.sigmas_T)
    clean, noise = torch.randn(2, 1000, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def predict(x, level):
        noisy = theirs.scale_noise(clean, theirs.timesteps.flip(0), noise)
        torch.testing.assert_close(x, noisy, rtol=0, atol=1e-5)
        torch.testing.assert_close(levels.timestep(level).float(), theirs.timesteps.flip(0), rtol=0, atol=1e-3)
        return noise - clean

    # At the lowest level, 0.003, the rounding of x is divided by it.
    assert denoising_loss(predict, clean, noise, sigma, levels, torch.ones(1000)).max() < 1e-8
    assert min_snr_weight(sigma, levels).isfinite().all()
