"""Two processes on the CPU that share the model out, by FSDP2 or DeepSpeed's ZeRO: the same run as one that has all."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_two_processes import finish
from tests.train.tiny import (
    difference,
    make_pictures,
    make_vae,
    newest_files,
    rows,
    run_here,
    start_two,
    tiny_recipe,
    weights,
)
from train.loop import NotFinite

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
WAYS = [
    pytest.param(FSDP2, id="fsdp2"),
    pytest.param(ZERO, id="zero2", marks=needs_deepspeed),
    pytest.param(ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, id="zero1", marks=needs_deepspeed),
]
LATE = 360  # pictures of the checkpoint before the last


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of a run in a folder: 50 steps of the quickest phase, in two micro-batches for each process."""
    data = make_pictures(tmp_path_factory.mktemp("pictures"))
    vae = make_vae(tmp_path_factory.mktemp("vae"))
    cache = tmp_path_factory.mktemp("cache")
    return lambda out, **changes: tiny_recipe(
        out, data, vae, **{"phase": "text", "pictures": 400, "checkpoint_every": 40, "log_every": 40,
                           "gradient_accumulation_steps": 2, "data": {"cache": cache, "held_out": 0.2},
                           "validation": {"every": 200, "prompts": ["red square"]}, **changes}
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory, recipe) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run_here(recipe(out))
    return out


@pytest.fixture(scope="module", params=WAYS)
def way(request) -> dict[str, str]:
    """What the launcher puts into the environment."""
    return request.param


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, recipe, way) -> Path:
    """The run of two that nothing disturbs."""
    out = tmp_path_factory.mktemp("sharded")
    assert finish(start_two(recipe(out), **way)) == [0, 0]
    return out


def gone_back(run: Path, out: Path) -> Path:
    """A run that has got as far as the last checkpoint but one of `run`."""
    shutil.copytree(run / "checkpoints" / f"{LATE:012d}", out / "checkpoints" / f"{LATE:012d}")
    return out


def same_weights(one: Path, other: Path, tolerance: float) -> None:
    for part in ("model", "ema", "optimizer"):
        assert difference(known(one, part), known(other, part)) < tolerance, part


def known(out: Path, part: str) -> dict[str, Any]:
    """Without the biases of keys: softmax does not see them, so their gradient is rounding, which Adam makes large."""
    return {name: value for name, value in weights(out, part).items() if "k_proj.bias" not in name}


def test_two_that_share_it_out_learn_what_one_learns(alone, sharded):
    same_weights(alone, sharded, 1e-6)
    for mine, theirs in zip(rows(alone), rows(sharded), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert json.loads(newest_files(sharded)["manifest.json"])["processes"] == 2
    assert (sharded / "model" / "text_encoder" / "model.safetensors").is_file()


def test_resumed_the_bits_are_the_same(sharded, tmp_path, recipe, way):
    out = gone_back(sharded, tmp_path)
    assert finish(start_two(recipe(out), **way)) == [0, 0]
    assert newest_files(out) == newest_files(sharded)


def test_one_goes_on_with_what_two_shared_out(alone, sharded, tmp_path, recipe):
    out = gone_back(sharded, tmp_path)
    run_here(recipe(out))
    same_weights(out, alone, 1e-6)


def test_two_share_out_what_one_began(alone, tmp_path, recipe, way):
    out = gone_back(alone, tmp_path)
    assert finish(start_two(recipe(out), **way)) == [0, 0]
    same_weights(out, alone, 1e-6)


def test_what_is_not_finite_stops_both_before_the_step(recipe, tmp_path, way):
    bad = recipe(tmp_path, optimizer={"learning_rate": 1e30, "warmup": 0}, checkpoint_every=8)
    assert finish(start_two(bad, **way)) == [NotFinite.exit_code] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000008"]
