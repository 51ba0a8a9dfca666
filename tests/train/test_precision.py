"""Training in half precision: on a CPU with a scaler put in place, because Accelerate has fp16 on GPUs only."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch.amp import GradScaler

from tests.train.tiny import newest_files, rows, run_here, run_one_step, tiny_recipe, weights
from train import loop
from train.autoencoder_phase import AutoencoderPhase
from train.ema import exponential_decay
from train.loop import NotFinite

INTERVAL = 2  # sound steps after which the scale doubles


@pytest.fixture
def in_fp16(monkeypatch) -> Callable[..., list[float]]:
    """Has every run compute in fp16 with a scaler of these options; the list of the scales that its steps had."""
    make, skips = loop.make_accelerator, loop.skips

    def with_scaler(**options) -> list[float]:
        scales: list[float] = []

        def make_scaled(recipe):
            accelerator = make(recipe)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = GradScaler("cpu", growth_interval=INTERVAL, **options)
            return accelerator

        monkeypatch.setattr(loop, "make_accelerator", make_scaled)
        monkeypatch.setattr(
            loop, "skips", lambda scaler, norm: scales.append(scaler.get_scale()) or skips(scaler, norm)
        )
        return scales

    return with_scaler


@pytest.fixture
def at_picture_20(monkeypatch) -> Callable[[float], None]:
    """Multiplies the loss of that sample."""
    good = AutoencoderPhase.loss

    def times(factor: float) -> None:
        def loss(self, module, samples, u_B=None):
            factors = [factor if sample.position == 20 else 1.0 for sample in samples]
            return good(self, module, samples) * torch.tensor(factors)

        monkeypatch.setattr(AutoencoderPhase, "loss", loss)

    return times


def test_a_scale_too_high_is_found_by_leaving_steps_out_and_outlives_a_stop(data, tmp_path, in_fp16):
    scales = in_fp16(init_scale=2.0**127, backoff_factor=2.0**-60)
    straight = tiny_recipe(tmp_path / "straight", data, pictures=56, log_every=8)
    run_here(straight)
    assert scales == [2.0**127, 2.0**67, 2.0**7, 2.0**7, 2.0**8, 2.0**8, 2.0**9]
    found = rows(straight.out)
    assert [row["pictures"] for row in found] == [*range(8, 57, 8)]
    assert [row["gradient_norm"] is None for row in found] == [True, True, *[False] * 5]  # and no Infinity in the JSON
    assert [row["loss_scale"] for row in found] == [*scales[1:], 2.0**9]
    stopped = tiny_recipe(tmp_path / "stopped", data, pictures=56, log_every=8)
    del scales[:]
    assert [run_one_step(stopped) for _ in range(4)] == [8, 16, 24, 32]
    run_here(stopped)
    assert scales == [2.0**127, 2.0**67, 2.0**7, 2.0**7, 2.0**8, 2.0**8, 2.0**9]
    assert newest_files(stopped.out) == newest_files(straight.out)
    assert rows(stopped.out) == found


def test_a_step_left_out_changes_no_weight_and_its_pictures_count(data, tmp_path, in_fp16, at_picture_20):
    """The third step overflows. The averages are over pictures, so the weights go into them once more."""
    scales = in_fp16(init_scale=256.0)
    at_picture_20(1e6)
    run_here(tiny_recipe(tmp_path, data, pictures=32, checkpoint_every=8, keep=4))
    assert scales == [256.0, 256.0, 512.0, 256.0]
    saved = (tmp_path / "checkpoints" / f"{pictures:012d}" for pictures in (16, 24))
    before, after = (
        {part: load_file(folder / f"{part}-00000.safetensors") for part in ("model", "ema", "optimizer")}
        for folder in saved
    )
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert all(torch.equal(value, after["optimizer"][name]) for name, value in before["optimizer"].items())
    kept = exponential_decay(20, 24, 8)
    for name, value in before["ema"].items():
        expected = kept * value.double() + (1 - kept) * before["model"][name].double()
        torch.testing.assert_close(after["ema"][name].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_is_no_overflow(data, tmp_path, in_fp16, at_picture_20):
    in_fp16(init_scale=256.0)
    at_picture_20(float("inf"))
    with pytest.raises(NotFinite, match="pictures 16 to 23"):
        run_here(tiny_recipe(tmp_path / "run", data, pictures=32))
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
