"""Held-out losses and grids: a function of the weights alone, shared by any number of processes, harmless."""

import base64
import io
import json
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipelines.images import to_pil
from tests.train.tiny import tiny_recipe
from train.ema import EMA
from train.metrics import Metrics
from train.processes import Processes
from train.randomness import randomness
from train.validation import evaluating, held_out_losses, shared, validate


class Sample(NamedTuple):
    position: int


HELD_OUT = [Sample(position) for position in range(7)]


class Small:
    """A phase whose losses are known, and that does all it should not: it draws from the global generator, asks
    whether it is in training mode and would keep gradients."""

    shown = 3

    def __init__(self):
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        nn.init.constant_(self.module[0].weight, 2.0)
        self.module[1].eval()  # as a frozen part is
        self.calls = 0

    def loss(self, module, samples, u_B=None):
        assert not any(part.training for part in self.module.modules())
        assert not torch.is_grad_enabled()
        self.calls += 1
        noise = [randomness(0, sample.position, "noise").standard_normal() for sample in samples]
        return module[0].weight[0, 0] * (u_B + torch.tensor(noise)).square()

    def observe(self, samples, u_B):
        return self.loss(self.module, samples, u_B), {"position": float(samples[0].position)}

    def levels(self, u_B):
        return (10 * u_B).tolist()

    def figures(self):
        torch.rand(5)
        return {"psnr": float(self.module[0].weight.mean())}

    def pictures(self, numbers):
        self.calls += 1
        return torch.stack([torch.full((3, 4, 4), number / 4) for number in numbers])


@pytest.fixture
def recipe(tmp_path):
    return lambda **changes: tiny_recipe(
        tmp_path, tmp_path, tmp_path, validation={"every": 8, "bins": 4, **changes}, data={"held_out": 0.1}
    )


def alone(recipe, phase=None, held_out=HELD_OUT):
    phase = phase or Small()
    with evaluating(phase.module):
        return held_out_losses(recipe, phase, held_out, Processes(), lambda: False)


class Together:
    """Processes as threads, with the methods of `Processes`."""

    def __init__(self, count):
        self.count, self.barrier, self.values = count, threading.Barrier(count, timeout=20), [None] * count

    def run(self, work):
        """work(processes) in each; the results by rank."""
        results = [None] * self.count

        def one(rank):
            with torch.no_grad():
                results[rank] = work(Member(self, rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


class Member:
    def __init__(self, together, rank):
        self.together, self.rank, self.count, self.first = together, rank, together.count, rank == 0
        self.device = torch.device("cpu")

    def gather(self, value):
        self.together.values[self.rank] = json.dumps(value)
        self.together.barrier.wait()
        found = [json.loads(text) for text in self.together.values]
        self.together.barrier.wait()
        return found

    def any(self, flag):
        return any(self.gather(flag))


# The held-out loss


def test_each_bin_has_the_mean_over_the_pictures_at_its_middle_quantile(recipe):
    found = alone(recipe())
    noise = np.array([randomness(0, position, "noise").standard_normal() for position in range(7)])
    for number in range(4):
        expected = 2 * np.square((number + 0.5) / 4 + noise).mean()
        assert found[f"held_out_loss/sigma_{10 * (number + 0.5) / 4:g}"] == pytest.approx(expected, rel=1e-6)
    assert found["held_out_loss"] == pytest.approx(np.mean([*found.values()][1:5]))
    assert found == alone(recipe())
    assert found["position"] == 3
    assert len(found) == 6


def test_bins_and_pictures_are_what_the_recipe_says(recipe):
    assert len(alone(recipe(bins=2))) == 4
    phase = Small()
    few = alone(recipe(pictures=3), phase)
    assert phase.calls == 3
    assert few == alone(recipe(), held_out=HELD_OUT[:3]) != alone(recipe())
    text = recipe().model_copy(update={"phase": "text"})
    phase.levels = lambda u_B: []
    assert alone(text, phase).keys() == {"held_out_loss", "position"}


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_processes_finds_the_same_bits_with_equally_many_calls(recipe, count):
    phases = [Small() for _ in range(count)]
    for phase in phases:
        phase.module.eval()
    found = Together(count).run(
        lambda processes: held_out_losses(recipe(), phases[processes.rank], HELD_OUT, processes, lambda: False)
    )
    assert found == [alone(recipe())] * count
    assert {phase.calls for phase in phases} == {-(-7 // count)}


# Leaving early


@pytest.mark.parametrize("count", [1, 2])
def test_it_is_left_between_pictures_when_the_run_stops(count):
    computed = []

    def work(processes):
        rounds = iter([False, False, True])
        return shared(100, lambda number: computed.append(number), processes, lambda: next(rounds))

    assert Together(count).run(work) == [None] * count
    assert sorted(computed) == list(range(2 * count))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_too_little_memory_on_one_process_is_a_warning_on_all(error):
    def compute(number):
        if number == 3:
            raise error
        return number

    with pytest.warns(UserWarning, match="does not fit into memory and is left out"):
        assert Together(2).run(lambda processes: shared(6, compute, processes, lambda: False)) == [None, None]


def test_another_error_is_one():
    def broken(number):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        shared(1, broken, Processes(), lambda: False)


# The whole


def run(recipe, phase, processes=Processes(), stopping=lambda: False, held_out=HELD_OUT):  # noqa: B008
    ema = EMA(phase.module, 10)
    for average in ema.average.values():
        average.mul_(3)
    with Metrics(recipe.out / "metrics.jsonl", 0, 80, processes.first) as metrics:
        validate(recipe, phase, held_out, ema, processes, metrics, 16, stopping)
    return ema


def read(out: Path):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_losses_figures_and_grid_are_of_the_averaged_weights(recipe):
    run(recipe(), Small())
    (first,) = read(recipe().out)
    assert first["held_out_loss"] == pytest.approx(3 * alone(recipe())["held_out_loss"])
    assert first["psnr"] == 6
    assert first["pictures"] == 16
    with Image.open(recipe().out / "samples" / "000000000016.png") as sheet:
        for number in range(3):
            assert sheet.getpixel((6 + 10 * number, 6)) == to_pil(Small().pictures([number]))[0].getpixel((0, 0))


def test_nothing_that_training_rests_on_is_touched(recipe):
    phase = Small()
    phase.module[0].weight.grad = torch.ones(2, 2)
    phase.module.train()
    phase.module[1].eval()
    before = {name: value.clone() for name, value in phase.module.state_dict().items()}
    state = torch.get_rng_state()
    run(recipe(), phase)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in phase.module.state_dict().items())
    assert torch.equal(phase.module[0].weight.grad, torch.ones(2, 2))
    assert [part.training for part in phase.module.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


def test_a_stop_leaves_no_half_of_anything(recipe):
    for rounds in (0, 5, 9):  # the losses are there after 7, the phase's figures after 8, the grid after 11
        asked = iter([False] * rounds)
        run(recipe(), Small(), stopping=lambda: next(asked, True))  # noqa: B023
        assert read(recipe().out) == []
        assert not (recipe().out / "samples").exists()


def test_without_held_out_pictures_there_is_the_grid_alone(recipe):
    phase = Small()
    phase.figures = dict
    run(recipe(), phase, held_out=[])
    assert read(recipe().out) == []
    assert (recipe().out / "samples" / "000000000016.png").is_file()


def test_a_grid_that_cannot_be_written_is_a_warning(recipe):
    (recipe().out / "samples").write_text("no folder")
    with pytest.warns(UserWarning, match="the run goes on"):
        run(recipe(), Small())


def test_pictures_come_back_in_order_from_all_processes():
    def packed(number):
        file = io.BytesIO()
        to_pil(Small().pictures([number]))[0].save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode()

    found = Together(2).run(lambda processes: shared(5, packed, processes, lambda: False))
    assert found[0] == found[1] == [packed(number) for number in range(5)]
