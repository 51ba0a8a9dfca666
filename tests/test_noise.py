"""Noise schedules against closed forms, their inverse, spacings, scalings and strict configs."""

import itertools
import json
import math
import time

import diffusers
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import GazeError
from diffusion.noise import PREDICTION_TYPES, NoiseSchedule, scaling
from diffusion.schedulers import prepare
from diffusion.spacing import LEVEL_SPACINGS, SPACINGS, beta_quantile, spaced_sigmas, spaced_timesteps
from tests.test_hostile_configs import VALUES

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {**LATENT, "rescale_betas_zero_snr": True}
EDM = {"_class_name": "EDMEulerScheduler"}
SCHEDULES = {
    "linear": {},
    "scaled_linear": LATENT,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": ZERO_SNR,
    "trained": {"trained_betas": [0.1, 0.2, 0.3]},
}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES)
def schedule(request):
    return NoiseSchedule.from_config(request.param)


def test_closed_forms():
    linear = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    scaled = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2 for t in range(1000)]
    for config, betas in (({}, linear), (LATENT, scaled)):
        schedule = NoiseSchedule.from_config(config)
        signal = math.prod(1 - beta for beta in betas)
        assert schedule.sigmas_T[-1].item() == pytest.approx(math.sqrt((1 - signal) / signal), rel=1e-4)
        assert schedule.sigmas_T[0].item() == pytest.approx(math.sqrt(betas[0] / (1 - betas[0])), rel=1e-3)
    cosine = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    signal = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine.sigmas_T[499].item() == pytest.approx(math.sqrt((1 - signal) / signal), rel=1e-3)


def test_zero_terminal_snr_keeps_the_first_level_and_caps_the_last():
    plain, rescaled = NoiseSchedule.from_config(LATENT), NoiseSchedule.from_config(ZERO_SNR)
    assert rescaled.sigmas_T[-1].item() == pytest.approx(4096, rel=1e-6)
    assert rescaled.sigmas_T[0].item() == pytest.approx(plain.sigmas_T[0].item(), rel=1e-4)


def test_table_is_ascending_and_finite(schedule):
    assert schedule.sigmas_T.dtype == torch.float64
    assert schedule.sigmas_T.isfinite().all()
    assert (schedule.sigmas_T.diff() > 0).all()


def test_sigma_and_timestep_are_inverse(schedule):
    last = len(schedule.sigmas_T) - 1
    whole = torch.arange(last + 1, dtype=torch.float64)
    assert torch.equal(schedule.sigma(whole), schedule.sigmas_T)
    assert torch.equal(schedule.timestep(schedule.sigmas_T), whole)
    between = torch.rand(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * last
    torch.testing.assert_close(schedule.timestep(schedule.sigma(between)), between, rtol=0, atol=1e-9)


def test_sigma_and_timestep_stop_at_the_ends(schedule):
    last = len(schedule.sigmas_T) - 1
    assert schedule.sigma(torch.tensor([-5.0, last + 5.0])).tolist() == schedule.sigmas_T[[0, -1]].tolist()
    assert schedule.timestep(torch.tensor([0.0, 1e9])).tolist() == [0, last]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_scaling_recovers_the_clean_picture(prediction_type):
    clean, noise = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma in torch.tensor([0.01, 0.5, 1.0, 14.6, 157.0], dtype=torch.float64):
        alpha, beta = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        output = {"epsilon": noise, "v_prediction": alpha * noise - beta * clean, "sample": clean}[prediction_type]
        c_skip, c_out, c_in = scaling(prediction_type, sigma)
        x = clean + sigma * noise
        torch.testing.assert_close(c_in * x, alpha * clean + beta * noise)
        torch.testing.assert_close(c_skip * x + c_out * output, clean)
    assert all(factor.shape == (3, 1) for factor in scaling(prediction_type, torch.ones(3, 1)))


def test_scaling_at_no_noise_is_finite():
    for prediction_type in PREDICTION_TYPES:
        assert all(factor.isfinite() for factor in scaling(prediction_type, torch.tensor(0.0)))
    with pytest.raises(GazeError, match="v_prediction"):
        scaling("velocity", torch.tensor(1.0))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scalings_of_karras_et_al(sigma_data):
    # Karras et al. 2022, table 1.
    schedule = NoiseSchedule.from_config({**EDM, "sigma_data": sigma_data})
    sigma = schedule.sigmas_T
    total = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = schedule.scaling(sigma)
    torch.testing.assert_close(c_skip, sigma_data**2 / total)
    torch.testing.assert_close(c_out, sigma * sigma_data / total.sqrt())
    torch.testing.assert_close(c_in, 1 / total.sqrt())
    torch.testing.assert_close(schedule.timestep(sigma), sigma.log() / 4)
    torch.testing.assert_close(schedule.sigma(schedule.timestep(sigma)), sigma)
    assert sigma[[0, -1]].tolist() == pytest.approx([0.002, 80])
    assert torch.equal(schedule.scaling(sigma, "v_prediction").c_out, -c_out)
    # With deviation 1 and that sign it is the velocity of the models with a table.
    if sigma_data == 1:
        velocity = scaling("v_prediction", sigma)
        assert all(map(torch.equal, schedule.scaling(sigma, "v_prediction"), velocity))


def test_spacings_by_hand():
    assert spaced_timesteps("leading", 1000, 4, offset=1).tolist() == [751, 501, 251, 1]
    assert spaced_timesteps("trailing", 1000, 4).tolist() == [999, 749, 499, 249]
    assert spaced_timesteps("linspace", 1000, 4).tolist() == pytest.approx([999, 666, 333, 0])
    assert spaced_timesteps("linspace", 1000, 1).tolist() == [999]
    with pytest.raises(GazeError, match="trailing"):
        spaced_timesteps("trailin", 1000, 4)


@settings(derandomize=True, deadline=None)
@given(total=st.integers(2, 2000), share=st.floats(0, 1), spacing=st.sampled_from(SPACINGS))
def test_spacings_have_the_count_and_stay_inside(total, share, spacing):
    count = 1 + int(share * (total - 1))
    timesteps = spaced_timesteps(spacing, total, count)
    assert timesteps.shape == (count,)
    assert 0 <= timesteps[-1] <= timesteps[0] <= total - 1
    assert (timesteps.diff() < 0).all()


def test_karras_levels():
    sigmas = spaced_sigmas("karras", 14.6, 0.03, 9)
    assert sigmas[[0, -1]].tolist() == pytest.approx([14.6, 0.03])
    assert sigmas[4].item() == pytest.approx(((14.6 ** (1 / 7) + 0.03 ** (1 / 7)) / 2) ** 7)


@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_levels_go_from_end_to_end(spacing, count):
    sigmas = spaced_sigmas(spacing, 14.6, 0.03, count)
    assert sigmas.shape == (count,)
    assert sigmas[0].item() == pytest.approx(14.6)
    assert count == 1 or sigmas[-1].item() == pytest.approx(0.03)
    assert (sigmas.diff() < 0).all()
    with pytest.raises(GazeError, match=spacing):
        spaced_sigmas(f"{spacing}s", 14.6, 0.03, count)


def test_exponential_and_beta_levels():
    ratios = spaced_sigmas("exponential", 16.0, 1.0, 5)
    assert ratios.tolist() == pytest.approx([16, 8, 4, 2, 1])
    for shape in (0.6, 0.3, 0.9):
        shares = torch.linspace(0, 1, 101, dtype=torch.float64)
        exact = scipy.stats.beta.ppf(shares.numpy(), shape, shape)
        assert beta_quantile(shares, shape).tolist() == pytest.approx(exact.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, ["CMStochasticIterativeScheduler", "did you mean"]),
        ({"beta_strat": 0.1}, ["beta_strat", "0.1", "beta_start"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas", "True"]),
        ({"timestep_type": "continuous"}, ["timestep_type", "continuous", "discrete"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type", "flow_prediction", "epsilon"]),
        ({"timestep_spacing": "log"}, ["timestep_spacing", "log", "leading"]),
        ({"final_sigmas_type": "one"}, ["final_sigmas_type", "one", "sigma_min"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid", "linear"]),
        ({"beta_start": 0.0}, ["beta_start", "0.0"]),
        ({"trained_betas": [0.5, 1.5]}, ["betas"]),
        ({"num_train_timesteps": 0}, ["betas"]),
        ({"num_train_timesteps": 10**12}, ["num_train_timesteps", "out of range"]),
        ({"solver_order": 10**9}, ["solver_order", "100000"]),
        ({"sigma_data": 0.5}, ["sigma_data", "0.5", "trained_betas"]),
        ({**EDM, "sigma_data": 0}, ["sigma_data", "0.5"]),
        ({**EDM, "sigma_min": 80.0}, ["sigma_min is 80.0, sigma_max 80.0"]),
        ({**EDM, "rho": 0.5}, ["rho is 0.5"]),
        ({**EDM, "sigma_schedule": "cosine"}, ["sigma_schedule", "cosine", "exponential"]),
        ({**EDM, "prediction_type": "sample"}, ["prediction_type", "sample", "v_prediction"]),
        ({**EDM, "num_train_timesteps": 1}, ["num_train_timesteps"]),
    ],
)
def test_config_errors_name_option_and_value(config, words):
    with pytest.raises(GazeError) as error:
        NoiseSchedule.from_config(config)
    assert all(word in str(error.value) for word in words)


def test_config_as_stable_diffusion_ships_it():
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.6.0",
            **LATENT,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
            "clip_sample": False,
        }
    )
    assert schedule.prediction_type == "epsilon"
    assert schedule.sigmas_T[[0, -1]].tolist() == pytest.approx([0.0292, 14.6146], abs=1e-4)
    assert NoiseSchedule.from_config({"_class_name": "HeunDiscreteScheduler"}).sigmas_T[0].item() == pytest.approx(
        0.0292, abs=1e-4
    )


CONFIGS = [
    (diffusers.EulerDiscreteScheduler, {}, ["euler"]),
    (diffusers.DDIMScheduler, {}, ["ddim", "DDIMScheduler"]),
    (diffusers.DPMSolverMultistepScheduler, {}, ["dpmpp_2m"]),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, ["euler", "FlowMatchEulerDiscreteScheduler"]),
    (diffusers.UniPCMultistepScheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, ["unipc"]),
    (diffusers.EDMEulerScheduler, {}, ["euler", "EDMEulerScheduler"]),
    (diffusers.EDMDPMSolverMultistepScheduler, {}, ["dpmpp_2m"]),
]


@pytest.mark.parametrize(("scheduler", "options", "names"), CONFIGS)
def test_every_option_may_be_hostile(scheduler, options, names):
    config = {"_class_name": scheduler.__name__, **json.loads(scheduler(**options).to_json_string())}
    for option, value in itertools.product(config, [*VALUES, [10**400], [math.nan], "x" * 10**6]):
        begin, said = time.process_time(), ""
        try:
            schedule = NoiseSchedule.from_config(config | {option: value})
            for name in names:
                prepare(name, schedule, 3)
        except GazeError as error:
            said = str(error)
        assert time.process_time() - begin < 1, (option, value)
        assert len(said.splitlines()) <= 3, (option, value)
