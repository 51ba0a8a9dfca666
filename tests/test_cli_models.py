"""`gaze convert`, `gaze inspect` and `gaze generate --model FILE` from the outside."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from pipelines.png import read_settings
from tests.narrow_models import narrow_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    narrow_pipeline("sd2").save_pretrained(folder)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def test_to_a_file_and_back_and_drawn(gaze, model):
    assert gaze("convert", model, "a.safetensors") == (0, "a.safetensors  Stable Diffusion 2.x, v_prediction\n", "")
    code, out, _ = gaze("convert", "a.safetensors", "b", "--tokenizer", model, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert json.loads(out)["prediction_type"] == "v_prediction"
    assert {str(value.dtype) for value in load_file("b/unet/diffusion_pytorch_model.safetensors").values()} == {
        "torch.bfloat16"
    }
    common = ["generate", "red dog", "--steps", 1, "--size", 32, "--seed", 0]
    assert gaze(*common, "--model", "a.safetensors", "--tokenizer", model, "-o", "a.png")[0] == 0
    shutil.copytree(model / "tokenizer", "tokenizer")
    assert gaze(*common, "--model", "a.safetensors", "-o", "b.png")[0] == 0
    assert gaze(*common, "--model", "a.safetensors", "-o", "c.png", "--prediction-type", "epsilon")[0] == 0
    assert read_settings("a.png") == read_settings("b.png") | {"tokenizer": str(model)}
    assert read_settings("c.png") == read_settings("b.png") | {"prediction_type": "epsilon"}
    assert pixels("a.png") == pixels("b.png") != pixels("c.png")


def test_inspect_prints_what_a_model_is(gaze, model):
    code, out, _ = gaze("inspect", model, "--size", "64x32", "--json")
    report = json.loads(out)
    assert (code, report["width"], report["height"]) == (0, 64, 32)
    code, out, _ = gaze("inspect", model)
    assert code == 0
    for word in ("v_prediction", "StableDiffusionPipeline", "parameters", "GFLOP", "MiB", "32x32"):
        assert word in out
    assert "DownBlock" not in out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["convert", "nowhere", "x.safetensors"], "'nowhere' does not exist"),
        (["convert", "model.ckpt", "folder"], "a pickle, which can run code"),
        (["inspect", "model.ckpt"], "a pickle, which can run code"),
        (["inspect", "nowhere"], "'nowhere' does not exist"),
        (["generate", "cat", "--model", "model.ckpt"], "docs/models.md"),
        (["benchmark", "--model", "model.ckpt"], "gaze convert model.ckpt FOLDER"),
    ],
    ids=" ".join,
)
def test_bad_input_is_a_clear_error(gaze, arguments, says):
    Path("model.ckpt").write_bytes(b"PK\x03\x04")
    code, out, err = gaze(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err
    assert len(err.splitlines()) <= 4
    assert [path.name for path in Path().iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("command", [["convert", "MODEL", "a.safetensors"], ["generate", "cat", "--model", "MODEL"]])
def test_an_unknown_dtype_is_named(gaze, model, command):
    code, _, err = gaze(*(str(model) if word == "MODEL" else word for word in command), "--dtype", "int8")
    assert code == 1
    assert "'int8'" in err
    assert "float16" in err
