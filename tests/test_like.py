"""`gaze info PNG` and `gaze generate --like PNG`: the same picture again, to the bit, in another process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from pipelines import TextToImage
from pipelines.batch import request
from pipelines.options import lora_of
from pipelines.png import read_settings, save_png
from pipelines.recall import TYPES, recall
from pipelines.text_to_image import Request
from tests.random_lora import flat, random_lora

ROOT = Path(__file__).resolve().parent.parent
# Every setting, by the options that ask for it.
ASKED = {
    "plain": ["a red cat"],
    "own_options": ["cat", "--scheduler", "ddim:eta=0.5,steps_offset=1", "--spacing", "trailing"],
    "adds_noise": ["cat", "--scheduler", "dpmpp_2m_sde", "--spacing", "karras"],
    "ancestral": ["cat", "--scheduler", "euler_ancestral", "--negative-prompt", "a dog, (red:1.3)"],
    "init": ["cat", "--init", "start.png", "--strength", "0.7", "--scheduler", "euler_ancestral"],
    "mask": ["cat", "--init", "start.png", "--mask", "paint.png"],
    "lora": ["cat", "--lora", "a.safetensors:0.5", "--lora", "b.safetensors"],
    "churn": ["cat", "--scheduler", "euler:s_churn=10"],
    "diffusers": ["cat", "--scheduler", "deis:solver_order=3"],
    "diffusers_noise": ["cat", "--scheduler", "ddpm", "--size", "48x32"],
    "rescale": ["cat", "--guidance-rescale", "0.7", "--cfg", "9.25"],
    "interval": ["cat", "--guidance-interval", "0.3:", "--cfg", "3"],
    "weighting": ["a (red:1.5) cat", "--weighting", "attention"],
    "excite": ["a red cat", "--excite", "cat", "--excite", "red"],
    "apg": ["cat", "--apg", "--prediction-type", "v_prediction"],
    "bfloat16": ["cat", "--dtype", "bfloat16", "--offload"],
    "tiles": ["cat", "--size", "64x48", "--tile", "32"],
    "unguided": ["(cat:0.3) \\( [dog]\nBREAK red", "--cfg", "1", "--size", "16x32"],
    "odd": ["Steps: 1, \udc80 \"炎\"\0\nNegative prompt: x", "--scheduler", "heun"],
}  # fmt: skip
BATCH = ["cat", "dog", "a red dog " * 12, "", "red", "cat", "d", "e"]
AGAIN = """
import sys
from pipelines.__main__ import app
for name in sys.argv[1:]:
    sys.argv = ["gaze", "generate", "--like", name + ".png", "-o", "again-" + name + ".png"]
    app(standalone_mode=False)
"""


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


def test_every_setting_is_repeated_to_the_bit_in_another_process(gaze, model):
    common = ["--model", model, "--steps", 3]
    Image.effect_noise((32, 32), 90).convert("RGB").save("start.png")
    Image.linear_gradient("L").resize((32, 32)).point(lambda level: 255 * (level > 99)).save("paint.png")
    networks = load_model(model).modules
    networks.pop("vae")
    for seed, name in enumerate("ab"):
        save_file(flat(random_lora(networks, seed)), f"{name}.safetensors")
    for name, words in ASKED.items():
        assert gaze("generate", *words, *common, "-o", f"{name}.png")[0] == 0
    assert gaze("generate", *BATCH, *common, "--batch-size", 8, "-o", "batch-{i}.png")[0] == 0
    names = [*ASKED, *(f"batch-{i}" for i in range(len(BATCH)))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-W", "ignore", "-c", AGAIN, *names]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len({pixels(f"{name}.png") for name in names}) == len(names)
    for name in names:
        assert read_settings(f"again-{name}.png") == read_settings(f"{name}.png"), name
        assert pixels(f"again-{name}.png") == pixels(f"{name}.png"), name


@pytest.mark.parametrize(
    "text, path, weight", [("a:0.5", "a", 0.5), ("a", "a", 1), ("c:/a:b", "c:/a:b", 1), (":1", ":1", 1)]
)
def test_the_weight_of_a_lora(text, path, weight):
    assert lora_of(text) == {"path": path, "weight": weight}


def test_what_is_given_beside_it_replaces_it(gaze, model):
    gaze("generate", "cat", "--model", model, "--steps", 2, "--seed", 4, "--apg", "--size", "16x32", "-o", "a.png")
    first = read_settings("a.png")
    assert gaze("generate", "dog", "--like", "a.png", "--seed", 0, "--no-apg", "-n", 2, "-o", "b.png")[0] == 0
    changed = {name: value for name, value in first.items() if name != "projected_guidance"}
    assert read_settings("b-1.png") == changed | {"prompt": "dog", "seed": 1}
    assert gaze("generate", "--like", "a.png", "-n", 2, "--size", 32, "--steps", 1, "-o", "c.png")[0] == 0
    assert read_settings("c-1.png") == first | {"seed": 5, "width": 32, "height": 32, "num_inference_steps": 1}
    gaze("generate", "cat", "--model", model, "--steps", 2, "--seed", 5, "--apg", "--size", "16x32", "-o", "d.png")
    assert gaze("generate", "--like", "a.png", "-n", 2, "-o", "e.png")[0] == 0
    assert [pixels("e-0.png"), pixels("e-1.png")] == [pixels("a.png"), pixels("d.png")]


def test_files_that_it_was_drawn_from_are_found_again_unchanged(gaze, model):
    Image.effect_noise((32, 32), 90).convert("RGB").save("start.png")
    networks = load_model(model).modules
    networks.pop("vae")
    save_file(flat(random_lora(networks, 0)), "a.safetensors")
    words = ["cat", "--model", model, "--steps", 3, "--init", "start.png", "--lora", "a.safetensors:0.5", "-o", "a.png"]
    assert gaze("generate", *words)[0] == 0
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    assert gaze("generate", "--like", "../a.png", "-o", "b.png")[0] == 0
    os.chdir("..")
    assert pixels("elsewhere/b.png") == pixels("a.png")
    for file, option in (("start.png", "--init"), ("a.safetensors", "--lora")):
        whole = Path(file).read_bytes()
        Path(file).write_bytes(whole + b"x")
        code, _, err = gaze("generate", "--like", "a.png", "-o", "c.png")
        assert (code, f"than '{file}' is now" in err, option in err) == (1, file == "start.png", True)
        Path(file).unlink()
        assert "cannot be read" in gaze("generate", "--like", "a.png", "-o", "c.png")[2]
        Path(file).write_bytes(whole)
    Image.new("RGB", (32, 32)).save("start.png")
    assert gaze("generate", "--like", "a.png", "--init", "start.png", "-o", "c.png")[0] == 0
    assert pixels("c.png") != pixels("a.png")


def test_a_picture_of_the_web_ui(gaze, model):
    info = PngImagePlugin.PngInfo()
    line = "Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 9, Size: 32x16, Model: v1-5, Clip skip: 2"
    info.add_text("parameters", f"a red cat\nNegative prompt: dog\n{line}")
    Image.new("RGB", (32, 16)).save("theirs.png", pnginfo=info)
    code, out, err = gaze("info", "theirs.png")
    assert code == 0
    assert [row.split() for row in out.splitlines()][:3] == [
        ["prompt", "a", "red", "cat"], ["negative_prompt", "dog"], ["scheduler", "dpmpp_2m"]
    ]  # fmt: skip
    assert err == "warning: without a counterpart here: Model: v1-5; Clip skip: 2\n"
    code, _, err = gaze("generate", "--like", "theirs.png", "--model", model, "-o", "ours.png")
    assert code == 0
    assert "Clip skip: 2" in err
    wanted = json.loads(gaze("info", "theirs.png", "--json")[1])
    assert read_settings("ours.png") == wanted | {"model": model}


def test_info_prints_what_is_inside(gaze, model):
    gaze("generate", "a\nb", "c", "--model", model, "--steps", 1, "--seed", 0, "-o", "a.png", "--sheet", "s.png")
    code, out, err = gaze("info", "a-0.png")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert (lines["prompt"], lines["seed"], lines["model"]) == ('"a\\nb"', "0", model)
    assert json.loads(gaze("info", "a-0.png", "--json")[1]) == read_settings("a-0.png")
    code, out, _ = gaze("info", "s.png")
    assert (code, out.count("\nseed "), out.count("\n\n")) == (0, 2, 2)
    assert len(json.loads(gaze("info", "s.png", "--json")[1])["pictures"]) == 2


@pytest.mark.parametrize("command", ["info", "generate --like", "grid cat --x seed=1 --like"])
def test_a_png_that_says_nothing_is_a_clear_error(gaze, command):
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("cut.png").write_bytes(Path("plain.png").read_bytes()[:-10])
    Path("text.png").write_text("cat")
    Path("folder.png").mkdir()
    for name, says in [
        ("plain.png", "no gaze settings"),
        ("cut.png", "cut off"),
        ("text.png", "does not begin like one"),
        ("none.png", "no such file"),
        ("folder.png", "no such file"),
        ("/dev/zero", "no such file"),
    ]:
        code, out, err = gaze(*command.split(), name)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {name}")
        assert says in err
        assert "try: " in err
    assert not list(Path().glob("*.tmp"))


def test_a_sheet_and_a_missing_model_are_named(gaze, model):
    save_png(Image.new("RGB", (8, 8)), "sheet.png", {"pictures": [{}] * 3})
    assert "sheet of 3 pictures" in gaze("generate", "--like", "sheet.png")[2]
    save_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "cat", "model": "/gone/model", "num_inference_steps": 1})
    code, _, err = gaze("generate", "--like", "a.png", "-o", "b.png")
    assert (code, "'/gone/model', which is not here" in err, "--model PATH" in err) == (1, True, True)
    assert gaze("generate", "--like", "a.png", "-o", "b.png", "--model", model)[0] == 0
    save_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "cat", "guidance_interval": [{}, 1]})
    assert "guidance_interval" in gaze("generate", "--like", "a.png", "--model", model)[2]


def test_a_model_of_the_hub_is_taken_again_from_the_cache_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = []
    monkeypatch.setattr("diffusion.hub._cached", lambda repo, *_: Path("cache") if repo in cached else None)
    monkeypatch.setattr("diffusion.hub._fetched", lambda *_: pytest.fail("nobody asked for a download"))
    for model in ("owner/name", "owner/name@v1.5"):
        save_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "cat", "model": model})
        with pytest.raises(GazeError, match=f"'{model}', which is not here"):
            recall("a.png", {})
    cached.append("owner/name")
    assert recall("a.png", {}) == {"prompt": "cat", "model": "owner/name@v1.5"}
    save_png(Image.new("RGB", (8, 8)), "a.png", {"prompt": "cat", "model": "owner/gone.safetensors"})
    with pytest.raises(GazeError, match=r"'owner/gone.safetensors', which is not here"):
        recall("a.png", {})


NUMBERS = st.integers(-3, 60) | st.integers(-3, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
OF_TYPE = {
    str: st.text(max_size=5) | st.sampled_from(["euler", "ddim:eta=9", "dpmpp_2m:x=1", ":", "karras", "/dev/null"]),
    int: st.integers(-3, 60) | st.integers(-3, 2**70),
    bool: st.booleans(),
    list: st.lists(NUMBERS | st.none() | st.text(max_size=2) | st.lists(st.none(), max_size=1), max_size=3),
}
ANY = {name: OF_TYPE.get(kind, NUMBERS) for name, kind in TYPES.items()}


@settings(max_examples=150, deadline=None)
@given(
    values=st.fixed_dictionaries({}, optional=ANY)
    | st.dictionaries(st.sampled_from([*TYPES]), st.one_of(*ANY.values()))
)
def test_whatever_a_stranger_wrote_is_planned_or_a_clear_error(model, tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "stranger.png"
    save_png(Image.new("RGB", (2, 2)), path, values)
    try:
        found = {"prompt": "cat", **recall(str(path), {"model": model})}
        pipe_of(model).plan(Request(**request(found)))
    except GazeError as error:
        assert 0 < len(str(error)) < 2000  # noqa: PT017


@functools.cache
def pipe_of(model):
    return TextToImage.from_pretrained(model)
