"""AdamW, Muon, 8-bit AdamW, their state, and the learning rate."""

import gc
import itertools
import json
import math
import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.attention import GEGLU
from diffusion.errors import GazeError
from tests.train.tiny import (
    PROCESSES,
    UNET,
    free_port,
    make_pictures,
    make_vae,
    rows,
    run_here,
    run_one_step,
    tiny_recipe,
)
from train.config import Optimizer, Recipe
from train.muon import muon_flops, orthogonal
from train.optimizer import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
)

NAMES = ("adamw", "muon")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))


def train_steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        module(inputs.to(next(module.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def names_of(module: nn.Module) -> dict[torch.Tensor, str]:
    return {value: name for name, value in module.named_parameters()}


# The learning rate


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "rsqrt"])
@pytest.mark.parametrize("decay_from, final_share", [(0, 0.0), (300, 0.25)])
def test_the_learning_rate_is_its_closed_form(decay, decay_from, final_share):
    recipe = Optimizer(learning_rate=0.5, warmup=99, decay=decay, decay_from=decay_from, final_share=final_share)
    for pictures in (0, 1, 50, 98):
        assert learning_rate(recipe, pictures, 1099) == pytest.approx(0.5 * (pictures + 1) / 100, abs=1e-12)
    start = max(99, decay_from)
    for pictures in (99, 200, 300, 301, 700, 1098, 1099, 5000):
        done = min(max(pictures - start, 0) / (1099 - start), 1)
        expected = {
            "constant": 1.0,
            "linear": 1 - (1 - final_share) * done,
            "cosine": final_share + (1 - final_share) * math.cos(math.pi / 2 * done) ** 2,
            "rsqrt": 1 / math.sqrt(max(pictures / start, 1)),
        }[decay]
        assert learning_rate(recipe, pictures, 1099) == pytest.approx(0.5 * expected, abs=1e-12)


def test_a_warm_up_past_the_end_and_none_at_all():
    assert learning_rate(Optimizer(learning_rate=0.5, warmup=200), 150, 100) < 0.5
    constant = Optimizer(learning_rate=0.5, warmup=0, decay="constant")
    assert {learning_rate(constant, pictures, 100) for pictures in (0, 50, 100)} == {0.5}
    with pytest.raises(ValueError, match="rsqrt"):
        Optimizer(decay="rsqrt")


@pytest.mark.parametrize("accumulation, resumed", itertools.product((1, 4), (False, True)))
def test_the_rates_that_a_run_really_takes(tmp_path, monkeypatch, accumulation, resumed):

    taken = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        taken.append([group["lr"] / group["share"] for group in self.param_groups])
        return step(self, *arguments)

    options = {"learning_rate": 1e-3, "text_share": 0.5, "warmup": 20, "decay": "linear", "final_share": 0.1}
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures"), make_vae(tmp_path / "vae"),
                         pictures=64, gradient_accumulation_steps=accumulation, optimizer=options)  # fmt: skip
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    if resumed:
        run_one_step(recipe)
    run_here(recipe)
    taken = [rates for rates in taken if any(rates)]  # a resumed optimizer makes its state in a step of rate 0
    expected = [1e-3 * min((seen + 1) / 21, 1 - 0.9 * max(seen - 20, 0) / 44) for seen in range(0, 64, 8)]
    assert len(taken) == 8
    assert max(abs(rate - right) for rates, right in zip(taken, expected, strict=True) for rate in rates) < 1e-12
    assert rows(recipe.out)[-1]["learning_rate"] == taken[-1][0]


def rates_taken(values: dict, environment: dict[str, str]) -> None:
    """One of several processes that train together; writes the rates of each step of its optimizer. No wrapped module
    outlives the run: see `leave`."""
    os.environ.update(environment)
    recipe, step, taken = Recipe.model_validate(values), torch.optim.AdamW.step, []

    def watched(self, *arguments):
        taken.append([group["lr"] for group in self.param_groups])
        (recipe.out / f"rates-{os.environ['RANK']}.json").write_text(json.dumps(taken))
        return step(self, *arguments)

    end = Accelerator.end_training

    def checked(self):
        assert not any(isinstance(value, DistributedDataParallel) for value in gc.get_objects())
        end(self)

    torch.optim.AdamW.step, Accelerator.end_training = watched, checked
    run_here(recipe)


@pytest.mark.parametrize("processes, accumulation", [(2, 4), (4, 1)])
def test_the_rates_that_several_processes_take(tmp_path, processes, accumulation):
    """Half a cosine, down to 0; a resumed run and one process are above."""
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures"), pictures=64,
                         gradient_accumulation_steps=accumulation)  # fmt: skip
    together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    started = [
        PROCESSES.Process(
            target=rates_taken,
            args=(recipe.model_dump(mode="json"), together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * processes
    expected = [1e-3 * min((seen + 1) / 17, math.cos(math.pi / 2 * max(seen - 16, 0) / 48) ** 2)
                for seen in range(0, 64, 8)]  # fmt: skip
    for rank in range(processes):
        taken = json.loads((recipe.out / f"rates-{rank}.json").read_text())
        assert len(taken) == 8
        assert max(abs(rate - right) for rates, right in zip(taken, expected, strict=True) for rate in rates) < 1e-12


def test_each_group_gets_its_share():
    module = nn.ModuleDict({"text_model": nn.Linear(2, 2), "unet": nn.Linear(2, 2)})
    optimizer = make_optimizer(module, Optimizer(text_share=0.25))
    set_learning_rate(optimizer, 2.0)
    names = names_of(module)
    rates = {names[value]: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert rates == {"text_model.weight": 0.5, "text_model.bias": 0.5, "unet.weight": 2.0, "unet.bias": 2.0}


# AdamW


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_acts_on_matrices_and_kernels_only(name):
    module = small()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    optimizer = make_optimizer(module, Optimizer(name=name, learning_rate=0.1, weight_decay=0.5))
    for value in module.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in module.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if value.ndim > 1 else before[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_are_left_alone(name):
    module = small()
    module[0].requires_grad_(False)
    groups = make_optimizer(module, Optimizer(name=name)).param_groups
    assert sum(len(group["params"]) for group in groups) == 4


def test_adamw_has_the_recipes_betas():
    assert make_optimizer(small(), Optimizer(betas=(0.5, 0.6))).param_groups[0]["betas"] == (0.5, 0.6)
    assert make_optimizer(small(), Optimizer(name="muon", betas=(0.5, 0.6))).param_groups[0]["betas"] == (0.5, 0.6)


# Muon


class Network(nn.Module):
    """A linear layer, a convolution and a gated projection inside, and the ends that AdamW trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.tall = nn.Linear(8, 24)
        self.wide = nn.Linear(24, 8, bias=False)
        self.gated = GEGLU(8, 12)
        self.conv_out = nn.Conv2d(12, 3, 1)

    def forward(self, x_BCHW):
        x_BHWC = self.conv(self.conv_in(x_BCHW)).movedim(1, -1)
        return self.conv_out(self.gated(self.wide(self.tall(x_BHWC))).movedim(-1, 1))


def same_as_torchs_muon(network: Network, recipe: Optimizer, steps: int) -> None:
    """torch.optim.Muon on each matrix by itself, the gated projection cut in two, and torch.optim.AdamW on the rest."""
    optimizer = make_optimizer(network, recipe)
    parts = {name: list(getattr(network, name).weight.detach().clone().flatten(1).chunk(chunks))
             for name, chunks in (("conv", 1), ("tall", 1), ("wide", 1))}  # fmt: skip
    parts["gated.proj"] = list(network.gated.proj.weight.detach().clone().chunk(2))
    parts = {name: [nn.Parameter(part.clone()) for part in values] for name, values in parts.items()}
    rest = {name: nn.Parameter(value.detach().clone()) for name, value in network.named_parameters()
            if name.removesuffix(".weight") not in parts}  # fmt: skip
    decays = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    muon = torch.optim.Muon([part for values in parts.values() for part in values], momentum=recipe.momentum,
                            adjust_lr_fn="match_rms_adamw",
                            **decays | {"lr": recipe.learning_rate * recipe.muon_share})  # fmt: skip
    adamw = [torch.optim.AdamW([value], betas=recipe.betas, **decays | ({} if value.ndim > 1 else {"weight_decay": 0}))
             for value in rest.values()]  # fmt: skip
    set_learning_rate(optimizer, recipe.learning_rate)
    for step in range(steps):
        network(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for name, values in parts.items():
            gradient = network.get_parameter(f"{name}.weight").grad.flatten(1).chunk(len(values))
            for part, its in zip(values, gradient, strict=True):
                part.grad = its.clone()
        for name, value in rest.items():
            value.grad = network.get_parameter(name).grad.clone()
        for one in (optimizer, muon, *adamw):
            one.step()
        optimizer.zero_grad()
    for name, values in parts.items():
        weight = network.get_parameter(f"{name}.weight")
        torch.testing.assert_close(weight.detach(), torch.cat([*values]).detach().view_as(weight), rtol=1e-5, atol=1e-6)
    for name, value in rest.items():
        torch.testing.assert_close(network.get_parameter(name).detach(), value.detach(), rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_on_each_matrix_and_adamw_on_the_rest():
    same_as_torchs_muon(Network(), Optimizer(name="muon", learning_rate=0.01, weight_decay=0.1), steps=3)


def test_muon_has_its_momentum_and_its_share_of_the_rate():
    recipe = Optimizer(name="muon", learning_rate=0.01, momentum=0.5, muon_share=3.0)
    same_as_torchs_muon(Network(), recipe, steps=3)


def test_muons_step_has_about_equal_singular_values():
    matrix = torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one in (matrix, matrix.T, 1e-3 * matrix):
        values = torch.linalg.svdvals(orthogonal(one).double())
        assert 0.6 < values.min() <= values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (orthogonal(matrix).double() * (left @ right)).sum() / 20
    assert cosine == pytest.approx(0.9, abs=0.15)
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_muon_trains_what_maps_states_to_states():
    from diffusion.clip import CLIPText, CLIPTextConfig
    from diffusion.unet import UNet, UNetConfig

    text = CLIPText(CLIPTextConfig(30, 16, 32, 1, 2, 8))
    module = nn.ModuleDict(
        {"unet": UNet(UNetConfig.from_diffusers(UNET | {"cross_attention_dim": 16})), "text_model": text}
    )
    names = names_of(module)
    groups = parameter_groups(module, Optimizer(name="muon"))
    kinds = {names[value]: group["matrices"] for group in groups for value in group["params"]}
    adamw = {name for name, matrices in kinds.items() if not matrices and module.get_parameter(name).ndim > 1}
    assert adamw == {
        "unet.conv_in.weight", "unet.conv_out.weight", "unet.time_embedding.linear_1.weight",
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
    }  # fmt: skip
    twofold = {name for name, matrices in kinds.items() if matrices == 2}
    assert twofold == {name for name in kinds if name.endswith("ff.net.0.proj.weight")} != set()
    assert kinds["unet.down_blocks.0.resnets.0.conv1.weight"] == 1
    assert not any(matrices for name, matrices in kinds.items() if module.get_parameter(name).ndim == 1)


def test_muons_own_arithmetic_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    network = Network()
    optimizer = make_optimizer(network, Optimizer(name="muon"))
    network(torch.zeros(1, 3, 4, 4)).sum().backward()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert sum(map(muon_flops, optimizer.param_groups)) == counter.get_total_flops() > 0


# State


def straight_and_resumed(make, steps, recipe: Optimizer) -> None:
    straight, resumed = make(), make()
    optimizer = make_optimizer(straight, recipe)
    steps(straight, optimizer, 0, 3)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, names_of(straight)).items()}
    assert all(type(value) is torch.Tensor for value in saved.values())
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    steps(straight, optimizer, 3, 6)
    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, recipe)
    load_optimizer_tensors(optimizer, names_of(resumed), saved)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in weights.items())
    again = optimizer_tensors(optimizer, names_of(resumed))
    assert again.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in again.items())
    set_learning_rate(optimizer, recipe.learning_rate)
    steps(resumed, optimizer, 3, 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_state_goes_to_a_file_and_back_exactly(name):
    straight_and_resumed(small, train_steps, Optimizer(name=name, learning_rate=0.01, weight_decay=0.1))


def test_a_weight_that_never_had_a_gradient_has_no_state():
    module = small()
    optimizer = make_optimizer(module, Optimizer())
    module[0].weight.grad = torch.ones_like(module[0].weight)
    optimizer.step()
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, names_of(module)).items()}
    assert saved.keys() == {f"0.weight:{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    other = small()
    optimizer = make_optimizer(other, Optimizer())
    load_optimizer_tensors(optimizer, names_of(other), saved)
    assert optimizer_tensors(optimizer, names_of(other)).keys() == saved.keys()


def test_the_state_of_another_optimizer_is_refused():
    module = small()
    optimizer = make_optimizer(module, Optimizer(name="muon"))
    train_steps(module, optimizer, 0, 1)
    with pytest.raises(GazeError, match=r"does not fit: 0\.weight"):
        load_optimizer_tensors(
            make_optimizer(module, Optimizer()), names_of(module), optimizer_tensors(optimizer, names_of(module))
        )


# 8 bits


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(GazeError, match="needs torchao") as error:
        make_optimizer(small(), Optimizer(name="adamw_8bit"))
    assert error.value.hint == "pip install 'gaze-diffusion[eightbit]'"


@pytest.mark.filterwarnings("ignore")
def test_eight_bits_follow_adamw_and_come_back_exactly():
    pytest.importorskip("torchao")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(64, 64)

    def steps(module, optimizer, first, last):
        for step in range(first, last):
            inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            (module(inputs) - inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    recipe = Optimizer(name="adamw_8bit", learning_rate=0.01)
    straight_and_resumed(make, steps, recipe)
    one, other = make(), make()
    optimizer = make_optimizer(one, recipe)
    steps(one, optimizer, 0, 10)
    steps(other, make_optimizer(other, Optimizer(learning_rate=0.01)), 0, 10)
    moved = (other.weight - make().weight).norm()
    assert 0 < (one.weight - other.weight).norm() < 0.05 * moved
    stored = optimizer_tensors(optimizer, names_of(one))
    assert stored["weight:exp_avg.codes"].dtype == torch.uint8
    before = one.weight.detach().clone()
    set_learning_rate(optimizer, 0.0)
    steps(one, optimizer, 10, 11)
    assert torch.equal(one.weight, before), "the rate is read anew at each step"
