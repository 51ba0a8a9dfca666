"""Single files from strangers: what is broken or hostile is named, nothing runs, nothing is lost."""

import contextlib
import json
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.header import LONGEST, read_header
from diffusion.pretrained import load_model
from diffusion.single_file import PAD, open_single_file
from diffusion.tokenizer import Tokenizer
from pipelines.inspection import inspect
from tests.hostile import headers
from tests.narrow_models import narrow_pipeline
from tests.small_pipeline import small_pipeline

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with model/, and sd1.safetensors, sd2.safetensors, sdxl.safetensors without a tokenizer beside them."""
    place = tmp_path_factory.mktemp("made")
    for family in ("sdxl", "sd2", "sd1"):
        shutil.rmtree(place / "model", ignore_errors=True)
        narrow_pipeline(family).save_pretrained(place / "model")
        convert(place / "model", place / "plain.safetensors")
        # Without what our converter notes beside the keys, as most files are.
        save_file(load_file(place / "plain.safetensors"), place / f"{family}.safetensors")
    return place


@pytest.fixture
def file(made, tmp_path):
    """A copy to break, with a tokenizer beside it."""
    shutil.copytree(made / "model" / "tokenizer", tmp_path / "tokenizer")
    return Path(shutil.copy(made / "sd1.safetensors", tmp_path / "model.safetensors"))


def edit(file, change, metadata=None):
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file.with_name("edited"), metadata)
    file.with_name("edited").replace(file)


def refusal(action, *arguments, **options):
    begin = time.process_time()  # other programs' share of the machine is not counted
    with pytest.raises(GazeError) as error:
        action(*arguments, **options)
    assert time.process_time() - begin < 1
    assert len(str(error.value).splitlines()) <= 3
    assert len(error.value.problem) < 600
    return str(error.value)


# What a file does not say


@pytest.mark.parametrize(
    "family, metadata, marks, asked, expected",
    [
        ("sd1", {}, [], None, "epsilon"),
        ("sd2", {}, [], None, "v_prediction"),
        ("sdxl", {}, [], None, "epsilon"),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, [], None, "epsilon"),
        ("sd1", {"modelspec.prediction_type": "v"}, [], None, "v_prediction"),
        ("sd1", {"modelspec.predict_key": "v"}, [], None, "v_prediction"),
        ("sdxl", {}, ["v_pred"], None, "v_prediction"),
        ("sdxl", {}, ["v_pred", "ztsnr"], None, "v_prediction"),
        ("sd2", {"modelspec.prediction_type": "v"}, [], "epsilon", "epsilon"),
    ],
)
def test_the_prediction_type_is_asked_for_or_stated_or_the_familys(
    made, tmp_path, family, metadata, marks, asked, expected
):
    path = Path(shutil.copy(made / f"{family}.safetensors", tmp_path))
    edit(path, lambda tensors: tensors.update({mark: torch.empty(0) for mark in marks}), metadata)
    structure = open_single_file(path, asked).structure
    assert structure.schedule["prediction_type"] == expected
    assert structure.schedule["rescale_betas_zero_snr"] == ("ztsnr" in marks)
    if family == "sd2":  # the one family whose sizes tell its prediction types apart
        assert structure.unet.sample_size == (384 if expected == "v_prediction" else 256)


def test_an_unknown_prediction_type_is_named(made, file):
    assert "'velocity'" in refusal(open_single_file, file, "velocity")
    edit(file, lambda tensors: None, {"modelspec.prediction_type": "magic"})
    assert "'magic'" in refusal(open_single_file, file)
    assert load_model(file, prediction_type="epsilon").schedule.prediction_type == "epsilon"
    assert load_model(made / "model", prediction_type="v_prediction").schedule.prediction_type == "v_prediction"
    assert "'magic'" in refusal(convert, made / "model", file, prediction_type="magic")
    convert(made / "model", file, prediction_type="v_prediction")
    assert load_model(file).schedule.prediction_type == "v_prediction"


def test_the_size_trained_at_is_stated_or_the_familys(made, file):
    assert open_single_file(file).structure.unet.sample_size == 256  # 512 pixels; two levels halve once
    edit(file, lambda tensors: None, {"modelspec.resolution": "64x32"})
    assert open_single_file(file).structure.unet.sample_size == (16, 32)
    assert open_single_file(made / "plain.safetensors").structure.unet.sample_size == 16


def test_the_tokenizer_is_given_or_beside_the_file(made, file, tmp_path):
    beside = load_model(file).text
    for folder in (made / "model", made / "model" / "tokenizer"):
        given = load_model(made / "sd1.safetensors", tokenizer=folder).text
        assert given.tokens(["a red cat!", ""]).equal(beside.tokens(["a red cat!", ""]))
    assert "holds no tokenizer" in refusal(load_model, made / "sd1.safetensors")
    assert "--tokenizer FOLDER" in refusal(load_model, made / "sd1.safetensors")
    assert "nowhere" in refusal(load_model, file, tokenizer=tmp_path / "nowhere")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "CLIP tokenizer" in refusal(load_model, file)


@pytest.mark.parametrize("family, padding", [("sd1", "<|endoftext|>"), ("sd2", "a")])
def test_prompts_are_filled_up_as_the_text_encoder_was_trained(made, tmp_path, family, padding):
    """OpenCLIP fills with token 0, whatever the tokenizer's folder says; CLIP repeats the end."""
    shutil.copytree(made / "model" / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "d"}))
    file = Path(shutil.copy(made / f"{family}.safetensors", tmp_path))
    edit(file, lambda tensors: None, {})
    text = load_model(file, tokenizer=tmp_path).text
    pad = text.tokenizer.backend.token_to_id(padding)
    assert (text.tokens(["", "dog"])[:, 3:] == pad).all()
    text.tokenizer.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert again.tokens(["red cat", ""], 16).equal(text.tokens(["red cat", ""]))


# Folders that a single file cannot tell


def test_a_structure_that_would_be_read_as_another_is_refused(made, tmp_path):
    small_pipeline().save_pretrained(tmp_path / "small")
    said = refusal(convert, tmp_path / "small", tmp_path / "small.safetensors")
    assert "cannot" in said
    for part, option, value in (
        ("unet", "attention_head_dim", 4),
        ("unet", "norm_num_groups", 16),
        ("vae", "scaling_factor", 0.5),
        ("text_encoder", "hidden_act", "gelu"),
        ("scheduler", "beta_end", 0.02),
    ):
        folder = Path(shutil.copytree(made / "model", tmp_path / option))
        config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {option: value}))
        said = refusal(convert, folder, tmp_path / "out.safetensors")
        assert part in said
        assert option in said or part == "scheduler"
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_of_a_folder_are_checked_before_a_file_is_written(made, tmp_path):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    edit(folder / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("quant_conv.bias"))
    assert "missing quant_conv.bias" in refusal(convert, folder, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("value", [0, -1, 10**9, 1.5, None, "x", [], {}, [1]])
@pytest.mark.parametrize(
    "name, option",
    [("text_encoder_2/config.json", "projection_dim"), ("scheduler/scheduler_config.json", "prediction_type")],
)
def test_hostile_configs_of_a_folder_are_refused(made, tmp_path, name, option, value):
    folder = Path(shutil.copytree(made / "model", tmp_path / "model"))
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    for path, change in (("model_index.json", {"text_encoder_2": ["x", "y"]}), (name, {option: value})):
        (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | change))
    refusal(inspect, folder)
    refusal(convert, folder, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Places


def test_what_is_written_stands_there_whole_or_not_at_all(made, file, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("diffusion.convert.write_part", fail)
    assert "No space left" in refusal(convert, file, tmp_path / "folder")
    monkeypatch.setattr("diffusion.convert.save_file", fail)
    assert "No space left" in refusal(convert, made / "model", tmp_path / "model.safetensors")
    assert sorted(tmp_path.iterdir()) == before
    assert file.read_bytes() == (made / "sd1.safetensors").read_bytes()


def test_places_that_cannot_be_written_to(made, file, tmp_path):
    assert "must be the other of the two" in refusal(convert, made / "model", tmp_path / "folder")
    assert "must be the other of the two" in refusal(convert, file, tmp_path / "other.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "must be the other of the two" in refusal(convert, made / "model", tmp_path / "folder.safetensors")
    (tmp_path / "letter").write_text("dear")
    assert "must be the other of the two" in refusal(convert, file, tmp_path / "letter")
    assert (tmp_path / "letter").read_text() == "dear"
    assert "would replace it" in refusal(convert, file, tmp_path)
    assert "would replace it" in refusal(convert, file, tmp_path / "tokenizer", tokenizer=tmp_path / "tokenizer")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    assert "is not overwritten" in refusal(convert, file, tmp_path / "work")
    assert "does not exist" in refusal(convert, tmp_path / "nowhere", tmp_path / "x.safetensors")
    assert "'/proc/x" in refusal(convert, made / "model", "/proc/x/model.safetensors").replace("/proc/x", "'/proc/x")


def test_files_are_readable_to_those_who_may_read_the_folder(made, tmp_path):
    modes = {path.stat().st_mode & 0o777 for path in (made / "model").rglob("*.json")}
    assert (made / "plain.safetensors").stat().st_mode & 0o777 in modes


# Hostile files


@pytest.mark.parametrize("name", headers())
def test_a_hostile_header_is_refused_quickly(tmp_path, name):
    text = headers()[name]
    path = tmp_path / "model.safetensors"
    data = b"" if name == "no tensors" else bytes(8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert str(path) in refusal(load_model, path)
    assert str(path) in refusal(convert, path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_it_says_is_refused(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    refusal(load_model, path)
    for start in (b"", b"\0", b"12345678", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(start)
        refusal(load_model, path)


def test_the_largest_header_takes_little_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    text = b'{"__metadata__":{"a":"' + b"x" * (LONGEST - 1000) + b'"}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    refusal(load_model, path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 * 2**20


def test_broken_files_are_named_or_read_whole(file):
    """Bits flipped in the header and files cut short: an error of ours, or the very structure as before."""
    whole, chance = file.read_bytes(), random.Random(0)
    length = int.from_bytes(whole[:8], "little")
    names = read_header(file).tensors.keys()
    for _ in range(60):
        place, bit = chance.randrange(length + 8), 1 << chance.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with contextlib.suppress(GazeError):
            assert open_single_file(file).places.keys() <= names
    for _ in range(20):
        file.write_bytes(whole[: chance.randrange(len(whole))])
        refusal(open_single_file, file)


@pytest.mark.parametrize(
    "pattern",
    [
        f"{UNET}input_blocks.1.1.transformer_blocks.{{}}.norm1.weight",
        f"{UNET}middle_block.1.transformer_blocks.{{}}.norm1.weight",
        f"{UNET}input_blocks.{{}}.0.in_layers.0.weight",
        "first_stage_model.encoder.down.0.block.{}.norm1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.{}.layer_norm1.weight",
    ],
)
def test_keys_of_many_blocks_take_no_time(file, pattern):
    edit(file, lambda t: t.update({pattern.format(n): torch.ones(1) for n in range(15_000)}))
    assert "blocks; the most is 500" in refusal(load_model, file)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop(f"{UNET}out.0.bias"), "missing model.diffusion_model.out.0.bias"),
        (lambda t: t.pop(f"{UNET}input_blocks.0.0.weight"), "missing model.diffusion_model.input_blocks.0.0.weight"),
        (lambda t: t.pop(f"{UNET}input_blocks.1.0.in_layers.0.weight"), "block_out_channels is ()"),
        (lambda t: t.pop("first_stage_model.encoder.down.0.block.0.norm1.weight"), "block_out_channels"),
        (lambda t: t.pop("first_stage_model.encoder.conv_in.weight"), "missing first_stage_model.encoder.conv_in"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("first_stage")], "missing first_stage_model"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("cond_stage")], "no known structure"),
        (lambda t: t.update({"lora_down.weight": torch.ones(1)}), "unknown lora_down.weight"),
        (lambda t: t.update({f"{UNET}input_blocks.99.0.op.weight": torch.ones(1)}), "unknown"),
        (lambda t: t.update({f"{UNET}out.0.bias": torch.ones(33)}), "out.0.bias is [33], the other keys say [32]"),
        (lambda t: t.update({f"{UNET}input_blocks.0.0.weight": torch.ones(())}), "too few dimensions"),
        (lambda t: t.update({f"{UNET}input_blocks.0.0.weight": torch.ones(32)}), "too few dimensions"),
        (lambda t: t.update({f"{UNET}input_blocks.0.0.weight": torch.ones(2**20, 4)}), "input_blocks.0.0.weight is"),
        (lambda t: t.update({f"{UNET}input_blocks.1.0.out_layers.3.weight": torch.ones(2**20)}), "not its tensors"),
        (lambda t: t.update({f"{UNET}input_blocks.1.0.out_layers.3.weight": torch.ones(33)}), "norm_num_groups"),
        (lambda t: t.update({f"{UNET}out.0.bias": torch.ones(32, dtype=torch.int8)}), "as I8"),
        (lambda t: t.update({f"{UNET}middle_block.1.proj_in.weight": torch.ones(64)}), "proj_in.weight is [64]"),
        (lambda t: t.update({"first_stage_model.quant_conv.weight": torch.ones(8, 8)}), "quant_conv.weight is [8, 8]"),
    ],
)
def test_other_keys_and_shapes_are_named(file, tmp_path, change, says):
    edit(file, change)
    assert says in refusal(load_model, file)
    assert str(file) in refusal(convert, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stated", ["", "-1", "1e9", "99999999999", "1000000"])
def test_a_padding_token_that_is_none_is_refused(made, tmp_path, stated):
    file = Path(shutil.copy(made / "sd2.safetensors", tmp_path))
    edit(file, lambda tensors: None, {PAD.format("text_encoder"): stated})
    assert "fills prompts with token" in refusal(load_model, file, tokenizer=made / "model")
