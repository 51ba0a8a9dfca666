"""The models inside the package: small enough, of one piece, found by name, and the same in diffusers' own pipeline."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import TextToImage
from pipelines.shapes.evaluation import evaluate_shapes
from pipelines.shipped import DEFAULT_MODEL, MODELS, place_of

SHIPPED = {
    "emoji": ["red apple", "a woman scientist with dark skin tone"],
    "shapes": ["a red circle", "a small green ring to the left of a blue square"],
}


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.from_pretrained()


def test_size_and_kind_of_their_files():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 40e6
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_a_model_is_found_by_its_name_unless_something_here_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {folder.name for folder in MODELS.iterdir()} == {*SHIPPED}
    assert place_of(None) == place_of("emoji") == DEFAULT_MODEL
    assert place_of(Path("shapes")) == MODELS / "shapes"
    others = ["owner/shapes", "./shapes", "..", "", ".", os.fspath(tmp_path), "shape"]
    assert [place_of(other) for other in others] == others
    (tmp_path / "shapes").mkdir()
    assert place_of("shapes") == "shapes"


@pytest.mark.parametrize("name", SHIPPED)
def test_diffusers_opens_it_and_draws_the_same_picture(name):
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    peer = diffusers.StableDiffusionPipeline.from_pretrained(place_of(name), local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "latents": latents}
    pipe = TextToImage.from_pretrained(name)
    ours = (pipe(SHIPPED[name], scheduler="ddim", **options).pixels_BCHW / 2 + 0.5).clamp(0, 1)
    theirs = peer(SHIPPED[name], output_type="np", **options).images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 1e-3


def test_the_shapes_model_draws_what_captions_say():
    """Its score is some 90 %; of 12 prompts fewer than 7 right would be another model."""
    report, _ = evaluate_shapes(TextToImage.from_pretrained("shapes"), "seen", 12)
    assert report["right"] >= 7


def test_the_prompt_decides_the_picture(pipe):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    words = ("grinning face", "rocket", "red heart", "flag: Japan")
    pictures = [pipe(word, latents=latents, num_inference_steps=8).pixels_BCHW for word in words]
    differences = [float((a - b).abs().mean()) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(differences) > 0.05
