"""Each deterministic sampler converges with its order to where the probability flow of a Gaussian mixture ends."""

import math

import pytest
import torch

from benchmarks.convergence import METHODS, PARTS, STARTS_B, STEPS, denoise, errors, plot, table


@pytest.mark.parametrize("sigma", [0.05, 1.0, 10.0])
def test_the_denoiser_is_x_plus_variance_times_score(sigma):
    # Tweedie's formula, the score by automatic differentiation of the log density.
    x_B = STARTS_B.clone().requires_grad_()
    weight_M, mean_M, variance_M = PARTS.unbind(1)
    normal = torch.distributions.Normal(mean_M, (variance_M + sigma**2).sqrt())
    log_density_B = (normal.log_prob(x_B[:, None]) + weight_M.log()).logsumexp(1)
    (score_B,) = torch.autograd.grad(log_density_B.sum(), x_B)
    torch.testing.assert_close(denoise(STARTS_B, sigma), STARTS_B + sigma**2 * score_B)


@pytest.mark.parametrize("name", METHODS)
def test_order_of_convergence(name):
    coarse, middle, fine = errors(METHODS[name], (20, 80, 320))
    order = METHODS[name].sampler.order
    assert coarse > middle > fine
    # UniPC corrects with one more point than it predicts with: it is better than its order until the steps are tiny.
    assert order - 0.1 < math.log2(middle / fine) / 2 < order + (0.6 if name == "unipc" else 0.1)


def test_table_and_plot_have_every_method():
    results = {name: [1 / steps for steps in STEPS] for name in METHODS}
    assert table(results).count("| 1.00 |") == len(METHODS)
    drawn = plot(results)
    assert drawn.count("<polyline") == len(METHODS)
    assert "nan" not in drawn
