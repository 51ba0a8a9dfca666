"""What tests share: a small model, and the command line."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several work side by side, and torch would give each all cores
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from pipelines import TextToImage
from pipelines.__main__ import main


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of `small_pipeline`; no test changes it."""
    from transformers.utils.logging import disable_progress_bar  # slow to import, and most tests do without

    from tests.small_pipeline import small_pipeline

    disable_progress_bar()  # main() does, but only for a process that has not imported transformers yet
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(folder):
    """As the command line takes it."""
    return str(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of captioned pictures to train on."""
    from tests.train.tiny import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from tests.train.tiny import make_vae

    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def one_core():
    """16 threads that each want all cores take a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gaze(monkeypatch, capsys, tmp_path):
    """Runs a command line in a folder of its own; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gaze", *map(str, arguments)])
        monkeypatch.setenv("GAZE_DEBUG", "")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
