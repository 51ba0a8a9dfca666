"""Every `gaze` command and every piece of Python that the documentation shows works as it stands there.

They run in a folder that has what they name: `castle/`, a model folder of diffusers, `castle.safetensors`, the same in
one file, two LoRA files, `storyteller/`, a language model of transformers, and pictures. Without --model they use the
shipped model.
"""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from diffusion.convert import convert
from diffusion.pretrained import load_model
from tests.borrowed_models import causal
from tests.made_things import write_glyphs
from tests.narrow_models import narrow_pipeline
from tests.random_lora import flat, random_lora

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
OPENING = "from pipelines import TextToImage\npipe = TextToImage.from_pretrained()\n"  # where a page goes on from it
# Not run: what measures or scores for minutes, what needs a finished training run, and what the page itself warns of.
SLOW = ("gaze evaluate", "gaze benchmark")
TRAINED = re.compile("--(model|lora) runs/")
UNSAFE = "torch.load"


def blocks(language):
    """Page, number and content of each block of a language."""
    for page in PAGES:
        found = [content for kind, content in BLOCK.findall(page.read_text()) if kind == language]
        for number, content in enumerate(found):
            yield pytest.param(content, id=f"{page.name}-{number}")


def commands(content):
    """The lines that are commands of ours, those continued by a backslash joined."""
    lines = (line.strip() for line in content.replace("\\\n", " ").splitlines())
    return [
        line for line in lines if line.startswith("gaze ") and not line.startswith(SLOW) and not TRAINED.search(line)
    ]


BASH = [block for block in blocks("bash") if commands(block.values[0])]
PYTHON = [block for block in blocks("python") if UNSAFE not in block.values[0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    disable_progress_bar()  # as the command does before transformers is imported
    folder = tmp_path_factory.mktemp("made")
    causal(folder / "storyteller")
    narrow_pipeline("sd1").save_pretrained(folder / "castle")
    convert(folder / "castle", folder / "castle.safetensors")
    networks = load_model(folder / "castle").modules
    networks.pop("vae")
    for seed, name in enumerate(("style", "dog")):
        save_file(flat(random_lora(networks, seed)), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "prompts.txt").write_text("a red heart\na snowman\n")
    write_glyphs(tmp_path / "data" / "scenes")
    for name, colour in (("apple.png", "red"), ("bowl.png", "gray"), ("mask.png", "white")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    return tmp_path


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("content", BASH)
def test_commands(gaze, place, content):
    for line in commands(content):
        _, *arguments = shlex.split(line, comments=True)
        code, out, err = gaze(*arguments)
        assert (code, err) == (0, ""), line
        assert out, line


@pytest.mark.parametrize("content", PYTHON)
def test_python(place, content, capsys):
    script = place / "script.py"
    script.write_text(content if "pipe =" in content else OPENING + content)
    runpy.run_path(str(script))


def test_the_pages_are_found():
    assert len(BASH) >= 4
    assert len(PYTHON) >= 4
