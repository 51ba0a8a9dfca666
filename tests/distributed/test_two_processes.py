"""Two processes on the CPU (gloo): the same run as one, stopped and killed together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState

from diffusion.errors import GazeError
from pipelines.launch import start_the_others
from tests.train.tiny import (
    PROCESSES,
    difference,
    free_port,
    newest_files,
    rows,
    run_here,
    start_two,
    tiny_recipe,
    weights,
)
from train.company import EXIT_CODE
from train.config import Recipe
from train.launch import leave, make_accelerator
from train.processes import Processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, vae) -> Path:
    """The run of two that nothing disturbs."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("run") / "two", data, vae)
    assert finish(start_two(recipe)) == [0, 0]
    return recipe.out


def finish(processes, seconds: float = 60) -> list[int | None]:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def test_two_learn_what_one_learns(straight, tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae)
    run_here(recipe)
    for alone, together in zip(rows(tmp_path), rows(straight), strict=True):
        assert alone == pytest.approx(together, rel=1e-5)
    assert difference(weights(tmp_path), weights(straight)) < 1e-6


def test_one_of_them_writes(straight):
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["000000000064", "000000000080"]
    assert [row["pictures"] for row in rows(straight)] == [16, 32, 48, 64, 80]
    assert (straight / "model" / "model_index.json").is_file()
    assert not list(straight.glob(".*"))


def test_a_signal_to_one_takes_both_to_the_same_checkpoint(tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae, pictures=100_000, checkpoint_every=100_000, log_every=8)
    processes = start_two(recipe)
    while not (tmp_path / "metrics.jsonl").exists() and processes[0].exitcode is None:
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, 30) == [130, 130]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert int(saved.name) == rows(tmp_path)[-1]["pictures"]


def test_killed_and_resumed_the_bits_are_the_same(straight, tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae)
    processes = start_two(recipe)
    while not list((tmp_path / "checkpoints").glob("[0-9]*")) and processes[0].exitcode is None:
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.join()
    assert finish(start_two(recipe)) == [0, 0]
    assert newest_files(tmp_path) == newest_files(straight)
    assert rows(tmp_path) == rows(straight)


def test_begun_by_two_and_ended_by_one(straight, tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae, checkpoint_every=40)
    processes = start_two(recipe)
    while not list((tmp_path / "checkpoints").glob("[0-9]*")) and processes[0].exitcode is None:
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.join()
    run_here(recipe)
    assert rows(tmp_path)[-1] == pytest.approx(rows(straight)[-1], rel=1e-4)
    assert difference(weights(tmp_path), weights(straight)) < 1e-6


def test_one_that_dies_does_not_leave_the_other_waiting(tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae, pictures=100_000, log_every=8)
    processes = start_two(recipe)
    while not (tmp_path / "metrics.jsonl").exists() and processes[0].exitcode is None:
        time.sleep(0.02)
    processes[1].kill()
    codes = finish(processes, 15)
    assert codes[0] == EXIT_CODE


def test_the_command_under_accelerate(tmp_path, data, vae):
    """As a user types it, once: the launcher, two processes, one line of stdout."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path / "run", data, vae).model_dump(mode="json")))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    words = [*launcher, "-m", "train", str(recipe), "pictures=16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'model'}\n"
    assert done.stderr.splitlines()[0].startswith("16/16 pictures  loss"), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert json.loads(newest_files(tmp_path / "run")["manifest.json"])["processes"] == 2


def leave_often(rank: int, port: int) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0)
    torch.set_num_threads(1)
    for number in range(100):
        run_and_leave(dist.PrefixStore(str(number), store), rank)


def run_and_leave(store: dist.Store, rank: int) -> None:
    """What a run does with Accelerate and DDP."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(Recipe(phase="text", out=".", pictures=64, data={"drawn": 1}))
    module = accelerator.prepare(torch.nn.Linear(2000, 200))
    module(torch.ones(1, 2000)).sum().backward()
    Processes(rank, 2).wait()
    del module
    leave(accelerator)


def test_processes_leave_a_run_without_waiting_for_ever():
    """They did, one time in fifty: the reducer in `module` and a thread of the group waited for each other."""
    port = free_port()
    processes = [PROCESSES.Process(target=leave_often, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    assert finish(processes) == [0, 0]


def test_a_launcher_that_cannot_say_how_many_is_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(GazeError, match="only over MPI") as error:
        start_the_others("train", ["recipe.yaml", "seed=1"])
    assert "torchrun --nproc-per-node 2 -m train recipe.yaml seed=1" in error.value.hint
    monkeypatch.setenv("WORLD_SIZE", "2")
    start_the_others("train", ["recipe.yaml"])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("MASTER_PORT")
    start_the_others("train", ["recipe.yaml"])
