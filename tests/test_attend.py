"""`gaze attend`: what it writes, what stands in it, how it fails, and its page in a real browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffusion.files import replacing
from pipelines import TextToImage
from pipelines.attention_page import MOST_FRAMES, Entry, render
from pipelines.overlays import CONES_TO_RGB, LAB_TO_CONES, legend, levels, overlay, ramp
from pipelines.png import read_settings
from tests.train.test_report import Page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'"
OPTIONS = ("--steps", 3, "--seed", 1)


def test_what_is_written(gaze, model):
    code, out, err = gaze("attend", "red cat, red dog", "--model", model, *OPTIONS, "--pixel", "3,20", "-o", "out")
    assert (code, err) == (0, "")
    first, *others = out.splitlines()
    assert re.fullmatch(r"out/index\.html  seed 1  [\d.]+ s", first)
    names = [line.split("  ")[0] for line in (first, *others)]
    overlays = ["word-1-red.png", "word-2-cat.png", "word-3.png", "word-4-red.png", "word-5-dog.png", "pixel-3-20.png"]
    assert names == [
        f"out/{name}" for name in ("index.html", "picture.png", "sheet.png", "maps.safetensors", *overlays)
    ]
    assert sorted(names) == sorted(str(path) for path in Path("out").iterdir())
    for name in ("picture.png", *overlays):
        with Image.open(f"out/{name}") as image:
            assert image.size == (32, 32)
    gaze("generate", "red cat, red dog", "--model", model, *OPTIONS, "-o", "alone.png")
    assert Path("alone.png").read_bytes() == Path("out/picture.png").read_bytes()
    assert "word_maps" not in read_settings("out/picture.png")


def test_the_arrays_say_what_they_are(gaze, model, pipe):
    code, out, _ = gaze(
        "attend", "red cat", "--model", model, *OPTIONS, "--record-steps", "1,3", "--heads", "2", "--layers", "up_*",
        "--pixel", "3,20", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    maps, pixels = (
        getattr(
            pipe(
                "red cat", num_inference_steps=3, seed=1, word_maps=True, pixel_maps=[(3, 20)], map_each_step=True,
                map_steps=[1, 3], map_heads=[2], map_layers=["up_*"],
            ),
            kind,
        )[0]
        for kind in ("word_maps", "pixel_maps")
    )  # fmt: skip
    with safe_open(report["arrays"], "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["words"] == list(maps.words)
    assert (metadata["steps"], metadata["pixels"]) == ([1, 3], [[3, 20]])
    assert metadata["settings"] == report["settings"] == read_settings(report["picture"])
    expected = {
        "maps": maps.maps, "steps": maps.held_TWHW, "pixel_maps": pixels.maps, "pixel_steps": pixels.held_TWHW,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = report["overlays"]
    assert [row["name"] for row in rows] == ["red", "cat", "pixel 3,20"]
    largest = torch.cat([maps.held_WHW[:2], pixels.held_WHW]).amax((1, 2)).tolist()
    assert [row["most"] for row in rows] == pytest.approx(largest)


def test_words_can_be_chosen(gaze, model):
    gaze("attend", "red cat, red dog", "--model", model, *OPTIONS, "--words", "dog, RED,<end>", "-o", "out")
    assert sorted(path.name for path in Path("out").glob("word-*")) == [
        "word-1-red.png", "word-4-red.png", "word-5-dog.png", "word-7-end.png",
    ]  # fmt: skip
    code, _, err = gaze("attend", "", "--model", model, *OPTIONS, "-o", "out")  # in the place of the earlier one
    assert (code, err) == (0, "")
    assert sorted(path.name for path in Path("out").glob("word-*")) == [
        "word-1-start.png", "word-2-end.png", "word-3-padding.png",
    ]  # fmt: skip


def test_any_text_is_a_prompt(gaze, model):
    prompt = "cat \udcff <u>\x1b[31m \u202e"
    code, out, err = gaze("attend", prompt, "--model", model, "--steps", 1, "--seed", 1, "-o", "out")
    assert (code, err) == (0, "")
    assert out.replace("\n", "").isprintable()
    assert "<u>" not in Path("out/index.html").read_text()
    assert read_settings("out/picture.png")["prompt"] == prompt


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["red cat", "--words", "car"], "'car' is not a word of this prompt, whose words are 'red', 'cat'"),
        (["", "--words", "car"], "which has no words"),
        (["red cat", "--layers", "up_blocks.7.*"], "no attention is named 'up_blocks.7.*'"),
        (["red cat", "--record-steps", "2:4"], "map_steps has step 4, but this run has 3"),
        (["red cat", "--heads", "5"], "map_heads has head 5"),
        (["red cat", "--pixel", "32,1"], "x of a pixel is 32"),
        (["red cat", "-o", "taken"], "'taken/novel.txt' would be lost"),
        (["red cat", "-o", "."], "'.' is the folder that you are in"),
        (["red cat", "-o", "file/out"], "cannot be written"),
        (["red cat", "-o", "file"], "file is a file; it is not overwritten"),
        (["red cat", "-o", "earlier"], "'earlier/edit.png' would be lost"),
    ],
)
def test_what_cannot_be_done_writes_nothing(gaze, model, tmp_path, arguments, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "novel.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "earlier").mkdir()
    for name in ("maps.safetensors", "index.html", "edit.png"):
        (tmp_path / "earlier" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = gaze("attend", *arguments, "--model", model, *OPTIONS)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["cat", "--pixel", "3"],
        ["cat", "--record-steps", "2-4"],
        ["cat", "--record-steps", "1,3:2"],
        ["cat", "--heads", ""],
        [],
    ],
)
def test_wrong_usage(gaze, model, arguments):
    code, out, err = gaze("attend", *arguments, "--model", model)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_an_error_while_drawing_leaves_what_was_there(tmp_path):
    def fail(folder):
        with replacing(folder, ("maps.safetensors",), "maps") as aside:
            (aside / "maps.safetensors").touch()
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "maps.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out")
    assert (tmp_path / "out" / "maps.safetensors").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with replacing(tmp_path / "link") as aside:
        (aside / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


# Colours


def test_the_ramp_is_even_in_lightness():
    """Back from sRGB to OKLab's lightness, which rises by the same amount from colour to colour."""
    encoded_N3 = ramp() / 255
    linear_N3 = np.where(encoded_N3 <= 0.04045, encoded_N3 / 12.92, ((encoded_N3 + 0.055) / 1.055) ** 2.4)
    lab_N3 = np.cbrt(linear_N3 @ np.linalg.inv(CONES_TO_RGB).T) @ np.linalg.inv(LAB_TO_CONES).T
    lightness_N = lab_N3[:, 0]
    assert np.abs(lightness_N - np.linspace(lightness_N[0], lightness_N[-1], 256)).max() < 0.01
    assert lightness_N[0] < 0.2
    assert lightness_N[-1] > 0.9
    steps_N = np.linalg.norm(np.diff(lab_N3, axis=0), axis=1)
    assert steps_N.max() < 0.02  # no edge that is not in the map


def test_a_map_is_scaled_to_its_own_most():
    map_HW = torch.tensor([[0.0, 0.1], [0.2, 0.05]])
    assert levels(map_HW).tolist() == [[0, 128], [255, 64]]
    assert not levels(torch.zeros(2, 2)).any()


def test_an_overlay_keeps_the_place():
    map_HW = torch.zeros(32, 48)
    map_HW[4:8, 30:40] = 0.01
    drawn = np.asarray(overlay(Image.new("RGB", (48, 32), (200, 0, 0)), map_HW)).astype(int)
    assert drawn[5, 35].sum() > 2 * drawn[20, 10].sum()
    assert (drawn == drawn[20, 10]).all(axis=-1).sum() == 32 * 48 - 40
    marked = np.asarray(overlay(Image.new("RGB", (48, 32)), torch.zeros(32, 48), (10, 20)))
    changed = np.argwhere((marked != marked[0, 0]).any(axis=-1))
    assert changed.mean(axis=0) == pytest.approx([20, 10])
    assert legend((20, 10)).size == (20, 10)


# The page


def entries(steps, words=("red", HOSTILE)):
    frames_THW = torch.rand(steps + 1, 4, 6, generator=torch.Generator().manual_seed(0)) / 2
    return [
        *(Entry(word, "word", frames_THW * (1 + number)) for number, word in enumerate(words)),
        Entry("<start>", "special", frames_THW / 3),
        Entry("3, 4", "pixel", frames_THW / 9, (0.25, 0.75)),
    ]


def test_the_page_asks_for_nothing_and_nothing_of_a_prompt_acts_in_it():
    text = render(HOSTILE, [HOSTILE, "b"], Image.new("RGB", (24, 16)), entries(3), [1, 2, 3])
    page = Page(text)
    assert len(page.all("script")) == 1
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "base", "form"})
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("href", "action", "srcset") for name in attributes), tag
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy
    for part in (*page.texts["script"], *page.texts["style"]):
        assert not re.search(r"https?:|url\(|@import|fetch|innerHTML", part)
    assert [button["data-name"] for button in page.all("button")] == ["red", HOSTILE, "<start>", "3, 4"]
    assert page.texts["h1"] == [HOSTILE]
    assert page.texts["bdi"] == ["red", HOSTILE, "<start>", "3, 4"]
    assert page.texts["h2"] == ["Words", "Special tokens", "Pixels"]


def test_of_many_steps_some_are_shown():
    page = Page(render("a", [], Image.new("RGB", (24, 16)), entries(200)[:1], range(1, 201)))
    frames = page.all("input")[0]["data-frames"].split()
    assert (frames[0], frames[1], frames[-1], len(frames)) == ("0", "1", "200", MOST_FRAMES + 1)
    assert len(page.all("button")[0]["data-most"].split()) == len(frames)
    alone = Page(render("a", [], Image.new("RGB", (24, 16)), entries(0)[:1], []))
    assert alone.all("input")[0]["max"] == "0"


PROBE = """<script>addEventListener("load", () => {
  const canvas = document.querySelector("canvas"), slider = document.querySelector("#step");
  const buttons = [...document.querySelectorAll("button")], said = document.querySelector("#said"), told = {};
  const lit = () => document.querySelector(".stage").classList.contains("lit");
  const colours = () => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return lit() ? data.reduce((sum, value, at) => (sum * 31 + value * (at % 997)) % 1000003, 7) : "plain";
  };
  const go = (number, type, more = {}) =>
    buttons[number].dispatchEvent(new PointerEvent(type, { pointerType: "mouse", ...more }));
  told.before = colours();
  go(0, "pointerenter"); told.red = colours(); told.redSaid = said.textContent;
  go(0, "pointerleave"); told.left = colours();
  go(1, "pointerenter"); told.cat = colours();
  slider.value = 2; slider.dispatchEvent(new Event("input"));
  told.catLater = colours(); told.when = document.querySelector("#when").textContent;
  go(1, "pointerleave");
  go(0, "pointerenter", { pointerType: "touch" }); told.touched = colours();
  buttons[1].click(); told.tapped = colours(); told.pressed = buttons.map(button => button.ariaPressed).join();
  buttons[1].click(); told.again = colours();
  buttons[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
  told.focused = document.activeElement.dataset.name;
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  const area = document.querySelector(".stage").getBoundingClientRect();
  document.querySelector(".stage").dispatchEvent(
    new PointerEvent("pointermove", { clientX: area.left + area.width / 2, clientY: area.top + area.height / 2 }));
  told.here = document.querySelector("#here").textContent;
  document.title = JSON.stringify(told);
});</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_lights_a_word_and_walks_through_the_steps(gaze, model, tmp_path):
    gaze("attend", "red cat", "--model", model, *OPTIONS, "-o", "out")
    page = tmp_path / "out" / "index.html"
    page.write_text(page.read_text().replace("</body>", PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    told = json.loads(unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
    assert told["before"] == told["left"] == told["touched"] == told["again"] == "plain"
    assert len({told["red"], told["cat"], told["catLater"], "plain"}) == 4
    assert told["tapped"] == told["catLater"]
    assert told["pressed"] == "false,true,false,false,false"
    assert told["when"] == "step 2"
    assert told["focused"] == "<padding>"
    maps = TextToImage.from_pretrained(model)("red cat", num_inference_steps=3, seed=1, word_maps=True).word_maps[0]
    most, mean = (100 * float(value) for value in (maps.held_WHW[0].max(), maps.held_WHW[0].mean()))
    assert [float(value) for value in re.findall(r"([\d.]+) %", told["redSaid"])] == pytest.approx(
        [most, mean], rel=0.06
    )
    middle = 100 * maps.held_WHW[:2, 8, 8]
    names = [("red", "cat")[number] for number in middle.argsort(descending=True)]
    found = re.fullmatch(r"Here: \u2068(\w+)\u2069 ([\d.]+) %, \u2068(\w+)\u2069 ([\d.]+) %", told["here"])
    assert [found[1], found[3]] == names
    assert [float(found[2]), float(found[4])] == pytest.approx(middle.sort(descending=True).values.tolist(), rel=0.06)
