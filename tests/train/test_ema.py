"""The exponential average of the weights."""

import contextlib

import pytest
import torch
from torch import nn

from tests.train.test_optimizer import small, train_steps
from train.config import Optimizer
from train.ema import EMA
from train.optimizer import make_optimizer


def averaged(half_life: int = 100) -> tuple[nn.Module, EMA]:
    """A network that has moved away from its average."""
    module = small()
    ema = EMA(module, half_life)
    train_steps(module, make_optimizer(module, Optimizer(learning_rate=0.1)), 0, 2)
    ema.update(1000, 5)
    return module, ema


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
    module, ema = averaged(half_life=0)
    assert all(torch.equal(ema.average[name], value) for name, value in module.named_parameters())
    assert ema.distance() == 0


def test_frozen_weights_are_not_averaged():
    module = small()
    module[0].requires_grad_(False)
    ema = EMA(module, 10)
    assert set(ema.average) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    before = module[0].weight.clone()
    with ema.swapped():
        assert torch.equal(module[0].weight, before)


def test_swapping_is_exact_both_ways_and_keeps_the_memory():
    module, ema = averaged()
    own = {name: value.detach().clone() for name, value in module.named_parameters()}
    places = [value.data_ptr() for value in (*module.parameters(), *ema.average.values())]
    averages = {name: value.clone() for name, value in ema.average.items()}
    with contextlib.suppress(KeyError), ema.swapped():
        assert all(torch.equal(value, averages[name]) for name, value in module.named_parameters())
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in module.named_parameters())
    assert all(torch.equal(ema.average[name], value) for name, value in averages.items())
    assert [value.data_ptr() for value in (*module.parameters(), *ema.average.values())] == places

    other = EMA(small(), half_life=100)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.average[name], value) for name, value in averages.items())


def test_the_distance_is_relative_to_the_weights():
    module, ema = averaged()
    weights, averages = (torch.cat([value.detach().double().flatten() for value in values])
                         for values in (ema.parameters.values(), ema.average.values()))  # fmt: skip
    assert ema.distance() == pytest.approx(float((weights - averages).norm() / weights.norm()), rel=1e-6)
    for value in module.parameters():
        nn.init.zeros_(value)
    assert 0 < ema.distance() < float("inf")


# Parameters in parts on two processes


def in_parts(rank: int, port: int, folder: str) -> None:
    """What one of two processes does with FSDP2; it writes what it found whole."""
    import os

    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from train.optimizer import load_optimizer_tensors, optimizer_tensors
    from train.sharding import whole

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module = small().double()  # for Muon rounds to bf16, which makes any difference before it large
    fully_shard(module)
    assert all(isinstance(value, DTensor) for value in module.parameters())
    found = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        optimizer = make_optimizer(module, Optimizer(name=name, learning_rate=0.01))
        names = {value: key for key, value in module.named_parameters()}
        ema = EMA(module, 100)
        train_steps(module, optimizer, 0, 3)
        ema.update(1000, 5)
        found[f"{name}:distance"] = torch.tensor(ema.distance(), dtype=torch.float64)
        with ema.swapped():
            found |= {f"{name}:ema:{key}": whole(value.detach()) for key, value in module.named_parameters()}
        found |= {f"{name}:own:{key}": whole(value.detach()) for key, value in module.named_parameters()}
        saved = {key: whole(value).clone() for key, value in optimizer_tensors(optimizer, names).items()}
        other = make_optimizer(module, Optimizer(name=name))
        load_optimizer_tensors(other, names, saved)
        again = optimizer_tensors(other, names)
        assert all(torch.equal(whole(value), saved[key]) for key, value in again.items())
        averages = {key: whole(value).clone() for key, value in ema.state_dict().items()}
        ema.update(2000, 50)
        ema.load_state_dict(averages)
        assert all(torch.equal(whole(value), averages[key]) for key, value in ema.average.items())
    if rank == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, f"{folder}/found.safetensors")
    dist.destroy_process_group()


def test_in_parts_on_two_processes_all_is_as_on_one(tmp_path):
    from safetensors.torch import load_file

    from tests.train.tiny import PROCESSES, free_port

    port = free_port()
    processes = [PROCESSES.Process(target=in_parts, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = load_file(tmp_path / "found.safetensors")
    module = small().double()
    for name in ("adamw", "muon"):
        ema = EMA(module, 100)
        train_steps(module, make_optimizer(module, Optimizer(name=name, learning_rate=0.01)), 0, 3)
        ema.update(1000, 5)
        close = {"rtol": 1e-9, "atol": 1e-9}
        for key, value in module.named_parameters():
            torch.testing.assert_close(found[f"{name}:own:{key}"], value.detach(), **close)
            torch.testing.assert_close(found[f"{name}:ema:{key}"], ema.average[key], **close)
        assert float(found[f"{name}:distance"]) == pytest.approx(ema.distance(), rel=1e-9)
