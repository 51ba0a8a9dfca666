"""Two runs do not write into one folder at a time."""

import fcntl
import subprocess
import sys

import pytest

from diffusion.errors import GazeError
from train.alone import MARK, alone
from train.processes import Processes

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """Has another process write into the folder, under this name."""
    started = []

    def hold(who: str) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, str(tmp_path / MARK), who]
        other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(other)
        assert other.stdout.readline() == "held\n"
        return other

    yield hold
    for other in started:
        other.kill()
        other.communicate()


def test_a_second_run_is_refused_until_the_first_has_gone_however_it_does(tmp_path, held, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "here")
    other = held("process 7 on here")
    with (
        pytest.raises(GazeError, match=r"another run writes into .*: process 7 on here") as error,
        alone(tmp_path, Processes()),
    ):
        raise AssertionError
    assert "out=DIR" in error.value.hint
    other.kill()
    other.wait()
    for _ in range(2):
        with alone(tmp_path, Processes()):
            assert (tmp_path / MARK).read_text().endswith(" on here")
        assert not (tmp_path / MARK).exists()


def test_a_run_of_another_machine_is_warned_of(tmp_path, held):
    held("process 7 on a-lost-machine")
    with (
        pytest.warns(UserWarning, match=r"another run writes into .*: process 7 on a-lost-machine"),
        alone(tmp_path, Processes()),
    ):
        pass


def test_other_processes_of_a_run_and_disks_without_locks_are_let_through(tmp_path, monkeypatch):
    with alone(tmp_path, Processes()), alone(tmp_path, Processes(1, 2)):
        pass

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with alone(tmp_path, Processes()):
        pass


def test_a_mark_that_the_run_before_removes_meanwhile_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    lock, removed = fcntl.lockf, []

    def late(*arguments):
        if not removed:
            removed.append((tmp_path / MARK).unlink())
        lock(*arguments)

    monkeypatch.setattr(fcntl, "lockf", late)
    with alone(tmp_path, Processes()):
        assert (tmp_path / MARK).read_text().startswith("process ")
    assert removed == [None]


def test_a_mark_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / MARK).mkdir()
    with pytest.raises(GazeError, match=r"\.run cannot be written: Is a directory"), alone(tmp_path, Processes()):
        raise AssertionError


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GazeError, match="file' cannot be written") as error, alone(tmp_path / "file", Processes()):
        raise AssertionError
    assert "out=DIR" in error.value.hint
