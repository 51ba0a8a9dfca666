"""The AUTOMATIC1111 web UI's text inside a PNG: its examples, what comes back, and texts that nobody would write."""

import struct
import time
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from benchmarks.prompts import keeps
from diffusion.errors import GazeError
from diffusion.foreign import FOREIGN
from diffusion.samplers import SAMPLERS as OURS
from diffusion.spacing import LEVEL_SPACINGS, SPACINGS
from pipelines import parameters
from pipelines.parameters import NEGATIVE, quote, read_parameters, unquote, write_parameters
from pipelines.png import LONGEST, MOST_CHUNKS, SIGNATURE, read_settings, read_texts, save_png
from pipelines.recall import describe, recall

BASE = {
    "prompt": "a red cat",
    "negative_prompt": "",
    "seed": 5,
    "scheduler": "dpmpp_2m",
    "spacing": "karras",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "height": 96,
    "width": 64,
    "model": "models/some, model.safetensors",
}
any_text = st.text(st.characters(blacklist_categories=()), max_size=60)
pieces = st.sampled_from(
    [
        "Steps: 20",
        "Sampler: Euler a",
        ", ",
        "\n",
        NEGATIVE,
        "Seed: 1",
        "Size: 64x64",
        '"',
        "\\",
        ": ",
        "a",
        "CFG scale: 7",
    ]
)
odd_text = st.lists(pieces, max_size=30).map("".join) | any_text


def picture(path, **texts):
    """A PNG that another program wrote: PIL's own text chunks."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(path, *chunks: bytes):
    """A PNG with these chunks after its header."""
    save_png(Image.new("RGB", (2, 2)), path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"".join(chunks) + data[33:])
    return path


def test_what_is_written_is_what_the_web_ui_writes():
    assert write_parameters(BASE | {"prompt": "a red\ncat", "negative_prompt": "blurry"}) == (
        "a red\ncat\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, "
        'Seed: 5, Size: 64x96, Model: "some, model"'
    )
    line = write_parameters({**BASE, "scheduler": "ddim:eta=0.5", "spacing": "trailing"}).splitlines()[-1]
    assert line.startswith('Steps: 20, Sampler: "ddim:eta=0.5", Schedule type: Simple, ')


@pytest.mark.parametrize(
    "line, scheduler, spacing",
    [
        ("Sampler: Euler a, Schedule type: Automatic", "euler_ancestral", None),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 3M SDE, Schedule type: Automatic", "dpmpp_3m_sde", "exponential"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM2 a Karras", "kdpm2_ancestral", "karras"),
        ("Sampler: LMS", "lms", None),
        ("Sampler: PLMS", "pndm", None),
        ("Sampler: UniPC, Schedule type: SGM Uniform", "unipc", "trailing"),
    ],
)
def test_samplers_by_their_names_there(line, scheduler, spacing):
    found, unknown = read_parameters(f"cat\nSteps: 9, {line}, CFG scale: 7, Seed: 1, Size: 64x32")
    assert (found.get("scheduler"), found.get("spacing")) == (scheduler, spacing)
    assert (found["num_inference_steps"], found["seed"], found["width"], found["height"]) == (9, 1, 64, 32)
    assert unknown == []


def test_every_name_in_the_tables_exists_here():
    assert {name.split(":")[0] for name in parameters.SAMPLERS.values()} <= {*OURS, *FOREIGN}
    assert set(parameters.SCHEDULE_TYPES.values()) == {*LEVEL_SPACINGS, *SPACINGS, "linear"} - {"linspace"}
    assert set(parameters.AUTOMATIC) <= set(parameters.SAMPLERS)


def test_words_of_the_web_ui_that_are_only_words_here_are_named():
    prompt = "a <lora:style:0.8> [cat:dog:0.5] [red] (x:1.2)\nNegative prompt: <hypernet:y>"
    settings, unread = read_parameters(f"{prompt}\nSteps: 2, Seed: 1, CFG scale: 1e999")
    assert unread == ["<lora:style:0.8>", "[cat:dog:0.5]", "<hypernet:y>", "CFG scale: 1e999"]
    assert "guidance_scale" not in settings


def test_what_has_no_counterpart_is_named():
    text = (
        'cat\nSteps: x, Sampler: DPM fast, Schedule type: KL Optimal, Seed: 3, Clip skip: 2, Lora hashes: "a: 1, b: 2"'
    )
    found, unknown = read_parameters(text)
    assert found == {"prompt": "cat", "negative_prompt": "", "seed": 3}
    assert unknown == [
        "Steps: x", "Sampler: DPM fast", "Schedule type: KL Optimal", "Clip skip: 2", "Lora hashes: a: 1, b: 2"
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(odd_text.filter(keeps), odd_text.filter(keeps), st.sampled_from([*OURS, "deis:solver_order=3,x=\n"]))
@example("Steps: 20, Sampler: Euler, Seed: 1, Size: 1x1", 'say: "no"', "euler")
@example("", "", "ddim")
@example("a\n\nb: c", "", "heun")
def test_prompts_come_back(prompt, negative, scheduler):
    wanted = {**BASE, "prompt": prompt, "negative_prompt": negative, "scheduler": scheduler}
    found, unknown = read_parameters(write_parameters(wanted))
    assert found == {name: value for name, value in wanted.items() if name != "model"}
    assert unknown == ["Model: some, model"]


@settings(max_examples=300, deadline=None)
@given(odd_text)
def test_any_text_can_be_read(text):
    found, unknown = read_parameters(text)
    assert isinstance(found["prompt"], str)
    assert all(isinstance(name, str) for name in unknown)


@given(any_text)
def test_quotes_come_off_again(text):
    assert unquote(quote(text)) == text or text[:1] + text[-1:] == '""'


@pytest.mark.parametrize(
    "piece", ["a", " ", '"', "\\", ":", ",", "\n", "a:", 'a:"', "a: b, ", '"\\', "Steps: 1, ", "-/ "]
)
def test_reading_takes_time_in_proportion(piece):
    def seconds(length):
        text = (piece * length)[:length]
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            read_parameters(text)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(400_000) < 6 * seconds(100_000) + 0.01


@pytest.mark.parametrize("prompt", ["plain", "ünïcödé", "炎 🍎", 'a "b": c,\nd'])
def test_both_chunks_of_a_picture_of_ours(tmp_path, prompt):
    wanted = BASE | {"prompt": prompt}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", wanted, write_parameters(wanted))
    with Image.open(tmp_path / "a.png") as image:  # as another program reads it
        assert image.info["parameters"] == write_parameters(wanted)
    assert read_texts(tmp_path / "a.png")["parameters"] == write_parameters(wanted)
    assert read_settings(tmp_path / "a.png") == wanted


def test_nul_and_surrogates_are_question_marks_there_and_exact_here(tmp_path):
    wanted = BASE | {"prompt": "a\0b\udc80c"}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", wanted, write_parameters(wanted))
    assert read_texts(tmp_path / "a.png")["parameters"].startswith("a?b?c\n")
    assert read_settings(tmp_path / "a.png") == wanted


def test_a_picture_of_the_web_ui(tmp_path, capsys):
    text = "cat, 炎\nNegative prompt: dog\nSteps: 4, Sampler: Euler a, CFG scale: 7, Seed: 9, Size: 32x32, Model: v1-5"
    path = picture(tmp_path / "a.png", parameters=text)
    settings, unknown = describe(str(path))
    assert (settings["prompt"], settings["scheduler"], unknown) == ("cat, 炎", "euler_ancestral", ["Model: v1-5"])
    assert recall(str(path), {"seed": 0}) == settings | {"seed": 0}
    assert "Model: v1-5" in capsys.readouterr().err


@pytest.mark.parametrize("kind, packed", [(b"zTXt", b"parameters\0\0"), (b"iTXt", b"parameters\0\1\0\0\0")])
def test_compressed_texts(tmp_path, kind, packed):
    path = with_chunks(tmp_path / "a.png", chunk(kind, packed + zlib.compress(b"a cat")))
    assert read_texts(path) == {"parameters": "a cat"}


@pytest.mark.parametrize(
    "chunks, says",
    [
        ([chunk(b"tEXt", b"gaze\0" + b"[" * 2**24)], "more than"),
        ([chunk(b"zTXt", b"gaze\0\0" + zlib.compress(bytes(2**28)))], "more than"),
        ([chunk(b"iTXt", b"gaze\0\1\0\0\0" + zlib.compress(bytes(2**28)))], "more than"),
        ([chunk(b"zTXt", b"gaze\0\0rubbish")], "rror"),
        ([chunk(b"iTXt", b"gaze\0\0\0")], "language"),
        ([chunk(b"iTXt", b"gaze\0\0\0\0\0\xff")], "utf-8"),
        ([chunk(b"tEXt", b"gaze\0" + b"[" * 2**20)], "broken"),
        ([chunk(b"tEXt", b'gaze\0{"seed": NaN}')], "NaN"),
        ([chunk(b"tEXt", b'gaze\0{"seed": ' + b"9" * 5000 + b"}")], "broken"),
        ([chunk(b"tEXt", b"gaze\0{}")] * 2, "more than once"),
        ([chunk(b"tEXt", b"gaze\0{}")[:-1] + b"?"], "checksum"),
        ([struct.pack(">I4s", 2**31, b"tEXt")], "cut off"),
        ([chunk(b"tEXt", b"x\0")] * (MOST_CHUNKS + 1), "chunks"),
        ([chunk(b"tEXt", b"other\0" + b"[" * 2**24)], "no gaze settings"),
        ([chunk(b"tEXt", b"gaze\0[]")], "not an object"),
    ],
    ids=range(15),
)
def test_hostile_chunks_are_a_clear_error_and_cost_little(tmp_path, chunks, says):
    path = with_chunks(tmp_path / "a.png", *chunks)
    begin = time.process_time()
    with pytest.raises(GazeError, match=says) as error:
        describe(str(path))
    assert time.process_time() - begin < 1
    assert "a.png" in error.value.problem
    assert len(str(error.value)) < 400


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_file_is_read_or_a_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(SIGNATURE + data)
    with pytest.raises(GazeError):
        describe(str(path))


@pytest.mark.parametrize(
    "values, says",
    [
        ({"seed": "5"}, "seed '5'"),
        ({"seed": True}, "seed True"),
        ({"prompt": ["cat"]}, "prompt"),
        ({"model": "/no/such/model"}, "'/no/such/model', which is not here"),
        ({"x": 1}, "not of a picture"),
        ({"pictures": [{}, {}]}, "sheet of 2 pictures"),
    ],
)
def test_settings_that_cannot_be_repeated(tmp_path, values, says):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", values)
    with pytest.raises(GazeError, match=r"a\.png") as error:
        recall(str(tmp_path / "a.png"), {})
    assert says in str(error.value)


def test_what_is_given_replaces_what_is_inside(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", BASE | {"tokenizer": "t", "prediction_type": "sample"})
    given_model = recall(str(tmp_path / "a.png"), {"model": "other", "seed": 0})
    assert (given_model["model"], given_model["seed"], given_model["prompt"]) == ("other", 0, "a red cat")
    assert "tokenizer" not in given_model
    assert "prediction_type" not in given_model


def test_longest_is_enough_for_the_longest_prompts(tmp_path):
    wanted = BASE | {"prompt": "\U0001f34e" * 100_000, "negative_prompt": "\U0001f34e" * 100_000}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", wanted)
    assert read_settings(tmp_path / "a.png") == wanted
    assert (tmp_path / "a.png").stat().st_size < LONGEST
