"""The way back from a picture to its noise, in float64 with denoisers of which all is known."""

from itertools import pairwise

import pytest
import torch

from diffusion.inversion import invert
from diffusion.methods import euler

SPREADS = torch.tensor([0.3, 0.9, 1.6, 2.5], dtype=torch.float64)[:, None, None]


def linear(x, sigma):
    """The denoiser of normal data with a deviation of its own for each channel."""
    return x * SPREADS**2 / (SPREADS**2 + sigma**2)


def bent(x, sigma):
    """Of two points, -1 and 1, as far apart as all the data spread: the slope is not the same everywhere."""
    return torch.tanh(x / sigma**2)


def levels(steps, lowest=0.05, highest=12.0):
    ends = [torch.tensor(level, dtype=torch.float64).log() for level in (highest, lowest)]
    return torch.linspace(*ends, steps + 1, dtype=torch.float64).exp()


def missed(denoise, steps, rounds, sigmas=None):
    """How far inversion and then sampling end from the start, at most."""
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if denoise is bent:
        start = start.sign() + 0.05 * start
    sigmas = levels(steps) if sigmas is None else sigmas
    noise = invert(denoise, start, sigmas, rounds=rounds)
    *_, last = euler(denoise, noise, sigmas.tolist(), lambda: None)
    return (last.x_BCHW - start).abs().max().item()


@pytest.mark.parametrize("denoise", [linear, bent])
def test_it_returns_to_the_start_as_steps_grow(denoise):
    errors = [missed(denoise, steps, 1) for steps in (20, 40, 80, 160, 320)]
    assert all(after < 0.8 * before for before, after in pairwise(errors))
    assert errors[-1] < 0.05


@pytest.mark.parametrize("denoise", [linear, bent])
def test_rounds_make_it_exact(denoise):
    errors = [missed(denoise, 40, rounds) for rounds in (1, 3, 6, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.1 * errors[0]
    assert errors[-1] < 1e-9


def test_for_normal_data_the_first_guess_is_exact():
    def normal(x, sigma):
        return x / (1 + sigma**2)

    assert missed(normal, 10, 0) < 1e-12
    to_zero = torch.cat([levels(10), torch.zeros(1, dtype=torch.float64)])
    assert missed(normal, 10, 0, to_zero) < 1e-12


def test_it_begins_at_pure_noise_of_a_flow():
    sigmas = torch.tensor([2.0**53, 19.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    assert missed(linear, 4, 60, sigmas) < 1e-9
