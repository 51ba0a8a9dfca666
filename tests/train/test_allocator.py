"""Memory that the process keeps."""

import resource
import sys

import pytest
import torch

from tests.train.tiny import make_pictures, run_one_step, tiny_recipe

MB = 2**20


def faults(size: int) -> int:
    """Pages that the kernel had to give for a tensor of so many bytes, after one like it was there and went."""
    torch.ones(size // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_run_on_a_cpu_asks_the_kernel_for_memory_once(tmp_path):
    run_one_step(tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures")))
    pages = 64 * MB // resource.getpagesize()
    assert faults(64 * MB) < pages / 10, "each time all of them, without"
