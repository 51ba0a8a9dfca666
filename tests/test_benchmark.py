"""The memory that a benchmark prints is that of the process it started."""

import sys

import pytest

from diffusion.errors import GazeError
from pipelines.benchmark import compare, fresh_process, table
from tests.small_pipeline import small_pipeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")


def test_the_peak_of_a_process_is_its_own():
    here = bytearray(300 * 2**20)  # of which the other process must know nothing
    small, large = (
        fresh_process("print('hello')"),
        fresh_process("import sys; x = b'1' * int(sys.argv[1])", "100000000"),
    )
    assert len(here) > small + 200 * 2**20
    assert abs(large - small - 10**8) < 4 * 2**20
    with pytest.raises(GazeError, match=r"(?s)a fresh process failed: .*nothing"):
        fresh_process("import nothing")


def test_cold_runs_tell_their_memory(tmp_path):
    small_pipeline().save_pretrained(tmp_path / "model")
    report = compare(tmp_path / "model", num_inference_steps=1, pairs=1, cold_pairs=1)
    memory = report["cold"]["memory"]
    assert memory["import torch"] < memory["gaze"] < memory["diffusers"]
    assert f"most memory of a cold run: gaze {memory['gaze'] / 2**20:,.0f} MiB, diffusers" in table(report)
