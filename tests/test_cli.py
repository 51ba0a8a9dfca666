"""The `gaze` command from the outside: what it prints, what it writes, how it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pipelines.files import plan_paths, slug
from pipelines.png import read_settings

ROOT = Path(__file__).resolve().parent.parent


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_picture_with_its_settings_inside(gaze, model):
    code, out, err = gaze("generate", "a red cat", "--model", model, "--seed", 0, "--steps", 2, "-o", "cat.png")
    assert (code, err) == (0, "")
    path, seed, seconds = out.strip().split("  ")
    assert (path, seed) == ("cat.png", "seed 0")
    assert float(seconds.removesuffix(" s")) > 0
    assert len(pixels("cat.png")) == 32 * 32 * 3
    assert read_settings("cat.png") == {
        "prompt": "a red cat",
        "negative_prompt": "",
        "seed": 0,
        "scheduler": "ddim",
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 32,
        "model": model,
    }
    assert files() == ["cat.png"]


def test_the_settings_inside_make_the_picture_again(gaze, model):
    gaze("generate", "cat", "--model", model, "--steps", 2, "--size", "32x16", "--scheduler", "euler_ancestral")
    (first,) = files()
    settings = read_settings(first)
    assert (settings["width"], settings["height"]) == (32, 16)
    again = {"--seed": settings["seed"], "--cfg": settings["guidance_scale"], "--scheduler": settings["scheduler"]}
    options = [part for pair in again.items() for part in pair]
    gaze("generate", "cat", "--model", model, "--size", "32x16", "--steps", 2, *options, "-o", "again.png")
    assert pixels(first) == pixels("again.png")


def test_both_names_of_an_option(gaze, model):
    long = ["--num-inference-steps", 2, "--guidance-scale", 3, "--num-images", 1, "--output", "long.png"]
    assert gaze("generate", "cat", "--model", model, "--seed", 1, *long)[0] == 0
    short = ["--steps", 2, "--cfg", 3, "-n", 1, "-o", "short.png"]
    assert gaze("generate", "cat", "--model", model, "--seed", 1, *short)[0] == 0
    assert Path("long.png").read_bytes() == Path("short.png").read_bytes()


def test_every_scheduler_is_listed(gaze):
    code, out, err = gaze("schedulers")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["name", "order", "calls", "noise"]
    assert any(line.split()[:4] == ["dpmpp_2m", "2", "n", "no"] for line in lines)
    assert any(line.startswith("deis") and line.endswith("DEISMultistepScheduler") for line in lines)
    code, out, _ = gaze("schedulers", "--json")
    rows = json.loads(out)
    assert len(rows) == len(lines) - 1
    assert {"name", "class", "order", "calls", "stochastic", "prediction_types", "needs"} == rows[0].keys()


def test_a_scheduler_with_options_and_a_spacing(gaze, model):
    common = ("generate", "cat", "--model", model, "--seed", 0, "--steps", 3)
    assert gaze(*common, "--scheduler", "deis:solver_order=3", "--spacing", "karras", "-o", "a.png")[0] == 0
    settings = read_settings("a.png")
    assert (settings["scheduler"], settings["spacing"]) == ("deis:solver_order=3", "karras")
    assert gaze(*common, "--scheduler", "deis", "-o", "b.png")[0] == 0
    assert pixels("a.png") != pixels("b.png")


def test_json_is_one_document_and_batches_change_nothing(gaze, model):
    common = ["generate", "cat", "dog", "-n", 2, "--model", model, "--seed", 4, "--steps", 2, "--json"]
    code, out, _ = gaze(*common, "-o", "a-{i}.png", "--batch-size", 3)
    report = json.loads(out)
    assert code == 0
    assert [(p["path"], p["prompt"], p["seed"]) for p in report["pictures"]] == [
        ("a-0.png", "cat", 4),
        ("a-1.png", "cat", 5),
        ("a-2.png", "dog", 6),
        ("a-3.png", "dog", 7),
    ]
    gaze(*common, "-o", "b.png", "--batch-size", 1)
    for index in range(4):
        one, other = pixels(f"a-{index}.png"), pixels(f"b-{index}.png")
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1


def test_default_names_never_replace_a_file(gaze, model):
    for _ in range(2):
        assert gaze("generate", "A red, CAT!", "--model", model, "--seed", 3, "--steps", 1)[0] == 0
    assert files() == ["a-red-cat-3-2.png", "a-red-cat-3.png"]
    gaze("generate", "cat", "dog", "--model", model, "--seed", 3, "--steps", 1, "-o", "new/folder/")
    assert files()[2:] == ["new/folder/cat-3.png", "new/folder/dog-4.png"]


def test_a_sheet_of_all_prompts(gaze, model):
    Path("prompts.txt").write_text("a red cat\n\n  dog \n")
    options = ["--model", model, "--steps", 1, "--seed", 0, "--columns", 2]
    code, out, _ = gaze("generate", "cat", "--prompts", "prompts.txt", "--sheet", "sheet.png", *options)
    assert code == 0
    assert out.startswith("sheet.png  seeds 0 to 2  ")
    assert files() == ["prompts.txt", "sheet.png"]
    assert [p["prompt"] for p in read_settings("sheet.png")["pictures"]] == ["cat", "a red cat", "dog"]


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("prompt", ["", "a\udc80b", "ünïcödé 🍎"])
def test_odd_prompts_make_a_picture_that_knows_them(gaze, model, prompt):
    code, _, _ = gaze("generate", prompt, "--model", model, "--steps", 1, "--seed", 0)
    (path,) = files()
    assert code == 0
    assert read_settings(path)["prompt"] == prompt


@pytest.mark.filterwarnings("default:the prompt is longer")
def test_what_the_model_cannot_read_is_shown(gaze, model):
    code, _, err = gaze("generate", "cat " * 1000 + "zebra", "--model", model, "--steps", 1)
    assert code == 0
    assert err.startswith("warning: ")
    assert "zebra" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "nowhere"], ["'nowhere'", "try:"]),
        (["--scheduler", "eular"], ["'eular'", "'euler'", "try:"]),
        (["--size", "33"], ["33", "32 or 34", "try:"]),
        (["--steps", "5000"], ["5000", "1000"]),
        (["--cfg", "nan"], ["guidance_scale", "nan"]),
        (["--prompts", "none.txt"], ["'none.txt'", "try:"]),
        (["-o", "picture.jpg"], ["'picture.jpg'", "picture.png"]),
        (["-o", "file/picture.png"], ["'file'", "try:"]),
        (["-o", "/proc/picture.png"], ["'/proc'", "try:"]),
        (["--sheet", "/proc/sheet.png"], ["'/proc'", "try:"]),
        (["-o", "folder.png", "-n", "2", "--seed", "0", "--model", "nowhere"], ["'nowhere'"]),
        (["--model", "a" * 300], ["does not exist", "try:"]),
        (["--lora", "a" * 300], ["does not exist", "try:"]),
        (["-o", "a.png", "--sheet", "a.png"], ["'a.png' is to be a picture and the sheet", "try:"]),
        (["-n", "2", "--seed", str(2**63 - 1), "-o", "a.png"], ["seed is", "at most"]),
        (["--size", "99999"], ["99999", "16384"]),
    ],
    ids=lambda value: " ".join(value) if "-" in str(value) else "",
)
def test_bad_input_is_a_clear_error(gaze, model, arguments, says):
    Path("file").write_text("")
    code, out, err = gaze("generate", "cat", *([] if "--model" in arguments else ["--model", model]), *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 4
    assert "Traceback" not in err
    for words in says:
        assert words in err
    assert files() == ["file"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["generate"], ["no prompt"]),
        (["generate", "cat", "--steps", "0"], ["--steps", "greater than or equal to 1"]),
        (["generate", "cat", "-n", "0"], ["-n", "greater than or equal to 1"]),
        (["generate", "cat", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["generate", "cat", "--size", "big"], ["--size", "'big'", "64x96"]),
        (["generate", "cat", "--sede", "1"], ["--sede", "--seed"]),
        (["genrate", "cat"], ["genrate", "generate"]),
        (["benchmark", "--step", "1"], ["--steps"]),
    ],
    ids=lambda value: " ".join(value) if len(value) > 1 or value[0] == "generate" else "",
)
def test_wrong_usage_names_what_is_right(gaze, arguments, says):
    code, out, err = gaze(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for words in says:
        assert words in err


@pytest.mark.parametrize("broken", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_broken_model_folder_is_named(gaze, model, broken, how):
    shutil.copytree(model, "model")
    Path("model", broken).unlink()
    if how == "empty":
        Path("model", broken).write_bytes(b"")
    code, _, err = gaze("generate", "cat", "--model", "model", "-o", "out/cat.png")
    assert code == 1
    assert err.startswith("error: ")
    assert "model" in err
    assert "Traceback" not in err


def test_an_unwritable_place_is_found_before_the_model_is_opened(gaze):
    code, _, err = gaze("generate", "cat", "-o", "/proc/cat.png", "--model", "nowhere")
    assert code == 1
    assert "/proc" in err
    assert "nowhere" not in err


def test_too_little_memory_is_said(gaze, model, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("pipelines.TextToImage.decode", full)
    code, _, err = gaze("generate", "cat", "--model", model, "--steps", 1)
    assert code == 1
    assert (
        err == "error: there is not enough memory for this\n  try: a smaller --size, --tile 512 or --dtype bfloat16\n"
    )


def test_a_traceback_only_on_request(gaze, monkeypatch):
    with pytest.raises(Exception, match="nowhere"):
        gaze("generate", "cat", "--model", "nowhere", "--debug")
    monkeypatch.setattr("pipelines.files.plan_paths", lambda *_: 1 / 0)
    code, _, err = gaze("generate", "cat")
    assert code == 1
    assert (
        err
        == "error: ZeroDivisionError: division by zero\n  try: the same with --debug, which shows where this happened\n"
    )


def test_version_and_help(gaze):
    assert gaze("--help")[0] == 0
    code, out, _ = gaze("generate", "--help")
    assert code == 0
    for option in ("--seed", "--steps", "--cfg", "--negative-prompt", "--scheduler", "--model", "--size", "--json"):
        assert option in out


def test_ctrl_c_ends_quietly(model, tmp_path):
    words = ["generate", "cat", "--model", model, "--steps", "500", "-n", "64", "--preview", "now.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines", *words]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "now.png").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err


def test_benchmark_compares_like_with_like(gaze, model):
    options = ["--model", model, "--steps", 3, "--pairs", 2, "--cold-pairs", 0]
    code, out, _ = gaze("benchmark", *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["largest_difference"] < 1e-3
    ratio = report["warm"]["ratio"]["diffusers"]
    assert 0 < ratio["min"] <= ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"] <= ratio["max"]
    assert report["warm"]["n"] == 2
    assert report["cold"] is None
    assert report["settings"]["num_inference_steps"] == 3
    code, out, _ = gaze("benchmark", *options, "--scheduler", "dpmpp_2m")
    assert "largest difference" in out
    assert "most memory" not in out
    assert gaze("benchmark", *options, "--scheduler", "euler_ancestral")[0] == 1


def test_retrieval_prints_score_interval_and_n(gaze, model):
    for folder, colours in (("train", ("red", "blue")), ("heldout", ("lime",))):
        place = Path("data", folder)
        place.mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (32, 32), colour).save(place / f"{colour}.png")
        lines = [json.dumps({"file_name": f"{colour}.png", "text": colour}) for colour in colours]
        (place / "metadata.jsonl").write_text("\n".join(lines))
    options = ["--model", model, "--data", "data", "--steps", 1]
    code, out, _ = gaze("evaluate", "retrieval", *options, "--split", "seen", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["n"] == 2
    assert 0 <= report["low"] <= report["score"] <= report["high"] <= 1
    code, out, _ = gaze("evaluate", "retrieval", *options)
    assert "of 1" in out
    assert "95 % interval" in out
    code, _, err = gaze("evaluate", "retrieval", "--model", model, "--data", "nowhere")
    assert code == 1
    assert "nowhere" in err


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red Apple!", "a-red-apple"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("\0\n/", "picture"),
        ("\udc80x", "x"),
        ("пламя 🍎 炎", "пламя-炎"),
        ("a" * 500, "a" * 60),
    ],
)
def test_a_slug_is_a_plain_file_name(prompt, name):
    assert slug(prompt) == name


def test_long_names_fit_a_file_system():
    assert len(slug("炎" * 500).encode()) <= 60


def test_names_of_several_pictures():
    assert [str(p) for p in plan_paths("a.png", ["x", "y"], [0, 1])] == ["a-0.png", "a-1.png"]
    assert [str(p) for p in plan_paths("{i}/a", ["x", "y"], [0, 1])] == ["0/a.png", "1/a.png"]
    assert [str(p) for p in plan_paths(None, ["x", "x"], [0, 0])] == ["x-0.png", "x-0-2.png"]
