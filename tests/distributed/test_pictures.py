"""`gaze generate` and `gaze grid` over two processes: the pictures of one, and an end when one of them ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pipelines.png import read_settings
from pipelines.processes import Processes
from tests.small_pipeline import small_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red cat", "dog", "red", "cat", "dog"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The second process fails when it has drawn its first picture.
FAILING = """
import os, signal, sys
from diffusion.errors import GazeError
from pipelines import batch
from pipelines.__main__ import main

how = sys.argv[-1]

def fail(*_):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise GazeError("it cannot be written")

if os.environ["RANK"] == "1":
    batch.save_png = fail
sys.argv = "gaze generate --prompts prompts.txt --model model --steps 100 -n 50 -o out/".split()
main()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    small_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def files(place):
    found = {}
    for path in sorted(Path(place).iterdir()):
        with Image.open(path) as image:
            found[path.name] = image.tobytes()
    return found


def test_two_draw_what_one_draws(folder):
    """As a user types it."""
    words = ["generate", "--prompts", "prompts.txt", "--model", "model", "--steps", "2", "--seed", "3", "--json"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    two = [*launcher, "-m", "pipelines", *words, "-o", "two/", "--sheet", "two.png", "--preview", "now.png"]
    done = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one = [sys.executable, "-m", "pipelines", *words, "-o", "one/", "--sheet", "one.png"]
    alone = subprocess.run(one, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert files("one") == files("two")
    assert len(files("one")) == len(PROMPTS)
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert [picture["prompt"] for picture in read_settings("two.png")["pictures"]] == PROMPTS
    pictures, theirs = (json.loads(run.stdout)["pictures"] for run in (alone, done))
    for mine, other in zip(pictures, theirs, strict=True):
        assert {**mine, "seconds": 0, "path": Path(mine["path"]).name} == {
            **other, "seconds": 0, "path": Path(other["path"]).name
        }  # fmt: skip
    assert Path("now.png").is_file()


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_when_one_ends_the_other_does(folder, how):
    Path("failing.py").write_text(FAILING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "failing.py"]
    begin = time.monotonic()
    done = subprocess.run([*torchrun, how], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    assert done.stdout == ""
    assert done.stderr.count("error in process") == (how == "raises")
    if how == "raises":
        assert "error in process 1: it cannot be written\n" in done.stderr
    assert not list(Path("out").glob("*.tmp"))


class Store(dict):
    """What of torch.distributed.Store is used."""

    set = dict.__setitem__
    get = dict.__getitem__

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 5, 12])
def test_everything_comes_back_once_and_in_order(count, total):
    store = Store()
    things = [bytes([index]) * 2**21 if index == 1 else bytes([index]) for index in range(total)]
    processes = [Processes(rank, count, store) for rank in range(count)]
    assert processes[0].agree(lambda: {"seed": 3}) == {"seed": 3}
    assert processes[-1].agree(lambda: pytest.fail("only the first decides") if count > 1 else {"seed": 3}) == {
        "seed": 3
    }
    parts = [[things[index] for index in process.part(total)] for process in processes]
    for process, part in [*zip(processes, parts, strict=True)][1:]:
        assert process.collect(total, part, bytes, bytes) is None
    assert processes[0].collect(total, parts[0], bytes, bytes) == things
    for process, part in [*zip(processes, parts, strict=True)][1:]:
        process._send_all(total, part, bytes, "shared")  # all before any waits: here they are one thread
    assert processes[0].share(total, parts[0], bytes, bytes, "shared") == things
    assert processes[-1].share(total, parts[-1], bytes, bytes, "shared") == things
