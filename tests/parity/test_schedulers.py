"""diffusers' schedulers, driven by us, against a plain loop over the same class; the names; what is refused."""

import inspect
import re

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import GazeError
from diffusion.foreign import EDM_FOREIGN, FLOW_FOREIGN, FOREIGN, MISFITS
from diffusion.noise import NoiseSchedule, scaling
from diffusion.samplers import EDM_SAMPLERS, FLOW_SAMPLERS, SAMPLERS, PictureNoise
from diffusion.scheduler_config import EDM_SCHEDULERS, FLOW_SCHEDULERS, FLOW_SOLVERS, PREDICTION_TYPES, SCHEDULERS
from diffusion.schedulers import EDMS, FLOWS, TABLE, default_name, prepare, table
from diffusion.spacing import LEVEL_SPACINGS, SPACINGS
from tests.parity.network import LATENT, Network

SHAPE = (3, 5, 4)
NAMES = list(FOREIGN)
UNEVEN = ("DDIMParallelScheduler", "DDIMScheduler", "pndm")  # with linspace they step past what they visit next
FLOW_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
EDM_CONFIG = {"_class_name": "EDMEulerScheduler"}


def schedule(**options):
    return NoiseSchedule.from_config({**LATENT, **options})


def picture_noise(seeds=(5, 6)):
    return PictureNoise([torch.Generator().manual_seed(seed) for seed in seeds], SHAPE)


def make(name, **options):
    """The class behind a name, made without our code."""
    row = FOREIGN[name]
    return getattr(diffusers, row.class_name).from_config({**LATENT, **row.options, **options})


def plain_loop(scheduler, steps, prediction_type, seeds=(5, 6), dtype=torch.float32, **arguments):
    """x of constant variance at the end, and the timesteps of the calls, as any script over diffusers does it."""
    scheduler.set_timesteps(steps)
    network = Network(scheduler.alphas_cumprod, prediction_type)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generators
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = list(seeds)
    x = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators])
    x = x.to(dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **arguments).prev_sample
    return x, network.timesteps


def run(scheduler, levels, steps, spacing=None, seeds=(5, 6), dtype=torch.float32):
    """The same through our code."""
    trajectory = prepare(scheduler, levels, steps, spacing)
    table = diffusers.EulerDiscreteScheduler.from_config(levels.config).alphas_cumprod
    network = Network(table, levels.prediction_type)

    def denoise(x, sigma):
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in = scaling(levels.prediction_type, level)
        return c_skip * x + c_out * network(c_in * x, levels.timestep(level))

    noise = picture_noise(seeds)
    path = list(trajectory.run(denoise, noise().to(dtype) * trajectory.start, noise=noise))
    assert len(path) == len(trajectory.sigmas) - 1 == len(network.timesteps)
    assert [step.sigma for step in path] == trajectory.sigmas[1:].tolist()
    return path[-1].x_BCHW, network.timesteps


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    assert (ours[0] - theirs[0]).abs().max() < tolerance


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_plain_loop(name, prediction_type):
    steps = 10
    ours = run(name, schedule(prediction_type=prediction_type), steps)
    if prediction_type in FOREIGN[name].outputs:
        assert_same(ours, plain_loop(make(name, prediction_type=prediction_type), steps, prediction_type))
    else:  # the class does not read it; the network's picture is the same
        assert_same(ours, plain_loop(make(name), steps, "epsilon"))


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_plain_loop_for_any_number_of_steps(name, steps):
    # In float64: a step from sigma 14 to 0.03 makes differences, rounding too, hundreds of times larger.
    theirs = plain_loop(make(name), steps, "epsilon", dtype=torch.float64)
    assert_same(run(name, schedule(), steps, dtype=torch.float64), theirs)


def spacing_options(spacing):
    return {f"use_{spacing}_sigmas": True} if spacing in LEVEL_SPACINGS else {"timestep_spacing": spacing}


@pytest.mark.parametrize("spacing", [*LEVEL_SPACINGS, *SPACINGS])
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_plain_loop_with_every_spacing(name, spacing):
    options = spacing_options(spacing)
    parameters = inspect.signature(getattr(diffusers, FOREIGN[name].class_name)).parameters
    if spacing == "linspace" and name in UNEVEN:
        theirs = plain_loop(make(name, **options), 12, "epsilon")
        assert_same(run(name, schedule(**options), 12), theirs, 3e-5)  # where the model's own config asks for it
        with pytest.raises(GazeError, match=f"{name} does not converge with linspace(?s:.*)one of leading, trailing"):
            run(name, schedule(), 12, "linear")
    elif options.keys() <= parameters.keys() and name not in ("LCMScheduler", "tcd"):
        assert_same(run(name, schedule(), 12, spacing), plain_loop(make(name, **options), 12, "epsilon"), 3e-5)
    else:
        with pytest.raises(GazeError, match=f"{re.escape(name)} has no {spacing} spacing"):
            run(name, schedule(), 12, spacing)


@pytest.mark.parametrize(
    ("written", "options", "of_step"),
    [
        ("DDIMScheduler:eta=0.7", {}, {"eta": 0.7}),
        ("EulerDiscreteScheduler:s_churn=3,s_noise=1.01", {}, {"s_churn": 3.0, "s_noise": 1.01}),
        ("lms:order=2", {}, {"order": 2}),
        ("dpmsolver++:solver_order=3,use_lu_lambdas=true", {"solver_order": 3, "use_lu_lambdas": True}, {}),
        ("dpmsolver++:final_sigmas_type=sigma_min", {"final_sigmas_type": "sigma_min"}, {}),
        ("UniPCMultistepScheduler:predict_x0=true, solver_order=3", {"solver_order": 3}, {}),
        ("tcd:eta=0", {}, {"eta": 0.0}),
    ],
)
def test_options_by_name(written, options, of_step):
    name = written.partition(":")[0]
    scheduler = getattr(diffusers, TABLE.classes.get(name, FOREIGN.get(name)).class_name)
    theirs = plain_loop(scheduler.from_config({**LATENT, **options}), 8, "epsilon", **of_step)
    assert_same(run(written, schedule(), 8), theirs)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50, 100])
@pytest.mark.parametrize("name", NAMES)
def test_number_of_network_calls(name, steps):
    row = FOREIGN[name]
    # LCM and TCD choose from 50, if nothing else is said.
    options = ":original_inference_steps=100" if steps == 100 and not row.spacings else ""
    calls = len(prepare(name + options, schedule(), steps).sigmas) - 1
    twice = name in ("HeunDiscreteScheduler", "kdpm2", "kdpm2_ancestral", "dpmsolver_sde")
    assert calls == row.calls(steps)
    assert calls == steps + (steps - 1) * twice + (name == "pndm" and steps > 1)


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_ones_and_only_they_draw_noise(name):
    trajectory = prepare(name, schedule(), 6)

    def end(seeds):
        start = torch.ones(len(seeds), *SHAPE) * trajectory.start
        *_, last = trajectory.run(lambda x, sigma: x / (1 + sigma**2), start, noise=picture_noise(seeds))
        return last.x_BCHW

    pictures = end((1, 2))
    assert (not torch.equal(pictures, end((3, 2)))) == FOREIGN[name].stochastic
    assert torch.allclose(pictures[1], end((2,))[0], atol=1e-6), "every picture has a generator of its own"


def test_an_object_is_copied_and_gives_what_its_name_gives():
    for name in NAMES:
        given = make(name)
        given.set_timesteps(3)
        before = {key: str(value) for key, value in vars(given).items()}
        found, timesteps = run(given, schedule(), 2)
        assert {key: str(value) for key, value in vars(given).items()} == before
        expected, their_timesteps = run(name, schedule(), 2)
        assert torch.equal(found, expected)
        assert timesteps == their_timesteps


def test_the_name_of_an_object_makes_it_again():
    given = diffusers.DPMSolverMultistepScheduler.from_config(
        {**LATENT, "use_karras_sigmas": True, "solver_order": 3, "prediction_type": "v_prediction"}
    )
    trajectory = prepare(given, schedule(), 5)
    assert trajectory.name.startswith("DPMSolverMultistepScheduler:")
    assert {"solver_order=3", "use_karras_sigmas=true"} < set(trajectory.name.partition(":")[2].split(","))
    assert torch.equal(run(given, schedule(), 5)[0], run(trajectory.name, schedule(), 5)[0])
    assert prepare(diffusers.DDIMScheduler.from_config(LATENT), schedule(), 5).name == "DDIMScheduler"


def test_an_object_may_read_another_prediction_type_than_the_model_has():
    config = {**LATENT, "timestep_spacing": "trailing"}
    velocity = diffusers.EulerDiscreteScheduler.from_config({**config, "prediction_type": "v_prediction"})
    epsilon = diffusers.EulerDiscreteScheduler.from_config(config)
    levels = schedule(timestep_spacing="trailing", prediction_type="v_prediction")
    assert_same(run(epsilon, levels, 10), run(velocity, levels, 10))


def test_a_subclass_is_driven_as_its_class():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    known = run("EulerDiscreteScheduler", schedule(), 4)
    assert torch.equal(run(Mine.from_config(LATENT), schedule(), 4)[0], known[0])


def test_zero_terminal_snr():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    for name in ("EulerDiscreteScheduler", "dpmsolver++", "DDIMScheduler"):
        theirs = plain_loop(make(name, **config), 10, "v_prediction", dtype=torch.float64)
        # Where DDIM's last level is infinite, the model's table has 4096.
        assert_same(run(name, schedule(**config), 10, dtype=torch.float64), theirs, 1e-3 if name[:2] == "DD" else 1e-5)
    with pytest.raises(GazeError, match="deis is made for other noise levels than this model's"):
        prepare("deis", schedule(**config), 10)


def test_every_class_of_diffusers_fits_or_is_refused_with_a_reason():
    classes = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert TABLE.classes.keys() == SCHEDULERS.keys()
    assert FLOWS.classes.keys() == {*FLOW_SCHEDULERS, *FLOW_SOLVERS}
    assert EDMS.classes.keys() == {*EDM_SCHEDULERS}
    fitting = TABLE.classes.keys() | FLOWS.classes.keys() | EDMS.classes.keys()
    assert not fitting & MISFITS.keys()
    assert classes - fitting - MISFITS.keys() == set()
    configs = ((TABLE, LATENT), (FLOWS, FLOW_CONFIG), (EDMS, EDM_CONFIG))
    for kind, levels in ((kind, NoiseSchedule.from_config(config)) for kind, config in configs):
        for name in {*MISFITS, *fitting} - kind.classes.keys():
            with pytest.raises(GazeError, match=f"{name} does not fit {kind.words}") as error:
                prepare(name, levels, 4)
            assert f"one of {', '.join([*kind.samplers, *kind.foreign])}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_what_the_class_reads(name):
    for prediction_type in PREDICTION_TYPES:
        scheduler = make(name, prediction_type=prediction_type)
        if prediction_type in FOREIGN[name].outputs:
            prepare(scheduler, schedule(), 4)
        else:
            with pytest.raises(GazeError, match="prediction_type 'sample', which does not fit"):
                prepare(scheduler, schedule(), 4)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler does not fit.*flow-matching"),
        (diffusers.EulerDiscreteScheduler(), r"(?s)made for other noise levels.*from_config\(pipe"),
        (diffusers.EulerDiscreteScheduler(num_train_timesteps=500), "made for other noise levels"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas True"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "prediction_type 'flow_prediction'"),
        ("euler_ancestral_rf", "does not fit a model with a table of noise levels"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type 'continuous'"),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler does not fit"),
        (3, "'int'"),
        (None, "'NoneType'"),
        ("dpmsolver+", "did you mean 'dpmsolver"),
        ("DEISMultistepSchedule", "did you mean 'DEISMultistepScheduler'"),
        ("x" * 100_000, "100000 characters"),
        ("deis:solver_oder=3", "did you mean 'solver_order'"),
        ("deis:solver_order=two", "solver_order is 'two'"),
        ("deis:solver_order=true", "solver_order is 'true'"),
        ("deis:solver_order=1000000000", "solver_order is '1000000000'"),
        ("deis:beta_start=0.1", "no option 'beta_start'"),
        ("ddim:steps_offset=1" + "0" * 300, "steps_offset is"),
        ("deis:solver_order", "'solver_order' is not an option"),
        ("dpmsolver_singlestep:solver_order=7", "cannot be made: Order > 3"),
        ("UniPCMultistepScheduler:solver_type=bh1", "not finite"),
        ("deis:solver_type=euler", "cannot be made"),
        ("DDIMScheduler:eta=nan", "eta is 'nan'"),
        ("DDIMScheduler:eta=NaN", "not finite"),
        ("lcm:eta=1", "no option 'eta'"),
        ("ddim:eta=2", "eta from 0"),
        ("ddim:eta=NaN", "eta from 0"),
        ("ddim:timestep_spacing=odd", "odd"),
    ],
)
def test_what_does_not_fit_is_refused(scheduler, says):
    with pytest.raises(GazeError, match=says) as error:
        prepare(scheduler, schedule(), 4)
    assert len(str(error.value).splitlines()) <= 3


def test_steps_and_spacings_that_cannot_be_are_refused():
    for steps in (0, 1001):
        with pytest.raises(GazeError, match=f"{steps} sampling steps"):
            prepare("deis", schedule(), steps)
    with pytest.raises(GazeError, match="tcd cannot do 60 steps"):
        prepare("tcd", schedule(), 60)
    with pytest.raises(GazeError, match="did you mean 'karras'"):
        prepare("euler", schedule(), 4, "karas")
    with pytest.raises(GazeError, match="unknown spacing 3"):
        prepare("euler", schedule(), 4, 3)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    name=st.sampled_from(["ddim", "euler", "deis", "DDIMScheduler", "FlowMatchLCMScheduler", "tcd", "", "x"]),
    text=st.text(max_size=60),
    data=st.data(),
)
def test_any_text_is_a_scheduler_or_refused(name, text, data):
    levels = data.draw(st.sampled_from([schedule(), *map(NoiseSchedule.from_config, (FLOW_CONFIG, EDM_CONFIG))]))
    options = ["eta", "s_tmax", "shift", "shift_terminal", "solver_order", "steps_offset", "timestep_spacing"]
    key = data.draw(st.sampled_from([*options, "trained_betas"]))
    for written in (text, f"{name}:{text}", f"{name}:{key}={text}"):
        try:
            trajectory = prepare(written, levels, 2)
        except GazeError:
            continue
        assert len(trajectory.sigmas) == 3


def test_the_table_has_every_name_once():
    rows = {row["name"]: row for row in table()}
    assert list(rows) == [*SAMPLERS, *sorted({*FOREIGN, *FLOW_FOREIGN, *EDM_FOREIGN})]
    assert SAMPLERS.keys() == FLOW_SAMPLERS.keys() == EDM_SAMPLERS.keys()
    assert len(rows) == len(table())
    assert rows["heun"]["prediction_types"] == [*PREDICTION_TYPES, "flow_prediction", "edm"]
    assert rows["deis"]["prediction_types"] == [*PREDICTION_TYPES, "flow_prediction"]
    assert rows["lms"]["prediction_types"] == list(PREDICTION_TYPES)
    assert rows["euler_ancestral_rf"]["prediction_types"] == ["flow_prediction"]
    assert rows["EDMEulerScheduler"]["prediction_types"] == ["edm"]
    for kind in (TABLE, FLOWS, EDMS):
        for name, method in {**kind.samplers, **kind.foreign}.items():
            assert rows[name]["stochastic"] == method.stochastic
            assert rows[name]["order"] <= method.order
    assert rows["heun"]["calls"] == "2n - 1"
    assert rows["pndm"]["calls"] == "n + 1"
    assert [rows[name]["order"] for name in ("dpmpp_2m", "unipc", "lms", "pndm")] == [2, 2, 3, 2]
    assert not rows["deis"]["stochastic"]
    assert rows["euler_ancestral"]["stochastic"]


@pytest.mark.parametrize(
    ("class_name", "options", "name"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, "ddim"),
        ("EulerDiscreteScheduler", {"interpolation_type": "linear"}, "euler"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "EulerDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "DPMSolverMultistepScheduler"),
        ("UniPCMultistepScheduler", {"solver_type": "bh2", "disable_corrector": []}, "unipc"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "UniPCMultistepScheduler"),
        ("DEISMultistepScheduler", {}, "DEISMultistepScheduler"),
    ],
)
def test_a_models_own_scheduler_is_ours_where_it_does_the_same(class_name, options, name):
    config = {**LATENT, "_class_name": class_name, **options}
    levels = NoiseSchedule.from_config(config)
    assert default_name(class_name, config) == name
    if name == class_name:
        theirs = plain_loop(getattr(diffusers, class_name).from_config(config), 6, "epsilon")
        assert_same(run(name, levels, 6), theirs)


def test_options_of_another_method_are_left_behind():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    assert torch.equal(run("deis", schedule(**config), 6)[0], run("deis", schedule(), 6)[0])
