"""Power-function averages, their snapshots, and the averages that are made of them afterwards."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from diffusion.errors import GazeError
from tests.train.tiny import make_pictures, make_vae, newest_files, run_here, run_one_step, tiny_recipe, weights
from train import __main__ as command
from train.run import export
from train.snapshots import PowerAverages, Profile, exponent, fit, product, reconstruct

BATCH, STEPS, EVERY = 10, 640, 40
WIDTHS = (0.05, 0.1)


def profile(one: Profile):
    return lambda tau: (one.gamma + 1) / one.time ** (one.gamma + 1) * tau**one.gamma


# The mathematics, against integrals


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_width_is_the_deviation_of_its_weighting(width):
    weighting = profile(Profile(1.0, exponent(width)))
    mass, mean, square = (quad(lambda t, n=n: weighting(t) * t**n, 0, 1, epsabs=1e-13, limit=200)[0] for n in range(3))
    assert mass == pytest.approx(1, abs=1e-10)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize(
    "one, other", [((3.0, 5.0), (3.0, 5.0)), ((1.0, 16.97), (4.0, 6.94)), ((4.0, 2.0), (1.0, 90.0))]
)
def test_products_are_their_integrals(one, other):
    one, other = Profile(*one), Profile(*other)
    end = min(one.time, other.time)
    integral = quad(lambda t: profile(one)(t) * profile(other)(t), 0, end, epsabs=1e-14, limit=200)[0]
    assert product(one, other) == product(other, one) == pytest.approx(integral, rel=1e-9)


def test_what_is_stored_is_expressed_by_itself_and_the_misfit_is_its_integral():
    stored = [Profile(time, exponent(width)) for time in (1.0, 2.0, 3.0) for width in WIDTHS]
    coefficients, misfit = fit(stored, stored[-1])
    assert misfit < 1e-6
    assert coefficients == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-5)
    wanted = Profile(3.0, exponent(0.15))
    coefficients, misfit = fit(stored, wanted)

    def apart(t: float) -> float:
        terms = (c * profile(one)(t) for c, one in zip(coefficients, stored, strict=True) if t <= one.time)
        return (sum(terms) - profile(wanted)(t)) ** 2

    integral = quad(apart, 0, 3, points=(1, 2), limit=400)[0] / product(wanted, wanted)
    assert misfit == pytest.approx(math.sqrt(integral), rel=1e-4)


# The averages, against a recorded trajectory


class Walk:
    """A random walk of 50 weights in float64, its power averages, and a snapshot of these every EVERY steps."""

    def __init__(self, folder):
        generator = torch.Generator().manual_seed(0)
        module = nn.Linear(10, 5, bias=False).double()
        self.folder, self.averages = folder, PowerAverages(module, WIDTHS)
        path = []
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                module.weight += 0.1 * torch.randn(5, 10, generator=generator, dtype=torch.float64) + 0.01
            path.append(module.weight.detach().clone())
            self.averages.update(BATCH * step, BATCH)
            if step % EVERY == 0:
                self.averages.store(folder, BATCH * step, "one")
        self.path = torch.stack(path)

    def by_hand(self, width: float) -> torch.Tensor:
        """Every recorded weight times the integral of the weighting over its step."""
        edges = (np.arange(STEPS + 1) / STEPS) ** (exponent(width) + 1)
        return (torch.from_numpy(np.diff(edges))[:, None, None] * self.path).sum(0)


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    return Walk(tmp_path_factory.mktemp("walk") / "snapshots")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_averages_are_the_weighted_sums(walk, width):
    average = walk.averages.state_dict()[f"{width}/weight"]
    torch.testing.assert_close(average, walk.by_hand(width), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.075, 0.1, 0.13, 0.2, 0.23])
def test_any_width_comes_out_of_the_snapshots(walk, width):
    pictures, found = reconstruct(walk.folder, width, "one")
    assert pictures == BATCH * STEPS
    right = walk.by_hand(width)
    spread = (walk.by_hand(0.1) - walk.by_hand(0.05)).norm()
    assert (found["weight"] - right).norm() < 0.03 * spread, "small against what a width changes"
    assert (found["weight"] - right).norm() < 4e-3 * right.norm()


@pytest.mark.parametrize("width", [0.005, 0.284, 0.5, 0.0, -1.0, float("nan")])
def test_a_width_out_of_reach_is_refused_with_those_in_reach(walk, width):
    with pytest.raises(GazeError, match=r"16 snapshots.* do not express") as error:
        reconstruct(walk.folder, width, "one")
    low, high = error.value.hint.split(";")[0].removeprefix("--ema-width ").split(" to ")
    assert 0.01 < float(low) < 0.03 < 0.2 < float(high) < 0.27
    for fits in (low, high):
        reconstruct(walk.folder, float(fits), "one")


def test_averages_come_back_exactly():
    module = nn.Linear(3, 3)
    one, other = PowerAverages(module, WIDTHS), PowerAverages(nn.Linear(3, 3), WIDTHS)
    for step in range(1, 5):
        nn.init.normal_(module.weight)
        one.update(step * BATCH, BATCH)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    state = other.state_dict()
    assert state.keys() == {f"{width}/{name}" for width in WIDTHS for name in ("weight", "bias")}
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_no_snapshots_broken_ones_and_those_of_two_runs(tmp_path):
    with pytest.raises(GazeError, match="holds no snapshots"):
        reconstruct(tmp_path, 0.1, "one")
    averages = PowerAverages(nn.Linear(3, 3), WIDTHS)
    averages.store(tmp_path, 10, "one")
    with pytest.raises(GazeError, match=r"another run: 000000000010\.safetensors"):
        reconstruct(tmp_path, 0.1, "another")
    averages.store(tmp_path, 20, "another")
    with pytest.raises(GazeError, match=r"another run: 000000000020\.safetensors"):
        reconstruct(tmp_path, 0.1, "one")
    file = tmp_path / "000000000020.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(GazeError, match="cannot be read"):
        reconstruct(tmp_path, 0.1, "one")
    assert {path.name for path in tmp_path.iterdir()} == {"000000000010.safetensors", file.name}


# In a run


def test_a_run_stores_them_resumes_them_and_exports_any_width(tmp_path, monkeypatch):
    data, vae = make_pictures(tmp_path / "pictures"), make_vae(tmp_path / "vae")
    options = {"ema": {"snapshots_every": 16, "widths": (0.06, 0.12)}, "checkpoint_every": 80}
    straight = tiny_recipe(tmp_path / "straight", data, vae, **options)
    run_here(straight)
    stopped = tiny_recipe(tmp_path / "stopped", data, vae, **options)
    run_one_step(stopped)
    run_here(stopped)
    assert newest_files(straight.out) == newest_files(stopped.out)
    assert "powers-00000.safetensors" in newest_files(straight.out)
    folder = straight.out / "snapshots"
    assert [int(path.stem) for path in sorted(folder.iterdir())] == [16, 32, 48, 64, 80]
    for path in folder.iterdir():
        assert path.read_bytes() == (stopped.out / "snapshots" / path.name).read_bytes()
    stored = load_file(folder / "000000000080.safetensors")
    assert {key.split("/")[0] for key in stored} == {"0.06", "0.12"}
    assert {value.dtype for value in stored.values()} == {torch.float16}

    unet = straight.out / "model/unet/diffusion_pytorch_model.safetensors"
    before = load_file(unet)
    export(straight, 0.12)
    after, powers = load_file(unet), weights(straight.out, "powers")
    for name, value in after.items():
        torch.testing.assert_close(value, powers[f"0.12/unet.{name}"], rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    monkeypatch.setattr("sys.argv", ["train", "export", str(straight.out), "--ema-width", "0.06"])
    assert command.main() == 0
    name = "conv_in.weight"
    torch.testing.assert_close(load_file(unet)[name], powers[f"0.06/unet.{name}"], rtol=1e-3, atol=1e-6)


def test_without_snapshots_nothing_is_kept(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures"), make_vae(tmp_path / "vae"), pictures=8)
    run_here(recipe)
    assert not (recipe.out / "snapshots").exists()
    assert "powers-00000.safetensors" not in newest_files(recipe.out)
