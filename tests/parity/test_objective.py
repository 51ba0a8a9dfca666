"""Noisy inputs, targets and min-SNR weights against diffusers' formulas, and the options against its signatures."""

import inspect
from itertools import combinations

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from diffusion.noise import NoiseSchedule
from diffusion.objective import denoising_loss, min_snr_weight
from diffusion.scheduler_config import FIXED, FLOW_SCHEDULERS, IGNORED, METHOD, READ, SCHEDULERS, check_options

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLASSES = [*SCHEDULERS, *FLOW_SCHEDULERS]
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

    loss = denoising_loss(predict, clean, noise, schedule.sigma(TIMESTEPS), prediction_type, torch.ones(1000))
    assert loss.max() < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma):
    # The weighting of diffusers' examples/text_to_image/train_text_to_image.py; for "sample", not there, the paper's.
    snr = compute_snr(diffusers.DDPMScheduler.from_config(CONFIG), TIMESTEPS).double()
    capped = snr.clamp(max=gamma)
    sigma = NoiseSchedule.from_config(CONFIG).sigmas_T
    for prediction_type, weight in (
        ("epsilon", capped / snr),
        ("v_prediction", capped / (snr + 1)),
        ("sample", capped),
    ):
        torch.testing.assert_close(min_snr_weight(sigma, prediction_type, gamma), weight, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_every_class_is_read_or_fixed_or_ignored(name):
    parameters = dict(inspect.signature(getattr(diffusers, name)).parameters)
    parameters.pop("kwargs", None)
    assert parameters.keys() <= READ | FIXED.keys() | METHOD.keys() | IGNORED.keys()
    check_options({"_class_name": name, **{key: value.default for key, value in parameters.items()}})


def test_the_four_sets_are_apart_and_have_nothing_unknown_to_diffusers():
    sets = [READ, FIXED.keys(), METHOD.keys(), IGNORED.keys()]
    assert not any(one & other for one, other in combinations(sets, 2))
    known = {option for name in CLASSES for option in inspect.signature(getattr(diffusers, name)).parameters}
    assert known | {"noise_sampler_seed"} >= READ.union(*sets)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_configs_open(name, tmp_path):
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(tmp_path)
    schedule = NoiseSchedule.from_config(scheduler.load_config(tmp_path))
    signal = scheduler.alphas_cumprod
    assert torch.equal(schedule.sigmas_T, ((1 - signal) / signal).sqrt().double())
