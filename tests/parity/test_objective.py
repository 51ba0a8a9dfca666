"""Noisy inputs, targets and min-SNR weights against diffusers' formulas, and the options against its signatures."""

import inspect
from itertools import combinations

import diffusers
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from diffusion.noise import NoiseSchedule
from diffusion.objective import (
    WEIGHTINGS,
    denoising_loss,
    edm_weight,
    log_normal,
    min_snr_weight,
    uniform_timesteps,
    uniform_weight,
)
from diffusion.scheduler_config import (
    EDM_SCHEDULERS,
    FIXED,
    FLOW_SCHEDULERS,
    IGNORED,
    METHOD,
    OF_EDM,
    READ,
    SCHEDULERS,
    check_options,
)

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLASSES = [*SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS]
TIMESTEPS = torch.arange(1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_inputs_and_targets(prediction_type):
    scheduler = diffusers.DDPMScheduler.from_config({**CONFIG, "prediction_type": prediction_type})
    schedule = NoiseSchedule.from_config({**CONFIG, "prediction_type": prediction_type})
    clean, noise = torch.randn(2, 1000, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    targets = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, TIMESTEPS),
        "sample": clean,
    }

    def predict(x, sigma):
        torch.testing.assert_close(x, scheduler.add_noise(clean, noise, TIMESTEPS), rtol=0, atol=1e-5)
        torch.testing.assert_close(schedule.timestep(sigma), TIMESTEPS.double())
        return targets[prediction_type]

    loss = denoising_loss(predict, clean, noise, schedule.sigma(TIMESTEPS), schedule, torch.ones(1000))
    assert loss.max() < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma):
    # The weighting of diffusers' examples/text_to_image/train_text_to_image.py; for "sample", not there, the paper's.
    snr = compute_snr(diffusers.DDPMScheduler.from_config(CONFIG), TIMESTEPS).double()
    capped = snr.clamp(max=gamma)
    for prediction_type, weight in (
        ("epsilon", capped / snr),
        ("v_prediction", capped / (snr + 1)),
        ("sample", capped),
    ):
        schedule = NoiseSchedule.from_config({**CONFIG, "prediction_type": prediction_type})
        ours = min_snr_weight(schedule.sigmas_T, schedule, gamma)
        torch.testing.assert_close(ours, weight, rtol=1e-3, atol=1e-7)


def test_flow_weights_and_densities():
    # Those of diffusers' train_dreambooth_lora_sd3.py, in its time: sigma / (1 + sigma).
    schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    sigma = schedule.sigmas_T
    time = sigma / (1 + sigma)
    assert torch.equal(uniform_weight(sigma, schedule), compute_loss_weighting_for_sd3("none", time))
    # EDM's weighting of a flow is the inverse of their "cosmap", up to a constant.
    both = edm_weight(sigma, schedule) * compute_loss_weighting_for_sd3("cosmap", time)
    torch.testing.assert_close(both, torch.full_like(both, 2 / torch.pi))
    options = {"batch_size": 5000, "logit_mean": -0.3, "logit_std": 0.7}
    theirs = compute_density_for_timestep_sampling("logit_normal", **options, generator=torch.manual_seed(0))
    drawn = torch.normal(-0.3, 0.7, (5000,), generator=torch.manual_seed(0)).double()
    ours = log_normal(schedule, -0.3, 0.7)(torch.special.ndtr((drawn + 0.3) / 0.7))
    torch.testing.assert_close(ours / (1 + ours), theirs.double(), rtol=0, atol=1e-6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = compute_density_for_timestep_sampling("none", 5000, generator=torch.manual_seed(0))
    levels = scheduler.sigmas.flip(0)[(u * 1000).long()].double()
    ours = uniform_timesteps(schedule)(u)
    torch.testing.assert_close(ours / (1 + ours), levels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_inputs_targets_and_weights(sigma_data, prediction_type):
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": sigma_data, "prediction_type": prediction_type}
    scheduler, schedule = diffusers.EDMEulerScheduler.from_config(config), NoiseSchedule.from_config(config)
    sigma = schedule.sigmas_T
    clean, noise = torch.randn(2, 1000, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = sigma[:, None, None, None]
    output = torch.randn(1000, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def predict(x, sigma_B):
        torch.testing.assert_close(x, scheduler.precondition_inputs(clean + level * noise, level))
        torch.testing.assert_close(schedule.timestep(sigma_B), scheduler.precondition_noise(sigma))
        return output

    # The weighted error of the picture that diffusers makes of the output (Karras et al. 2022, eq. 2 and table 1).
    picture = scheduler.precondition_outputs(clean + level * noise, output, level)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    loss = denoising_loss(predict, clean, noise, sigma, schedule, WEIGHTINGS["edm"](sigma, schedule, 5.0))
    torch.testing.assert_close(loss, weight * (picture - clean).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(WEIGHTINGS["edm"](sigma, schedule, 5.0), torch.ones_like(sigma))


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_every_class_is_read_or_fixed_or_ignored(name):
    parameters = dict(inspect.signature(getattr(diffusers, name)).parameters)
    parameters.pop("kwargs", None)
    assert parameters.keys() <= READ | OF_EDM | FIXED.keys() | METHOD.keys() | IGNORED.keys()
    check_options({"_class_name": name, **{key: value.default for key, value in parameters.items()}})


def test_the_four_sets_are_apart_and_have_nothing_unknown_to_diffusers():
    sets = [READ, FIXED.keys(), METHOD.keys(), IGNORED.keys()]
    assert not any(one & other for one, other in combinations(sets, 2))
    assert OF_EDM & READ.union(*sets) == {"sigma_max", "sigma_min"}
    known = {option for name in CLASSES for option in inspect.signature(getattr(diffusers, name)).parameters}
    assert known | {"noise_sampler_seed"} >= OF_EDM.union(*sets)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_configs_open(name, tmp_path):
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(tmp_path)
    schedule = NoiseSchedule.from_config(scheduler.load_config(tmp_path))
    signal = scheduler.alphas_cumprod
    assert torch.equal(schedule.sigmas_T, ((1 - signal) / signal).sqrt().double())
