"""Churn, the fresh noise of euler and heun: against k-diffusion's formula and diffusers' step."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch

from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.schedulers import prepare
from tests.parity.network import LATENT

CHURNS = [
    {"s_churn": 4.0},
    {"s_churn": 1000.0, "s_noise": 1.007},
    {"s_churn": 4.0, "s_tmin": 0.5, "s_tmax": 3.0},
    {"s_churn": 0.0},
]
LEVELS = NoiseSchedule.from_config({**LATENT, "timestep_spacing": "trailing"})


def unit_noise(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 3, 5, 4, generator=generator).to(dtype)


def written(name, options):
    return f"{name}:{','.join(f'{key}={value}' for key, value in options.items())}"


def network(x, sigma):
    return torch.tanh(1.5 * x / math.hypot(1, sigma) + math.sin(sigma))


def k_diffusion(name, x, sigmas, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """sample_euler and sample_heun: slopes of x over sigma."""
    for sigma, lower in pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0
        hat = sigma * (gamma + 1)
        if gamma > 0:
            x = x + noise() * s_noise * math.sqrt(hat**2 - sigma**2)
        slope = (x - network(x, hat)) / hat
        ahead = x + slope * (lower - hat)
        if name == "heun" and lower > 0:
            slope = (slope + (ahead - network(ahead, lower)) / lower) / 2
        x = x + slope * (lower - hat)
    return x


@pytest.mark.parametrize("options", CHURNS)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_k_diffusions_formula(name, options):
    trajectory = prepare(written(name, options), LEVELS, 10)
    start = unit_noise()() * trajectory.start
    *_, last = trajectory.run(network, start, noise=unit_noise(1))
    expected = k_diffusion(name, start, trajectory.sigmas.tolist(), unit_noise(1), **options)
    assert (last.x_BCHW - expected).abs().max() < 1e-9


@pytest.mark.parametrize("options", CHURNS)
def test_diffusers_step(options):
    """For a network that always says the same noise: diffusers asks it before it adds noise, at the lower level, where
    another network says something else."""
    said = unit_noise(2)()
    scheduler = diffusers.EulerDiscreteScheduler.from_config(LEVELS.config)
    scheduler.set_timesteps(10)
    theirs, generator = unit_noise()() * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(theirs, timestep)
        # Their noise has the dtype of the output, and our generator draws float32.
        theirs = scheduler.step(said.float(), timestep, theirs, generator=generator, **options).prev_sample.double()
    trajectory = prepare(written("euler", options), LEVELS, 10)
    start = unit_noise()() * trajectory.start
    *_, last = trajectory.run(lambda x, sigma: x - sigma * said, start, noise=unit_noise(1))
    assert (last.x_BCHW - theirs).abs().max() < 3e-5


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_no_churn_is_bit_equal_and_draws_nothing(name):
    def never():
        raise AssertionError

    ends = []
    for asked in (name, f"{name}:s_churn=0", f"{name}:s_churn=9,s_tmin=20", f"{name}:s_churn=9,s_tmax=0"):
        trajectory = prepare(asked, LEVELS, 8)
        *_, last = trajectory.run(network, unit_noise(dtype=torch.float32)() * trajectory.start, noise=never)
        ends.append(last.x_BCHW)
    x, sigmas = unit_noise(dtype=torch.float32)() * trajectory.start, trajectory.sigmas.tolist()
    for sigma, lower in pairwise(sigmas):
        clean = network(x, sigma)
        x = torch.lerp(clean, x, lower / sigma)
        if name == "heun" and lower > 0:
            x = x + (sigma / lower - 1) / 2 * (network(x, lower) - clean)
    assert all(torch.equal(end, x) for end in ends)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50, 100])
def test_calls_are_those_without_churn(steps):
    for name, calls in (("euler", steps), ("heun", 2 * steps - 1)):
        seen = []
        trajectory = prepare(f"{name}:s_churn=40", LEVELS, steps)

        def denoise(x, sigma, seen=seen):
            seen.append(sigma)
            return network(x, sigma)

        *_, last = trajectory.run(denoise, unit_noise()() * trajectory.start, noise=unit_noise(1))
        assert len(seen) == calls
        assert last.x_BCHW.isfinite().all()


def test_noise_keeps_the_distribution():
    trajectory = prepare("heun:s_churn=30", LEVELS, 100)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20000, generator=generator)

    start = noise() * math.hypot(1, trajectory.sigmas[0])
    *_, end = trajectory.run(lambda x, sigma: x / (1 + sigma**2), start, noise=noise)
    assert end.x_BCHW.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("euler:s_churn=-1", "s_churn from 0"),
        ("heun:s_noise=3", "s_noise from 0 to 2"),
        ("euler:s_tmin=NaN", "s_tmin from 0"),
        ("euler:s_churn=much", "s_churn is 'much'"),
        ("dpmpp_2m:s_churn=1", "no option 's_churn'"),
    ],
)
def test_values_that_cannot_be_are_refused(asked, says):
    with pytest.raises(GazeError, match=says):
        prepare(asked, LEVELS, 4)
