"""A stop where no step goes on, while pictures are looked at and encoded; and what workers make of signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader, Dataset

from tests.train.tiny import PROCESSES, make_pictures, make_vae, tiny_recipe
from train.signals import shielded


def slowly(recipe: Path, errors: Path) -> None:
    """`python -m train`, with as much time for each picture as a large one takes."""
    from diffusion.autoencoder import Autoencoder
    from train import __main__ as command

    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    encode = Autoencoder.encode
    Autoencoder.encode = lambda self, x: time.sleep(0.05) or encode(self, x)
    sys.argv = ["train", str(recipe)]
    sys.exit(command.main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_pictures_are_encoded_leaves_nothing_half_done(tmp_path, number):
    """Sent to all processes of the terminal, the workers too."""
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures", 80), make_vae(tmp_path / "vae"),
                         data={"workers": 1})  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    process = PROCESSES.Process(target=slowly, args=(tmp_path / "recipe.yaml", tmp_path / "errors"))
    process.start()
    while not list((tmp_path / "run").glob("cache/latents-*")) and process.exitcode is None:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, number)
    process.join(300)
    assert process.exitcode == 130
    said = (tmp_path / "errors").read_text()
    assert said == "stopped while preparing or exporting; the same command goes on from there\n"
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


class Asked(Dataset):
    """What a worker says of itself: its number, and the seconds that it has left."""

    def __getitem__(self, number: int) -> list[int]:
        return [os.getpid(), signal.alarm(0)]


def begin() -> tuple[Iterator[list[int]], int]:
    """A worker, and its number."""
    options = {"multiprocessing_context": "fork", **shielded(1)}
    workers = iter(DataLoader(Asked(), sampler=range(20), batch_size=None, **options))
    return workers, next(workers)[0]


def test_workers_outlive_signals_for_as_long_as_it_takes_but_not_those_of_their_run():
    workers, worker = begin()
    for _ in range(3):
        subprocess.run(["kill", str(worker)], check=True)  # as a launcher, or a batch system, does to all
        time.sleep(0.05)
        assert [next(workers) for _ in range(4)] == [[worker, 0]] * 4
    os.kill(worker, signal.SIGTERM)
    assert ends(worker)


def fail_with_workers(pipe: Any) -> None:
    """What is raised, or kept as here, holds the workers until the program is at its end."""
    fail_with_workers.workers, worker = begin()
    pipe.send_bytes(str(worker).encode())
    time.sleep(float(pipe.recv_bytes()))


@pytest.mark.parametrize("killed", [True, False])
def test_workers_end_with_their_run(killed):
    """Also where its SIGTERM is lost, because another one is still waiting to be looked at."""
    here, there = PROCESSES.Pipe()
    run = PROCESSES.Process(target=fail_with_workers, args=(there,))
    run.start()
    worker = int(here.recv_bytes())
    os.kill(worker, signal.SIGSTOP)
    subprocess.run(["kill", str(worker)], check=True)
    here.send_bytes(b"60" if killed else b"0")
    if killed:
        run.kill()
    run.join(1)  # long enough for the run to ask its worker to end, and no more
    os.kill(worker, signal.SIGCONT)
    run.join(20)
    assert run.exitcode == (-signal.SIGKILL if killed else 0)
    assert ends(worker)


def ends(process: int) -> bool:
    """Whether the process of this number is no more, within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
