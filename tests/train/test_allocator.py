"""Memory that the process keeps."""

import resource
import sys

import pytest
import torch

from tests.train.tiny import PROCESSES
from train import __main__ as command
from train.allocator import keep_memory

SIZE = 40 * 2**20  # bytes: above glibc's largest threshold
TRIES = 32  # aligned blocks leave gaps beside them at first


def faults() -> int:
    """The fewest pages that the kernel had to give for a tensor, of several one after the other."""

    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SIZE // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return min(pages() for _ in range(TRIES))


def probe(kept: bool) -> None:
    if kept:
        keep_memory()
    sys.exit(faults() > SIZE // resource.getpagesize() / 10)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("kept", [True, False])
def test_the_kernel_is_asked_for_memory_once_or_each_time(kept):
    process = PROCESSES.Process(target=probe, args=(kept,))
    process.start()
    process.join(60)
    assert process.exitcode == (not kept)


@pytest.mark.parametrize("gpu", [True, False])
def test_the_command_does_so_on_a_cpu_alone(tmp_path, monkeypatch, gpu):
    called = []
    monkeypatch.setattr("train.allocator.keep_memory", lambda: called.append(True))
    monkeypatch.setattr("train.loop.train", lambda recipe: recipe.out)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("phase: autoencoder\nout: run\npictures: 8\nbatch_size: 8\ndata: {drawn: 8}\n")
    assert command.run([str(recipe)]) == 0
    assert called == [True] * (not gpu)
