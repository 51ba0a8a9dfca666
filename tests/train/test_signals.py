"""A stop where no step goes on: while pictures are looked at and encoded."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.train.tiny import PROCESSES, make_pictures, make_vae, tiny_recipe


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
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / "errors").read_text()
    assert said == "stopped while preparing or exporting; the same command goes on from there\n"
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
