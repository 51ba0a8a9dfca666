"""The loss, its targets and weights, densities of noise levels, and joining prompts."""

import math
from statistics import NormalDist

import pytest
import torch

from diffusion.condition import Condition, join
from diffusion.guidance import classifier_free
from diffusion.noise import PREDICTION_TYPES, NoiseSchedule, scaling
from diffusion.objective import denoising_loss, log_normal, min_snr_weight, uniform_timesteps, uniform_weight

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = NoiseSchedule.from_config({**LATENT, "rescale_betas_zero_snr": True})


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

    loss = denoising_loss(predict, clean, noise, sigma, prediction_type, weight)
    torch.testing.assert_close(loss, 0.25 * weight)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_output_error_is_picture_error_over_c_out(prediction_type):
    clean, noise = pictures(2, torch.float64)
    sigma = torch.tensor([0.3, 3.0], dtype=torch.float64)
    output = pictures(2, torch.float64).sum(0)
    loss = denoising_loss(lambda x, level: output, clean, noise, sigma, prediction_type, torch.ones(2))
    c_skip, c_out, _ = scaling(prediction_type, sigma[:, None, None, None])
    denoised = c_skip * (clean + sigma[:, None, None, None] * noise) + c_out * output
    torch.testing.assert_close(loss * c_out.flatten() ** 2, (denoised - clean).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_and_weights_are_finite_over_the_whole_schedule(prediction_type):
    sigma = ZERO_SNR.sigmas_T
    clean, noise = pictures(len(sigma))
    weight = min_snr_weight(sigma, prediction_type)
    assert weight.isfinite().all()
    assert (weight > 0).all()
    output = torch.zeros(len(sigma), 4, 5, 6, requires_grad=True)
    loss = denoising_loss(lambda x, level: output, clean, noise, sigma, prediction_type, weight)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert loss.isfinite().all()
    assert output.grad.isfinite().all()
    assert uniform_weight(sigma, prediction_type).tolist() == [1.0] * 1000


def test_loss_computes_in_the_precision_of_the_picture():
    clean, noise = pictures(2)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def predict(x, level):
        return x.bfloat16()

    loss = denoising_loss(predict, clean, noise, sigma, "v_prediction", torch.ones(2, dtype=torch.float64))
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
    assert Condition(one.context_BSE).expand(2).vector_BV is None


def test_classifier_free():
    uncond, cond = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert classifier_free(uncond, cond, 1).tolist() == [3, 2]
    assert classifier_free(uncond, cond, 0).tolist() == [1, 2]
    assert classifier_free(uncond, cond, 7.5).tolist() == [16, 2]
