"""Each deterministic scheduler converges with its order to where the probability flow of a Gaussian mixture ends."""

import pytest
import torch

from benchmarks.convergence import COARSE, FINE, METHODS, PARTS, STARTS_P, STEPS, denoise, errors, order, plot, table
from diffusion import schedulers


@pytest.mark.parametrize("sigma", [0.05, 1.0, 10.0])
def test_the_denoiser_is_x_plus_variance_times_score(sigma):
    # Tweedie's formula, the score by automatic differentiation of the log density.
    x_P = STARTS_P.clone().requires_grad_()
    weight_M, mean_M, variance_M = PARTS.unbind(1)
    normal = torch.distributions.Normal(mean_M, (variance_M + sigma**2).sqrt())
    log_density_P = (normal.log_prob(x_P[:, None]) + weight_M.log()).logsumexp(1)
    (score_P,) = torch.autograd.grad(log_density_P.sum(), x_P)
    torch.testing.assert_close(denoise(STARTS_P, sigma), STARTS_P + sigma**2 * score_P)


@pytest.mark.parametrize("name", METHODS)
def test_order_of_convergence(name):
    coarse, fine = errors(METHODS[name], (COARSE, FINE))
    assert order(coarse, fine) == pytest.approx(METHODS[name].method.order, abs=0.4)


def test_every_deterministic_name_is_measured():
    measured = {case.scheduler for case in METHODS.values()}
    assert {row["name"] for row in schedulers.table() if not row["stochastic"]} == measured - {"dpmpp_3m_sde:eta=0"}


def test_table_and_plot_have_every_method():
    results = {name: [(i + 1) / steps for steps in STEPS] for i, name in enumerate(METHODS)}
    assert table(results).count("| 1.0 |") == len(METHODS)
    drawn = plot(results)
    assert all(drawn.count(f">{case.scheduler}</text>") in (1, 2) for case in METHODS.values())
    assert drawn.count("</text>") == len(METHODS) + 2 * (1 + 8 + 7 + 1)  # titles, powers of ten, calls, axes
    assert "nan" not in drawn
