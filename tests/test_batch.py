"""What `generate` and `grid` have in common: batches, previews, the line of progress."""

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipelines.batch import draw, previewer
from tests.small_pipeline import SIZE

ROOT = Path(__file__).resolve().parent.parent
FEW = {"num_inference_steps": 2, "model": "here"}


@pytest.fixture
def batches(pipe, monkeypatch):
    """The prompts of each batch."""
    made = []
    steps = pipe.steps

    def counted(**request):
        made.append(request["prompt"])
        return steps(**request)

    monkeypatch.setattr(pipe, "steps", counted)
    return made


def on_a_gpu(pipe):
    return SimpleNamespace(steps=pipe.steps, device=torch.device("cuda"))


def drawn(pipe, pictures, batch_size=8, show=None):
    return list(draw(pipe, pictures, batch_size, lambda fraction, doing: None, show))


def test_on_a_cpu_each_picture_is_drawn_alone(pipe, batches):
    pictures = [FEW | {"prompt": prompt, "seed": seed} for seed, prompt in enumerate(["cat", "dog", "red"])]
    together = drawn(pipe, pictures)
    assert batches == [["cat"], ["dog"], ["red"]]
    for picture, asked in zip(together, pictures, strict=True):
        (alone,) = drawn(pipe, [asked])
        assert picture.image.tobytes() == alone.image.tobytes()
        assert picture.settings == alone.settings
        assert asked.items() <= picture.settings.items()


@pytest.mark.parametrize(
    "seeds, changes, wanted",
    [
        ([0, 1, 2, 3], [{}, {}, {}, {}], ["abc", "d"]),
        ([0, 1, 5, 6], [{}, {}, {}, {}], ["ab", "cd"]),
        ([0, 1, 2, 3], [{}, {"spacing": "karras"}, {"spacing": "karras"}, {}], ["a", "bc", "d"]),
        ([0, 1, 2, 3], [{}, {"negative_prompt": "dog"}, {"negative_prompt": "red"}, {}], ["a", "bc", "d"]),
    ],
)
def test_on_a_gpu_neighbours_that_differ_in_prompt_and_seed_are_drawn_together(pipe, batches, seeds, changes, wanted):
    pictures = [
        FEW | {"prompt": prompt, "seed": seed} | change
        for prompt, seed, change in zip("abcd", seeds, changes, strict=True)
    ]
    made = drawn(on_a_gpu(pipe), pictures, batch_size=3)
    assert ["".join(batch) for batch in batches] == wanted
    for picture, asked in zip(made, pictures, strict=True):
        assert asked.items() <= picture.settings.items()


def test_a_preview_is_what_a_step_shows(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    write = previewer("new/now", 2)

    def show(preview):
        write(preview)
        if Path("new/now.png").exists():
            with Image.open("new/now.png") as image:
                seen.append(image.tobytes())
        else:
            seen.append(None)

    picture = {"prompt": "cat", "seed": 0, "num_inference_steps": 5}
    (made,) = drawn(pipe, [picture], show=show)
    assert seen[0] is None
    assert seen[1] == seen[2] != seen[3]
    assert seen[4] == made.image.tobytes()
    drawn(on_a_gpu(pipe), [picture, picture | {"seed": 1}], show=previewer("two.png", 1))
    with Image.open("two.png") as image:
        assert image.width > 2 * SIZE
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "now.png", "two.png"]


def test_previews_cost_nothing_when_off(pipe, monkeypatch):
    decoded = []
    decode = pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda latents: decoded.append(1) or decode(latents))
    assert previewer(None, 1) is None
    drawn(pipe, [{"prompt": "cat", "seed": 0, "num_inference_steps": 5}])
    assert len(decoded) == 1


def test_a_preview_that_cannot_be_written_is_named_before_the_first_step(gaze, folder):
    code, out, err = gaze("generate", "cat", "--model", folder, "--preview", "/proc/now.png", "-o", "a.png")
    assert (code, out) == (1, "")
    assert "'/proc'" in err
    assert not Path("a.png").exists()


def test_a_terminal_shows_what_is_being_drawn(folder, tmp_path):
    """The command on a pseudo-terminal: stderr has the line, stdout the result alone."""
    main, terminal = pty.openpty()
    words = [sys.executable, "-m", "pipelines", "generate", "[b]a red[/b] cat", "--model", str(folder), "--steps", "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = bytearray()

    def read():
        while True:
            try:
                part = os.read(main, 10_000)
            except OSError:  # the other end is closed
                return
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    out, _ = running.communicate(timeout=60)
    reader.join(10)
    os.close(main)
    assert running.returncode == 0
    assert out.decode().startswith("b-a-red-b-cat-")
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(seen)).decode()
    assert re.search(r"\d:\d\d:\d\d 1/1  step \d+/40  \[b\]a red\[/b\] cat", text), text
