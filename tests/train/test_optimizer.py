"""AdamW, the learning rate, and the average of the weights."""

import contextlib
import math

import pytest
import torch
from torch import nn

from train.config import Optimizer
from train.ema import EMA
from train.optimizer import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))


def train_steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        module(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_learning_rate_is_its_closed_form():
    cosine = Optimizer(learning_rate=0.5, warmup=99, decay="cosine")
    for pictures in (0, 1, 50, 98):
        assert learning_rate(cosine, pictures, 1099) == pytest.approx(0.5 * (pictures + 1) / 100, abs=1e-12)
    for share in (0.0, 0.25, 0.5, 0.9, 1.0):
        expected = 0.5 * math.cos(math.pi / 2 * share) ** 2
        assert learning_rate(cosine, 99 + round(1000 * share), 1099) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(cosine, 5000, 1099) == pytest.approx(0, abs=1e-12)
    constant = Optimizer(learning_rate=0.5, warmup=0, decay="constant")
    assert {learning_rate(constant, pictures, 100) for pictures in (0, 50, 100)} == {0.5}
    assert learning_rate(Optimizer(learning_rate=0.5, warmup=200), 150, 100) < 0.5, "a warm-up past the end"


def test_weight_decay_acts_on_matrices_and_kernels_only():
    module = small()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = make_optimizer(module, Optimizer(learning_rate=0.1, weight_decay=0.5))
    for value in module.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in module.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if value.ndim > 1 else before[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)


def test_frozen_weights_are_left_alone():
    module = small()
    module[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in make_optimizer(module, Optimizer()).param_groups) == 4
    assert set(EMA(module, 10).average) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_the_state_goes_to_a_file_and_back_exactly():
    straight, resumed = small(), small()
    optimizer = make_optimizer(straight, Optimizer(learning_rate=0.01))
    train_steps(straight, optimizer, 0, 3)
    tensors = optimizer_tensors(optimizer, {value: name for name, value in straight.named_parameters()})
    saved = {name: value.clone() for name, value in tensors.items()}
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    assert set(saved) == {f"{name}:{key}" for name, _ in straight.named_parameters()
                          for key in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    train_steps(straight, optimizer, 3, 6)

    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, Optimizer(learning_rate=0.01))
    load_optimizer_tensors(optimizer, {value: name for name, value in resumed.named_parameters()}, saved)
    train_steps(resumed, optimizer, 3, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_the_average_has_its_half_life():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = EMA(module, half_life=100)
    nn.init.zeros_(module.weight)
    for step in range(30):
        ema.update(pictures=10_000 + 10 * step, batch_size=10)
    assert float(ema.average["weight"]) == pytest.approx(0.5**3, rel=1e-5)


def test_early_on_the_half_life_is_a_share_of_the_pictures_seen():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = EMA(module, half_life=10_000)
    nn.init.zeros_(module.weight)
    expected = 1.0
    for pictures in range(10, 210, 10):
        ema.update(pictures, batch_size=10)
        expected *= 0.5 ** (10 / (0.05 * pictures))
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-4)


def test_without_half_life_the_average_is_the_weights():
    module = small()
    ema = EMA(module, half_life=0)
    train_steps(module, make_optimizer(module, Optimizer(learning_rate=0.1)), 0, 2)
    ema.update(10, 5)
    assert all(torch.equal(ema.average[name], value) for name, value in module.named_parameters())


def test_swapping_is_exact_both_ways():
    module = small()
    ema = EMA(module, half_life=100)
    train_steps(module, make_optimizer(module, Optimizer(learning_rate=0.1)), 0, 2)
    ema.update(1000, 5)
    own = {name: value.detach().clone() for name, value in module.named_parameters()}
    averages = {name: value.clone() for name, value in ema.average.items()}
    with contextlib.suppress(KeyError), ema.swapped():
        assert all(torch.equal(value, averages[name]) for name, value in module.named_parameters())
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in module.named_parameters())
    assert all(torch.equal(ema.average[name], value) for name, value in averages.items())

    other = EMA(small(), half_life=100)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.average[name], value) for name, value in averages.items())
