"""Single files in the original key layout: diffusers' own converter reads the same weights from them, both ways."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file, save_file

from diffusion.autoencoder import AutoencoderConfig
from diffusion.clip import CLIPTextConfig
from diffusion.convert import convert
from diffusion.header import Entry, Header
from diffusion.pretrained import load_model
from diffusion.single_file import open_single_file
from diffusion.structure import SD1, SD2, SDXL, Structure, layout, recognise
from diffusion.unet import UNetConfig
from pipelines import TextToImage
from tests.narrow_models import FAMILIES, NAMES, PREDICTION, narrow_pipeline
from tests.parity.test_unet import FULL_SIZE

OPEN_CLIP_PREFIX = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
CLASSES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    return narrow_pipeline(family)


@pytest.fixture(scope="module")
def folder(family, pipeline, tmp_path_factory):
    place = tmp_path_factory.mktemp(family) / "model"
    pipeline.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def file(folder):
    path = folder.parent / "model.safetensors"
    convert(folder, path)
    return path


def parts(pipeline):
    return [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if hasattr(pipeline, name)]


def equal(found, expected):
    plain = {name.removeprefix("text_model."): value for name, value in found.items()}
    wanted = {name.removeprefix("text_model."): value for name, value in expected.items()}
    return plain.keys() == wanted.keys() and all(torch.equal(plain[name], value) for name, value in wanted.items())


def read_by_diffusers(family, pipeline, checkpoint):
    """The state dict of each part as diffusers' converter gives it."""
    found = {
        "unet": convert_ldm_unet_checkpoint(dict(checkpoint), pipeline.unet.config),
        "vae": convert_ldm_vae_checkpoint(dict(checkpoint), pipeline.vae.config),
    }
    clip = {"text_encoder": convert_ldm_clip_checkpoint(checkpoint)}
    if family == "sd1":
        return found | clip
    name = "text_encoder" if family == "sd2" else "text_encoder_2"
    model = getattr(pipeline, name)
    return found | clip | {name: convert_open_clip_checkpoint(model, checkpoint, OPEN_CLIP_PREFIX[family])}


def test_diffusers_reads_what_we_write(family, pipeline, file):
    found = read_by_diffusers(family, pipeline, load_file(file))
    assert found.keys() == set(parts(pipeline))
    for part in parts(pipeline):
        assert equal(found[part], getattr(pipeline, part).state_dict()), part


def test_diffusers_opens_the_folder_that_we_make_of_a_file(family, pipeline, folder, file, tmp_path):
    convert(file, tmp_path / "again", tokenizer=folder)
    again = CLASSES[family].from_pretrained(tmp_path / "again")
    for part in parts(pipeline):
        assert equal(getattr(again, part).state_dict(), getattr(pipeline, part).state_dict()), part
    read = [field.name for field in dataclasses.fields(UNetConfig) if field.name not in UNetConfig.OWN]
    one, other = (UNetConfig(**{k: tuple_of(p.unet.config[k]) for k in read}) for p in (pipeline, again))
    for option in read:
        per_level = option in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
        values = [config.per_level(option) if per_level else getattr(config, option) for config in (one, other)]
        assert values[0] == values[1], option
    for option in ("scaling_factor", "block_out_channels", "norm_num_groups", "latent_channels", "sample_size"):
        assert tuple_of(again.vae.config[option]) == tuple_of(pipeline.vae.config[option]), option
    assert again.scheduler.config.prediction_type == PREDICTION[family]
    assert torch.equal(again.scheduler.betas, pipeline.scheduler.betas)
    ids = torch.randint(0, pipeline.text_encoder.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    for part in parts(pipeline)[2:]:
        ids[:, -1] = pipeline.text_encoder.config.eos_token_id
        with torch.no_grad():
            one, other = (getattr(p, part)(ids) for p in (pipeline, again))
        assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def tuple_of(value):
    return tuple(value) if isinstance(value, list) else value


def test_both_read_the_same_from_a_file_of_another_program(family, pipeline, file, tmp_path):
    """With what such files hold besides, in half precision, and nothing that says more than the keys."""
    checkpoint = {name: torch.randn(value.shape).half() for name, value in load_file(file).items()}
    besides = {
        "alphas_cumprod": torch.rand(1000),
        "model_ema.decay": torch.ones(1),
        "posterior_mean_coef1": torch.ones(9),
    }
    for name in [name for name in checkpoint if name.startswith("model.diffusion_model.")]:
        besides["model_ema." + name.removeprefix("model.").replace(".", "")] = torch.zeros(1)
    if family != "sd2":
        first = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        besides[f"{first}.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    if family != "sd1":
        besides[f"{OPEN_CLIP_PREFIX[family]}logit_scale"] = torch.ones(())
    if family == "sd2":
        last = {name: value for name, value in checkpoint.items() if "resblocks.1." in name}
        besides |= {name.replace("resblocks.1.", "resblocks.23."): value.clone() for name, value in last.items()}
        besides["cond_stage_model.model.text_projection"] = torch.ones(64, 64)
    save_file(checkpoint | besides, tmp_path / "other.safetensors")
    found = open_single_file(tmp_path / "other.safetensors")
    theirs = read_by_diffusers(family, pipeline, checkpoint | besides)
    assert found.structure.family.name == NAMES[family]
    for part in parts(pipeline):
        kept = {name: value for name, value in theirs[part].items() if not name.endswith("position_ids")}
        assert equal(found.read(part, dtype=None), kept), part
        assert equal(found.read(part), {name: value.float() for name, value in kept.items()}), part


def test_the_layout_is_a_bijection(file):
    found = open_single_file(file)
    for part, shapes in found.structure.shapes().items():
        names = Counter(name for place in found.places.values() if place.part == part for name in place.names)
        assert names == Counter(shapes.keys())
    assert found.places.keys() == load_file(file).keys()


TEXTS = {
    "l": CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "h": CLIPTextConfig(49408, 1024, 4096, 23, 16, hidden_act="gelu"),
    "g": CLIPTextConfig(49408, 1280, 5120, 32, 20, hidden_act="gelu"),
}
PUBLISHED = {
    "sd1": (SD1, {"text_encoder": TEXTS["l"]}, None, 512, 1130, "v1"),
    "sd2": (SD2, {"text_encoder": TEXTS["h"]}, None, 768, 1214, "v2"),
    "sdxl": (SDXL, {"text_encoder": TEXTS["l"], "text_encoder_2": TEXTS["g"]}, 1280, 1024, 2513, "xl_base"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures_are_recognised_from_keys_and_shapes(name):
    members, texts, pooled, pixels, count, kind = PUBLISHED[name]
    vae = AutoencoderConfig(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=pixels,
        scaling_factor=members.scaling_factor,
    )
    config = UNetConfig.from_diffusers({k: v for k, v in FULL_SIZE[name][0].items() if k != "upcast_attention"})
    places = layout(Structure(members, config, vae, texts, pooled))
    found = recognise(Header({key: Entry("F16", place.shape) for key, place in places.items()}, {}))
    assert (found.family, found.vae, found.texts, found.pooled) == (members, vae, texts, pooled)
    for option in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
        assert found.unet.per_level(option) == config.per_level(option)
    same = ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim", "use_linear_projection")
    for option in (*same, "sample_size", "addition_embed_type", "addition_time_embed_dim"):
        assert getattr(found.unet, option) == getattr(config, option), option
    checkpoint = {key: torch.empty(place.shape, device="meta") for key, place in places.items()}
    assert len(checkpoint) == count
    assert infer_diffusers_model_type(checkpoint) == kind
    theirs = convert_ldm_unet_checkpoint(checkpoint, config.to_diffusers() | {"layers_per_block": 2})
    assert {key: tuple(value.shape) for key, value in theirs.items()} == found.shapes()["unet"]


def test_a_file_draws_the_picture_of_its_folder(family, folder, file):
    ours, theirs = load_model(file, tokenizer=folder / "tokenizer"), load_model(folder)
    assert ours.modules.keys() == theirs.modules.keys()
    for part, module in ours.modules.items():
        assert equal(module.state_dict(), theirs.modules[part].state_dict())
    assert torch.equal(ours.schedule.sigmas_T, theirs.schedule.sigmas_T)
    options = {"seed": 0, "num_inference_steps": 2, "height": 32, "width": 32}
    one, other = (TextToImage(model)("red dog", **options) for model in (ours, theirs))
    assert torch.equal(one.pixels_BCHW, other.pixels_BCHW)


def test_a_folder_in_half_precision_and_shards_goes_through_a_file(family, pipeline, folder, file, tmp_path):
    convert(file, tmp_path / "half", tokenizer=folder, dtype=torch.float16)
    CLASSES[family].from_pretrained(tmp_path / "half", torch_dtype=torch.float16).save_pretrained(
        tmp_path / "shards", variant="fp16", max_shard_size="1MB"
    )
    assert len(list((tmp_path / "shards" / "unet").glob("*fp16*.safetensors"))) > 1
    convert(tmp_path / "shards", tmp_path / "again.safetensors")
    again, first = load_file(tmp_path / "again.safetensors"), load_file(file)
    assert again.keys() == first.keys()
    assert all(value.dtype == torch.float16 and torch.equal(value, first[n].half()) for n, value in again.items())
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    assert index["_class_name"] == CLASSES[family].__name__
    assert load_model(tmp_path / "shards").unet.conv_in.weight.dtype == torch.float32
