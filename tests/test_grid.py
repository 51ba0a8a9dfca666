"""`gaze grid`: axes, labels, cells of any size, and errors before anything is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.errors import GazeError
from pipelines.axes import MOST_CELLS, Axis, cells, read_axis, split
from pipelines.png import read_settings
from pipelines.sheet import table


def places(sheet, colours):
    """Left, top, right and bottom of each colour on a sheet."""
    found = np.asarray(sheet)
    for colour in colours:
        rows, columns = np.nonzero((found == colour).all(2))
        yield columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_three_axes_of_pictures_each_as_it_is_made_alone(gaze, model):
    common = ["--model", model, "--steps", 2, "--seed", 3]
    axes = ["--x", "steps=1,2", "--y", "scheduler=euler;ddim:eta=0,timestep_spacing=trailing", "--z", "size=32,32x64"]
    code, out, err = gaze("grid", "cat", *axes, *common, "-o", "sheet.png", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["sheet"] == "sheet.png"
    assert report["grid"]["x"] == {"name": "steps", "values": ["1", "2"]}
    inside = read_settings("sheet.png")
    assert inside["grid"] == report["grid"]
    assert [(p["height"], p["scheduler"], p["num_inference_steps"]) for p in inside["pictures"]] == [
        (height, scheduler, steps)
        for height in (32, 64)
        for scheduler in ("euler", "ddim:eta=0,timestep_spacing=trailing")
        for steps in (1, 2)
    ]
    gaze("generate", "cat", *common, "--scheduler", "euler", "--size", "32x64", "-o", "alone.png")
    with Image.open("sheet.png") as sheet, Image.open("alone.png") as alone:
        drawn = np.asarray(sheet.convert("RGB"))
        cell = np.asarray(alone.resize((128, 256), Image.Resampling.BICUBIC))  # enlarged four times
    windows = np.lib.stride_tricks.sliding_window_view(drawn[:, :, 0], (1, 128))[:, :, 0]
    tops = [top for top, left in np.argwhere((windows == cell[0, :, 0]).all(2))
            if (drawn[top : top + 256, left : left + 128] == cell).all()]  # fmt: skip
    assert len(tops) == 1


def test_the_sheet_of_a_grid_can_be_anywhere_and_like_a_picture(gaze, model):
    gaze("generate", "a red cat", "--model", model, "--steps", 1, "--seed", 7, "-o", "a.png")
    code, out, _ = gaze("grid", "--like", "a.png", "--y", "replace=red,blue", "-o", "deep/sheet")
    assert (code, out.split("  ")[:2]) == (0, ["deep/sheet.png", "seeds 7 to 7"])
    pictures = read_settings("deep/sheet.png")["pictures"]
    assert [picture["prompt"] for picture in pictures] == ["a red cat", "a blue cat"]
    assert pictures[0] == read_settings("a.png")


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["cat", "--x", "stepz=1"], 1, ["'stepz'", "did you mean 'steps'?"]),
        (["cat", "--x", "steps"], 1, ["steps=VALUE,VALUE"]),
        (["cat", "--x", "steps=1,two"], 1, ["steps cannot be 'two'", "whole number"]),
        (["cat", "--x", "steps=2,0"], 1, ["steps 0: ", "at least 1"]),
        (["cat", "--x", "steps=1", "--y", "scheduler=euler,eular"], 1, ["scheduler eular, steps 1: ", "'euler'"]),
        (["cat", "--x", "size=32,33"], 1, ["size 33: ", "32 or 34"]),
        (["cat", "--x", "size=big"], 1, ["size: 'big' is not a size"]),
        (["cat", "--x", "apg=maybe"], 1, ["apg cannot be 'maybe'", "on or off"]),
        (["cat", "--x", "cfg=nan"], 1, ["cfg nan: ", "guidance"]),
        (["cat", "--x", "replace=dog,cat"], 1, ["'cat' does not hold 'dog'"]),
        (["cat", "--x", 'prompt="a'], 1, ["not closed"]),
        (["cat", "--x", "seed=1", "--y", "seed=2"], 1, ["two axes vary seed"]),
        (["cat", "--x", "seed=" + ",".join(map(str, range(1001)))], 1, ["1001 cells", "at most 1000"]),
        (["cat", "--x", "seed=1", "-o", "a.jpg"], 1, ["a.png"]),
        (["cat"], 2, ["--x"]),
        (["--x", "seed=1"], 2, ["no prompt"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_errors_come_before_the_first_picture(gaze, model, arguments, code, says, monkeypatch):
    monkeypatch.setattr("pipelines.text_to_image.TextToImage.steps", lambda *_, **__: pytest.fail("drawn"))
    found, out, err = gaze("grid", *arguments, "--model", model)
    assert (found, out) == (code, "")
    assert "Traceback" not in err
    for words in says:
        assert words in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "text, values",
    [
        ("1,2, 3", ["1", "2", "3"]),
        ("a, b;c", ["a, b", "c"]),
        ('"a, b",c;', ["a, b,c", ""]),
        ('"a, ""b""; c",d', ['a, "b"; c', "d"]),
        ("", [""]),
        (",blurry", ["", "blurry"]),
    ],
)
def test_values(text, values):
    assert split(text) == values


@settings(deadline=None)
@given(st.lists(st.text(max_size=8).map(str.strip), min_size=2, max_size=5))
def test_quoted_values_come_back(values):
    quoted = ['"' + value.replace('"', '""') + '"' for value in values]
    for separator in ",;":
        assert split(separator.join(quoted)) == [value.strip() for value in values]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_axis_is_read_or_a_clear_error(text):
    for name in ("steps", "size", "replace", "prompt", "apg", "guidance-interval"):
        try:
            assert isinstance(read_axis(f"{name}={text}"), Axis)
        except GazeError as error:
            assert len(str(error)) < 500  # noqa: PT017


def test_words_are_replaced_in_whole_prompts():
    made = cells({"seed": 0}, [read_axis("replace=cat,dog"), read_axis("prompt=a cat,cat cat")])
    assert [cell["prompt"] for cell in made] == ["a cat", "cat cat", "a dog", "dog dog"]
    assert len(cells({}, [Axis("seed", ["0"] * 40), Axis("cfg", ["1"] * 25)])) == MOST_CELLS


def test_labels_and_pictures_of_all_sizes_do_not_overlap():
    sizes = [(8, 8), (16, 4), (4, 16), (8, 8), (12, 12), (2, 2), (5, 5), (7, 3)]
    colours = [(200, 20 * index, 5) for index in range(8)]
    images = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    sheet = table(images, ["left", "x" * 300], ["a long label of the row", "b"], ["first", "second"])
    boxes = list(places(sheet, colours))
    for (left, top, right, bottom), (width, height) in zip(boxes, sizes, strict=True):
        assert (right - left, bottom - top) == (width * 8, height * 8)
    for index, (left, top, _, _) in enumerate(boxes):
        assert left == boxes[index % 2][0]
        assert top == boxes[index - index % 2][1]
    assert all(below[1] >= above[3] for above, below in zip(boxes, boxes[2:], strict=False))
    # What is not a picture is label or white: no label's grey inside a box, and some above and to the left of each.
    red, green, blue = np.moveaxis(np.asarray(sheet), 2, 0)
    dark = (red == green) & (green == blue) & (red < 200)
    assert not any(dark[top:bottom, left:right].any() for left, top, right, bottom in boxes)
    assert dark[: boxes[0][1], boxes[0][0] :].any()
    assert dark[boxes[0][1] : boxes[0][3], : boxes[0][0]].any()
    bare = table(images[:2], ["", ""], [""], [""])
    assert next(places(bare, colours))[:2] == (6, 6)
