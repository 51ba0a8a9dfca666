"""How processes are started and told of each other: the ready files, and what is said of settings that cannot work."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from diffusion.errors import GazeError
from pipelines.launch import _asked_for
from tests.train.tiny import tiny_recipe
from train import zero
from train.launch import make_accelerator, prepared

FILES = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
STATED = {
    "1-gpu": {"distributed_type": "NO", "num_processes": 1, "num_machines": 1, "use_cpu": False},
    "8-gpus": {"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "4x8-gpus": {"distributed_type": "MULTI_GPU", "num_processes": 32, "num_machines": 4, "rdzv_backend": "static"},
    "fsdp": {"distributed_type": "FSDP", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "zero2": {"distributed_type": "DEEPSPEED", "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "cpu": {"distributed_type": "MULTI_CPU", "num_processes": 2, "num_machines": 1, "use_cpu": True},
}
NESTED = {
    "fsdp": (
        "fsdp_config",
        {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_cpu_ram_efficient_loading": False},
    ),
    "zero2": ("deepspeed_config", {"zero_stage": 2}),
}


def test_every_ready_file_is_known_here():
    assert {path.stem for path in FILES.iterdir()} == STATED.keys()


@pytest.mark.parametrize("name", STATED)
def test_accelerate_reads_a_ready_file_as_it_is_meant(name):
    path = FILES / f"{name}.yaml"
    read = load_config_from_file(str(path)).to_dict()
    assert {key: read[key] for key in STATED[name]} == STATED[name]
    if name in NESTED:
        section, values = NESTED[name]
        assert {key: read[section][key] for key in values} == values
    top = [line for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in " ".join(top)
    assert "-m train CONFIG" in " ".join(top)


@pytest.mark.parametrize(
    "command, count",
    [
        ("accelerate launch --cpu --num_processes 3 -m train x.yaml", 3),
        ("accelerate launch --num-processes=4 --config_file {cpu} -m train x.yaml", 4),
        ("accelerate launch --config_file {cpu} -m train x.yaml", 2),
        ("accelerate launch --config_file={cpu} -m train x.yaml", 2),
        ("accelerate launch --config_file no such/file.yaml -m train x.yaml", 0),
    ],
)
def test_how_many_a_launcher_was_asked_for(command, count):
    assert _asked_for(command.format(cpu=FILES / "cpu.yaml")) == count


@pytest.fixture
def fresh_state(monkeypatch):
    """Accelerate as in a new process, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_a_port_in_use_is_named(fresh_state, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for key, value in {"ACCELERATE_USE_CPU": "true", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                           "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "OMP_NUM_THREADS": "1"}.items():  # fmt: skip
            fresh_state.setenv(key, value)
        with pytest.raises(GazeError, match=f"cannot meet at 127.0.0.1:{port}.*already in use") as error:
            make_accelerator(tiny_recipe(tmp_path, tmp_path))
    assert "MASTER_PORT" in error.value.hint


@pytest.mark.parametrize(
    "setting, changes, said",
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "FSDP2 only"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "shares nothing out"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json"}, {}, "deepspeed_config_file has settings"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "another AdamW"),
        ({}, {"optimizer": {"name": "muon"}}, "optimizer.name=muon does not go with DeepSpeed"),
        ({}, {"optimizer": {"name": "adamw_8bit"}}, "optimizer.name=adamw_8bit does not go with DeepSpeed"),
        ({}, {"mixed_precision": "fp16"}, "mixed_precision=fp16 does not go with DeepSpeed"),
        ({}, {"compile": True}, "compile=true does not go with DeepSpeed"),
    ],
)
def test_what_does_not_go_with_deepspeed(monkeypatch, tmp_path, setting, changes, said):
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)
    for key, value in setting.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(GazeError, match=said) as error:
        zero.zero_plugin(tiny_recipe(tmp_path, tmp_path, **changes))
    assert "configs/accelerate/" in error.value.hint


def test_without_deepspeed_the_error_says_what_to_install(fresh_state, tmp_path):
    fresh_state.setattr(zero, "is_deepspeed_available", lambda: False)
    fresh_state.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(GazeError, match="not installed") as error:
        make_accelerator(tiny_recipe(tmp_path, tmp_path))
    assert "pip install" in error.value.hint


def test_the_recipe_says_how_many_micro_batches_there_are(fresh_state, tmp_path):
    fresh_state.setenv("ACCELERATE_USE_CPU", "true")
    fresh_state.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")  # the launcher's default for DeepSpeed is 1
    accelerator = make_accelerator(tiny_recipe(tmp_path, tmp_path, gradient_accumulation_steps=2))
    assert accelerator.gradient_accumulation_steps == 2


def test_what_does_not_go_with_fsdp2(tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=["Convolution"])  # fmt: skip
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    module = nn.Conv2d(1, 1, 1)
    with pytest.raises(GazeError, match="adamw_8bit does not go with FSDP2"):
        prepared(accelerator, tiny_recipe(tmp_path, tmp_path, optimizer={"name": "adamw_8bit"}), module)
    with pytest.raises(GazeError, match="has Convolution, which is no part") as error:
        prepared(accelerator, tiny_recipe(tmp_path, tmp_path), module)
    assert "Conv2d" in error.value.hint
    assert plugin.mixed_precision_policy is None, "autocast does it"
