"""Model folders: what diffusers wrote opens, what is broken is named, and writing never loses anything."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError
from diffusion.files import read_weights, replacing
from diffusion.pretrained import load_model, save_model
from diffusion.text import TextEncoder
from tests.small_pipeline import small_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pipeline) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, saved) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(path: Path, new_name) -> None:
    save_file({new_name(name): value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def test_a_model_goes_to_disk_and_back_through_diffusers(saved, pipeline, tmp_path):
    save_model(load_model(saved), tmp_path / "again")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        found = getattr(theirs, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert theirs.vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    assert theirs.tokenizer("a red cat!").input_ids == pipeline.tokenizer("a red cat!").input_ids
    assert type(theirs.scheduler) is type(pipeline.scheduler)
    modes = {path.stat().st_mode for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert len(modes) == 1, "who may read the config may read the weights"


def test_the_scaling_factor_of_a_file_counts_even_where_diffusers_marked_it_as_default(folder):
    edit(folder / "vae" / "config.json", scaling_factor=0.5, _use_default_values=["scaling_factor"])
    vae = Autoencoder.from_pretrained(folder / "vae")
    assert vae.config.scaling_factor == 0.5
    vae.config = dataclasses.replace(vae.config, scaling_factor=0.25)
    vae.save_pretrained(folder / "other")
    assert AutoencoderKL.from_pretrained(folder / "other").config.scaling_factor == 0.25


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_every_version_open(folder, pipeline, prefix):
    file = folder / "text_encoder" / "model.safetensors"
    rename_weights(file, lambda name: prefix + name.removeprefix("text_model."))
    tensors = load_file(file)
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    encoder = TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer")
    ids = encoder.tokens(["a cat", ""])
    with torch.no_grad():
        assert encoder.model(ids).equal(pipeline.text_encoder(ids).last_hidden_state)


def test_old_names_of_the_autoencoders_attention_open(folder, pipeline):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        return name

    rename_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert "decoder.mid_block.attentions.0.query.weight" in read_weights(folder / "vae")
    found = Autoencoder.from_pretrained(folder / "vae").state_dict()
    assert all(torch.equal(found[name], value) for name, value in pipeline.vae.state_dict().items())


def test_half_precision_and_shards_open_as_float32(tmp_path, pipeline):
    pipeline.unet.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    small_pipeline().unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    whole = pipeline.unet.state_dict()
    for kind, tolerance in (("shards", 0), ("half", 1e-3)):
        found = read_weights(tmp_path / kind)
        assert found.keys() == whole.keys()
        assert all(value.dtype == torch.float32 for value in found.values())
        assert all(torch.allclose(found[name], value, atol=tolerance, rtol=tolerance) for name, value in whole.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("model_index.json", Path.unlink, "model_index.json is missing"),
        ("model_index.json", lambda path: path.write_text("{"), "JSON"),
        ("model_index.json", lambda path: path.write_bytes(b"\xff"), "JSON"),
        ("model_index.json", lambda path: path.write_text("[" * 100_000), "JSON"),
        ("model_index.json", lambda path: edit(path, unet=None), "'unet'"),
        ("model_index.json", lambda path: edit(path, scheduler=["diffusers", "EulrDiscreteScheduler"]), "EulrDiscrete"),
        ("model_index.json", lambda path: edit(path, scheduler=5), "scheduler"),
        ("model_index.json", lambda path: edit(path, text_encoder_2=["transformers", "x"]), "no 'text_encoder_2'"),
        ("unet", shutil.rmtree, "'unet'"),
        ("unet/config.json", Path.unlink, "config.json is missing"),
        ("unet/config.json", lambda path: edit(path, layers_per_blok=1), "layers_per_blok"),
        ("unet/diffusion_pytorch_model.safetensors", Path.unlink, "no diffusion_pytorch_model.safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", cut, "cannot be read"),
        ("vae/config.json", lambda path: edit(path, latent_chanels=4), "latent_chanels"),
        ("vae/config.json", lambda path: edit(path, latents_mean=[1.0]), "latents_mean"),
        ("vae/config.json", lambda path: edit(path, block_out_channels="wide"), "is not of the type"),
        ("vae/config.json", lambda path: edit(path, latent_channels=8), "do not fit"),
        ("text_encoder/config.json", lambda path: edit(path, num_hidden_layers=3), "missing"),
        ("text_encoder/config.json", lambda path: edit(path, num_attention_heads=5), "must divide hidden_size"),
        ("text_encoder/model.safetensors", cut, "cannot be read"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text("{}"), "CLIP tokenizer"),
        ("tokenizer/tokenizer_config.json", lambda path: edit(path, model_max_length=1), "the window is 1"),
        ("tokenizer/tokenizer_config.json", lambda path: edit(path, pad_token="<new>"), "tokens, the text encoder"),
        ("scheduler/scheduler_config.json", lambda path: edit(path, beta_schedule="odd"), "odd"),
    ],
)
def test_a_broken_folder_is_named(folder, name, damage, says):
    damage(folder / name)
    with pytest.raises(GazeError) as error:
        load_model(folder)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_weights_that_are_missing_are_never_made_up(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "final_layer_norm.weight" in name)]
    save_file(tensors, file)
    with pytest.raises(GazeError, match=r"missing .*final_layer_norm\.weight"):
        load_model(folder)


def test_parts_that_do_not_belong_together_are_refused(folder):
    edit(folder / "unet" / "config.json", in_channels=5)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :5].contiguous()
    save_file(tensors, file)
    with pytest.raises(GazeError, match="in_channels 5, but the channels of vae/ ask for 4, or 9 for inpainting"):
        load_model(folder)


def test_pickles_are_named_and_never_opened(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(GazeError, match="a pickle, which can run code and is never opened"):
        load_model(folder)


@pytest.mark.parametrize(
    "shards", [{"weight_map": {"a": "../a.safetensors"}}, {"weight_map": {}}, {}, {"weight_map": 5}]
)
def test_an_index_that_points_elsewhere_is_refused(folder, shards):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(GazeError, match="names no files of its folder"):
        load_model(folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(GazeError, match="'nowhere' does not exist"):
        load_model("nowhere")


def test_a_model_is_replaced_whole_or_not_at_all(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail() -> None:
        with replacing(folder) as aside:
            (aside / "model_index.json").write_text("{}")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with replacing(folder) as aside:
        (aside / "model_index.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["model_index.json"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path, saved):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GazeError, match="is not a model; it is not overwritten"):
        save_model(load_model(saved), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
