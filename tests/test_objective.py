"""The loss, its targets and weights, densities of noise levels, and joining prompts."""

import math
from statistics import NormalDist

import pytest
import torch

from diffusion.condition import Condition, blank, join
from diffusion.guidance import classifier_free
from diffusion.noise import PREDICTION_TYPES, NoiseSchedule, scaling
from diffusion.objective import WEIGHTINGS, denoising_loss, log_normal, nearest_noise, uniform_timesteps

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = NoiseSchedule.from_config({**LATENT, "rescale_betas_zero_snr": True})
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SCHEDULES = {
    **{kind: {**LATENT, "prediction_type": kind} for kind in PREDICTION_TYPES},
    **{f"{kind}, zero": {**ZERO_SNR.config, "prediction_type": kind} for kind in PREDICTION_TYPES},
    "flow": FLOW,
    "edm": {"_class_name": "EDMEulerScheduler"},
    "edm velocity": {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
}


def of(prediction_type):
    return NoiseSchedule.from_config(SCHEDULES[prediction_type])


def pictures(count, dtype=torch.float32):
    return torch.randn(2, count, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_of_a_known_error(prediction_type):
    clean, noise = pictures(3, torch.float64)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    alpha = torch.rsqrt(1 + sigma**2)[:, None, None, None]
    beta = sigma[:, None, None, None] * alpha
    right = {"epsilon": noise, "v_prediction": alpha * noise - beta * clean, "sample": clean}[prediction_type]

    def predict(x, level):
        torch.testing.assert_close(x, alpha * clean + beta * noise)
        assert level is sigma
        return right + 0.5

    loss = denoising_loss(predict, clean, noise, sigma, of(prediction_type), weight)
    torch.testing.assert_close(loss, 0.25 * weight)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_output_error_is_picture_error_over_c_out(prediction_type):
    clean, noise = pictures(2, torch.float64)
    sigma = torch.tensor([0.3, 3.0], dtype=torch.float64)
    output = pictures(2, torch.float64).sum(0)
    loss = denoising_loss(lambda x, level: output, clean, noise, sigma, of(prediction_type), torch.ones(2))
    c_skip, c_out, _ = scaling(prediction_type, sigma[:, None, None, None])
    denoised = c_skip * (clean + sigma[:, None, None, None] * noise) + c_out * output
    torch.testing.assert_close(loss * c_out.flatten() ** 2, (denoised - clean).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_and_weights_are_finite_over_the_whole_schedule(name, weighting):
    schedule = of(name)
    sigma = schedule.sigmas_T
    clean, noise = pictures(len(sigma))
    weight = WEIGHTINGS[weighting](sigma, schedule, 5.0)
    assert weight.isfinite().all()
    assert (weight > 0).all()
    output = torch.zeros(len(sigma), 4, 5, 6, requires_grad=True)
    loss = denoising_loss(lambda x, level: output, clean, noise, sigma, schedule, weight)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert loss.isfinite().all()
    assert output.grad.isfinite().all()
    # The target has about unit variance at every level, also where rounding is at its worst.
    plain = denoising_loss(lambda x, level: output, clean, noise, sigma, schedule, torch.ones(len(sigma)))
    if name != "edm":  # its pictures have deviation 1/2, these have 1
        assert 0.2 < plain.min() < plain.max() < 4


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_by_their_closed_forms(name, gamma):
    """What the error of the denoised picture counts: that of the output, over c_out^2, written out per kind."""
    schedule = of(name)
    sigma, data = schedule.sigmas_T, 0.5 if name == "edm" else 1.0
    c_out_2 = {
        "epsilon": sigma**2,
        "v_prediction": sigma**2 / (1 + sigma**2),
        "sample": torch.ones_like(sigma),
        "flow": (sigma / (1 + sigma)) ** 2,
        "edm": (sigma * data) ** 2 / (sigma**2 + data**2),
        "edm velocity": sigma**2 / (1 + sigma**2),
    }[name.removesuffix(", zero")]
    snr = 1 / sigma**2
    closed = {
        "uniform": 1 / c_out_2,
        "min_snr": torch.minimum(snr, torch.full_like(snr, gamma)),
        "soft_min_snr": snr * gamma / (snr + gamma),
        "edm": snr + 1 / data**2,
    }
    for weighting, expected in closed.items():
        found = WEIGHTINGS[weighting](sigma, schedule, gamma)
        torch.testing.assert_close(found, expected * c_out_2, rtol=1e-9, atol=0)


def test_the_nearest_noise_is_taken_picture_by_picture():
    clean, *_ = pictures(3)
    far, near = clean + 2, clean + 1
    first = torch.stack([far[0], near[1], far[2]])
    second = torch.stack([near[0], far[1], far[2]])
    taken = nearest_noise(clean, [first, second])
    assert torch.equal(taken, torch.stack([near[0], near[1], far[2]]))
    assert torch.equal(nearest_noise(clean, iter([first])), first)
    draws = torch.randn(8, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    distances = (draws - clean).square().sum(dim=(2, 3, 4))
    assert torch.equal(nearest_noise(clean, draws), draws[distances.argmin(0), torch.arange(3)])
    for row in range(3):  # whoever else is in the batch
        alone = nearest_noise(clean[row : row + 1], draws[:, row : row + 1])
        assert torch.equal(alone[0], nearest_noise(clean, draws)[row])


def test_loss_computes_in_the_precision_of_the_picture():
    clean, noise = pictures(2)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def predict(x, level):
        return x.bfloat16()

    loss = denoising_loss(predict, clean, noise, sigma, of("v_prediction"), torch.ones(2, dtype=torch.float64))
    assert loss.dtype == torch.float32


def test_uniform_timesteps_visits_each_equally_often():
    u = (torch.arange(4000) + 0.5) / 4000
    sigma = uniform_timesteps(ZERO_SNR)(u)
    assert torch.equal(sigma, ZERO_SNR.sigmas_T.repeat_interleave(4))
    assert uniform_timesteps(ZERO_SNR)(torch.tensor([0.0, 1.0])).tolist() == ZERO_SNR.sigmas_T[[0, -1]].tolist()


def test_log_normal_quantiles():
    density = log_normal(ZERO_SNR, mean=-0.5, std=1.2)
    for u in (0.01, 0.5, 0.9):
        expected = math.exp(NormalDist(-0.5, 1.2).inv_cdf(u))
        assert density(torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(expected)
    assert density(torch.tensor([0.0, 1.0])).tolist() == ZERO_SNR.sigmas_T[[0, -1]].tolist()


def test_join_and_expand():
    one = Condition(torch.ones(1, 3, 2), torch.ones(1, 5))
    two = Condition(torch.zeros(2, 3, 2), torch.zeros(2, 5))
    both = join([one.expand(2), two])
    assert len(both) == 4
    assert both.context_BSE[:, 0, 0].tolist() == [1, 1, 0, 0]
    assert both.vector_BV[:, 0].tolist() == [1, 1, 0, 0]
    assert join([Condition(one.context_BSE)]).vector_BV is None
    seen = Condition(one.context_BSE, weight_BS=torch.tensor([[True, True, False]]))
    assert join([seen.expand(2), seen]).pick([2, 0]).weight_BS.tolist() == [[True, True, False]] * 2
    assert both.weight_BS is None
    weighed = Condition(one.context_BSE, weight_BS=torch.tensor([[1.0, 0.5, 0.0]]))
    assert join([Condition(one.context_BSE), weighed]).weight_BS.tolist() == [[1, 1, 1], [1, 0.5, 0]]
    blanked = blank(both, torch.tensor([True, False, False, False]))
    assert blanked.context_BSE[:, 0, 0].tolist() == [0, 1, 0, 0]
    assert blanked.vector_BV[:, 0].tolist() == [0, 1, 0, 0]
    assert Condition(one.context_BSE).expand(2).vector_BV is None


def test_classifier_free():
    uncond, cond = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert classifier_free(uncond, cond, 1).tolist() == [3, 2]
    assert classifier_free(uncond, cond, 0).tolist() == [1, 2]
    assert classifier_free(uncond, cond, 7.5).tolist() == [16, 2]
