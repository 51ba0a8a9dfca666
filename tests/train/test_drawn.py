"""Folders of the shapes world: what stands in them, and that the trainer's readers take them."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.shapes.captions import caption
from pipelines.shapes.world import SKILLS, draw, masks, scene
from tests.train.tiny import run_here, tiny_recipe
from train.data.command import main
from train.data.drawn import build_shapes, draw_folder
from train.data.folder import Folder
from train.data.look import look


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def levels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_drawn_pictures_are_single_objects_of_a_stated_colour(tmp_path):
    first, again, other = (draw_folder(tmp_path / name, 5, 16, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (first / "metadata.jsonl").read_text() != (other / "metadata.jsonl").read_text()
    assert {row["facts"]["skill"] for row in rows(first)} == {"colours"}
    assert levels(first / "00000.png").shape == (16, 16, 3)
    source, skipped = look(Folder(first))
    assert (len(source), skipped) == (5, [])


@pytest.mark.parametrize("split", ["seen", "heldout"])
def test_the_command_writes_the_scenes_of_a_split(tmp_path, capsys, split):
    words = ["shapes", str(tmp_path), "--count", "12", "--seed", "3", "--split", split]
    assert main(words) == 0
    assert capsys.readouterr().out == f"12 pictures in {tmp_path}\n"
    source, _ = look(Folder(tmp_path))
    for index, row in enumerate(rows(tmp_path)):
        expected = scene(3, index, split)
        assert row == {"file_name": f"{index:05d}.png", "text": caption(expected), "facts": expected.facts}
        assert np.array_equal(levels(tmp_path / row["file_name"]), np.asarray(draw(expected)))
        assert source[index].captions == (row["text"],)
    assert [row["facts"]["skill"] for row in rows(tmp_path)] == [*SKILLS] * 2


def test_masks_are_numbered_objects_and_words_know_theirs(tmp_path):
    build_shapes(tmp_path, 12, size=128, with_masks=True)
    for index, row in enumerate(rows(tmp_path)):
        expected, numbers_HW = scene(0, index), levels(tmp_path / row["masks"])
        assert numbers_HW.shape == (128, 128)
        assert len(row["objects"]) == len(expected.objects) == numbers_HW.max()
        for number, (said, found) in enumerate(zip(row["objects"], expected.objects, strict=True)):
            assert np.array_equal(numbers_HW == number + 1, masks(expected, 128)[number])
            assert (said["shape"], said["colour"], said["size"]) == (found.shape, found.colour, found.size)
            assert tuple(said["box"]) == found.box
        assert " ".join(word["text"] for word in row["words"]) == row["text"]
    assert len(look(Folder(tmp_path))[0]) == 12  # the masks are not among the pictures


@pytest.mark.parametrize(
    "words, says",
    [
        (["--count", "0"], "0 pictures of 64 pixels"),
        (["--count", "5", "--size", "0"], "5 pictures of 0 pixels"),
        (["--count", "5", "--split", "held"], "did you mean 'heldout'"),
        (["--count", "5", "--seed", "-1"], "the scenes that a model is scored on"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(tmp_path, words, says):
    with pytest.raises(GazeError, match=says):
        main(["shapes", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_keeps_its_pictures(tmp_path, monkeypatch):
    """Another version of the world would draw others."""
    recipe = tiny_recipe(tmp_path, None, data={"drawn": 8}, pictures=16)
    run_here(recipe)
    monkeypatch.setattr("train.run.draw_folder", None)
    run_here(recipe)


def test_what_is_in_the_folder_stays(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("mine")
    with pytest.raises(GazeError, match="holds something already"):
        build_shapes(tmp_path, 1)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("metadata.jsonl", "mine")]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GazeError, match="cannot write the folder"):
        build_shapes(tmp_path / "file" / "out", 1)
