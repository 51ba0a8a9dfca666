"""Memory that the process keeps."""

import resource
import sys

import pytest
import torch

from tests.train.tiny import run_one_step, tiny_recipe
from train.allocator import keep_memory

SIZE = 64 * 2**20  # bytes


def faults() -> int:
    """Pages that the kernel had to give for a tensor, after ones like it were there and went."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_kernel_is_asked_for_memory_once():
    keep_memory()
    assert faults() < SIZE // resource.getpagesize() / 10, "each time all of them, without"


def test_a_run_on_a_cpu_does_so(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("train.launch.keep_memory", lambda: called.append(True))
    assert run_one_step(tiny_recipe(tmp_path / "run", None, data={"drawn": 16})) == 8
    assert called
