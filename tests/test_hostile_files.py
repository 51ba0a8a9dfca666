"""Files made to harm, opened in a process that notes what runs (benchmarks/hostile.py, here in a short form)."""

import io
import json
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.hostile import headers, payloads

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory of a process")


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, "benchmarks/hostile.py", "--fuzz", "15", "--every", "60", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_runs_and_nothing_is_imported(report):
    assert report["ran"] == []
    assert report["imported"] == []
    assert report["control"] == ["pickle.find_class ('os',)"]


def test_the_payloads_would_call_what_they_name():
    """Read without being run: whole pickles, in which a function is named and called."""
    for payload in payloads():
        if payload.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(payload)) as archive:
                payload = archive.read("archive/data.pkl")
        names = [opcode.name for opcode, _, _ in pickletools.genops(payload)]
        assert {"GLOBAL", "STACK_GLOBAL"} & set(names)
        assert names[-2:] == ["REDUCE", "STOP"]


def test_there_are_as_many_as_promised(report):
    assert len(set(payloads())) >= 50
    assert len(set(headers().values())) >= 60
    assert report["S1"]["n"] >= 50
    assert report["S2"]["n"] >= 60 + 15


@pytest.mark.parametrize("kind", ["S1", "S2", "S3"])
def test_each_ends_with_an_error_of_ours_in_little_time_and_memory(report, kind):
    assert report[kind]["untyped"] == []
    seconds, bytes_ = report[kind]["seconds"], report[kind]["bytes"]
    assert seconds[0] < 1, seconds
    assert bytes_[0] < 64 * 2**20, bytes_
