"""Fine-tuning a model whole or in part: it begins as diffusers has it, only what is asked for changes, and diffusers
opens what comes out."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.amp import GradScaler

from diffusion import recompute
from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from pipelines import TextToImage
from tests.narrow_models import narrow_pipeline
from tests.small_pipeline import small_pipeline
from tests.train.tiny import SIZE, newest_files, run_here, run_one_step, weights
from train.choice import choose, networks, text_frozen, trained
from train.config import Model as Options
from train.config import Recipe
from train.model import Predict, open_model, read
from train.precision import check_precision, skips

ATTENTION_TO_TEXT = "unet.*.attn2.*"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Model folders of diffusers, by kind."""
    folder = tmp_path_factory.mktemp("bases")
    pipelines = {"sd1": small_pipeline(), "sd2": small_pipeline("sd2", "v_prediction"), "sdxl": narrow_pipeline("sdxl")}
    pipelines["flow"] = small_pipeline()
    pipelines["flow"].scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for kind, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in pipelines}


def recipe_of(out: Path, data: Path, base: Path, /, **changes) -> Recipe:
    model = {"init_from": str(base), **changes.pop("model", {})}
    values = {
        "phase": "diffusion", "out": out, "pictures": 16, "batch_size": 8, "ema": {"half_life": 8},
        "checkpoint_every": 8, "log_every": 8, "data": {"folder": data, "size": SIZE}, "model": model,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    return Recipe.model_validate({**values, **changes})


def chosen(base: Path, **options):
    model = open_model(Options(init_from=str(base), **options))
    choose(model, Options(init_from=str(base), **options))
    return model


def states(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder."""
    parts = load_model(folder).modules.items()
    return {f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()}


def changed(before: Path, after: Path) -> set[str]:
    one, other = states(before), states(after)
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


# Where it begins and what comes out


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_is_trained_begins_as_diffusers_has_it(bases, kind):
    """SDXL: with each row's own size numbers."""
    theirs = DiffusionPipeline.from_pretrained(bases[kind], safety_checker=None)
    model, captions = open_model(Options(init_from=str(bases[kind]))), ["a red cat", "dog"]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep, sizes = torch.tensor([3, 900]), torch.tensor([[64, 48, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16]])
    tokens = [text.tokens(captions) for text in model.texts.values()]
    with torch.no_grad():
        ours = Predict(model)(x, timestep, tokens, sizes_B6=sizes)
        cached = Predict(model)(x, timestep, states=read([*model.texts.values()], tokens), sizes_B6=sizes)
        encoded = theirs.encode_prompt(captions, device="cpu", num_images_per_prompt=1,
                                       do_classifier_free_guidance=False)  # fmt: skip
        added = {"text_embeds": encoded[2], "time_ids": sizes} if kind == "sdxl" else None
        expected = theirs.unet(x, timestep, encoded[0], added_cond_kwargs=added).sample
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(cached, ours)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flow"])
def test_diffusers_opens_what_was_fine_tuned_and_only_the_unet_differs(bases, data, tmp_path, kind):
    recipe = recipe_of(tmp_path, data, bases[kind])
    run_here(recipe)
    found = changed(bases[kind], tmp_path / "model")
    assert {name.split(".")[0] for name in found} == {"unet"}
    assert len(found) > 0.9 * sum(name.startswith("unet.") for name in states(bases[kind]))
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    before = json.loads((bases[kind] / "scheduler" / "scheduler_config.json").read_text())
    after = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert after == before
    if kind == "flow":  # which diffusers' Stable Diffusion pipelines open, but do not draw
        return
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32}
    expected = theirs("a red cat", output_type="pt", **options).images
    ours = TextToImage.from_pretrained(tmp_path / "model")("a red cat", scheduler="ddim", **options).pixels_BCHW
    assert ((ours / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-3


def test_the_export_of_a_fine_tune_is_fine_tuned_further(bases, data, tmp_path):
    run_here(recipe_of(tmp_path / "one", data, bases["sd2"], pictures=8))
    run_here(recipe_of(tmp_path / "two", data, tmp_path / "one" / "model", pictures=8))
    assert {name.split(".")[0] for name in changed(tmp_path / "one" / "model", tmp_path / "two" / "model")} == {"unet"}


def test_a_single_file_is_the_folder_that_it_was_made_of(tmp_path):
    narrow_pipeline("sd1").save_pretrained(tmp_path / "sd1")
    convert(tmp_path / "sd1", tmp_path / "sd1.safetensors")
    (tmp_path / "tokenizer").symlink_to(tmp_path / "sd1" / "tokenizer")
    folder, file = (open_model(Options(init_from=str(tmp_path / name))) for name in ("sd1", "sd1.safetensors"))
    for part, module in folder.modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, file.modules[part].state_dict()[name])


def test_what_the_recipe_says_of_the_scheduler_and_defaults_is_exported(bases, data, tmp_path):
    options = {"scheduler": {"prediction_type": "v_prediction"}, "defaults": {"num_inference_steps": 7}}
    run_here(recipe_of(tmp_path, data, bases["sd1"], pictures=8, model=options))
    model = load_model(tmp_path / "model")
    assert (model.schedule.prediction_type, model.defaults) == ("v_prediction", {"num_inference_steps": 7})
    before = load_model(bases["sd1"]).schedule.config
    assert model.schedule.config == {**before, "prediction_type": "v_prediction"}


def test_a_scheduler_of_the_other_kind_replaces_all(bases):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
    model = open_model(Options(init_from=str(bases["sd1"]), scheduler=flow))
    assert model.schedule.config == flow
    assert model.schedule.prediction_type == "flow_prediction"
    assert open_model(Options(init_from=str(bases["flow"]), scheduler={"shift": 2.0})).schedule.config["shift"] == 2.0


# Which parameters train


def test_only_what_patterns_name_is_trained_averaged_and_kept(bases, data, tmp_path):
    recipe = recipe_of(tmp_path, data, bases["sd1"], model={"train": [ATTENTION_TO_TEXT, "text_model.*.q_proj.*"]})
    run_here(recipe)
    found = changed(bases["sd1"], tmp_path / "model")
    assert found
    assert all(".attn2." in name or ".q_proj." in name for name in found)
    names = {name for name in states(bases["sd1"]) if ("unet" in name and ".attn2." in name) or ".q_proj." in name}
    names = {name.replace("text_encoder.", "text_model.") for name in names}
    assert weights(tmp_path).keys() == weights(tmp_path, "ema").keys() == names
    assert {name.split(":")[0] for name in weights(tmp_path, "optimizer")} <= names


def test_a_run_of_a_part_goes_on_to_the_bit_and_not_beside_another_base(bases, data, tmp_path):
    changes = {"model": {"train": [ATTENTION_TO_TEXT]}, "pictures": 16}
    run_here(recipe_of(tmp_path / "straight", data, bases["sd1"], **changes))
    run_one_step(recipe_of(tmp_path / "stopped", data, bases["sd1"], **changes))
    other = small_pipeline()
    other.unet.conv_in.bias.data += 1e-3
    place = tmp_path / "base"
    place.symlink_to(bases["sd1"])
    run_here(recipe_of(tmp_path / "stopped", data, bases["sd1"], **changes))
    assert newest_files(tmp_path / "stopped") == newest_files(tmp_path / "straight")
    stopped = recipe_of(tmp_path / "other", data, place, **changes)
    run_here(stopped)
    place.unlink()
    other.save_pretrained(place)
    with pytest.raises(GazeError, match="over other data, another tokenizer"):
        run_here(stopped)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_everything_that_trains_gets_a_gradient(bases, kind):
    """SDXL reads its first text encoder before the last layer: DDP would wait for those gradients for ever."""
    model = chosen(bases[kind], train=("*",))
    module = Predict(model)
    tokens = [text.tokens(["a red cat"]) for text in model.texts.values()]
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]])
    module(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), tokens, sizes_B6=sizes).square().mean().backward()
    missing = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing
    assert {name.split(".")[0] for name in trained(module)} == networks(model).keys()
    left = [name for name, value in module.named_parameters() if not value.requires_grad]
    assert all(name.startswith(("text_model.encoder.layers.1.", "text_model.final_layer_norm.")) for name in left)
    assert bool(left) == (kind == "sdxl")


def test_a_frozen_text_encoder_is_no_part_of_what_is_wrapped(bases):
    model = chosen(bases["sdxl"])
    assert text_frozen(model)
    assert not any(text.model.training for text in model.texts.values())
    assert {name.split(".")[0] for name, _ in Predict(model).named_parameters()} == {"unet"}
    assert not text_frozen(chosen(bases["sdxl"], train=("text_model_2.*",)))


@pytest.mark.parametrize(
    ("train", "says", "near"),
    [
        (["unet.*.atn2.*"], "unet.*.atn2.*", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
        (["unet.*", "text_modl.*"], "text_modl.*", "text_model.embeddings.token_embedding.weight"),
        (["conv_in"], "conv_in", "unet.conv_in.weight"),
        ([], "nothing would train", "unet.*"),
    ],
)
def test_a_pattern_that_names_nothing_is_said_with_the_nearest_names(bases, train, says, near):
    with pytest.raises(GazeError) as error:
        chosen(bases["sd1"], train=tuple(train))
    assert says in error.value.problem
    assert near in error.value.hint


# Bad input


@pytest.mark.parametrize(
    "options",
    [{"unet": {"layers_per_block": 1}}, {"text": {"width": 64}}, {"text_from": "x"}, {"autoencoder_from": "x"}],
)
def test_options_of_a_fresh_model_do_not_go_with_one_to_fine_tune(bases, data, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} does not go with init_from"):
        recipe_of(tmp_path, data, bases["sd1"], model=options)


def test_a_model_that_cannot_be_fine_tuned_is_named(bases, tmp_path):
    with pytest.raises(GazeError, match=r"model\.init_from: model 'nowhere' does not exist"):
        open_model(Options(init_from="nowhere"))
    convert(narrow_folder(tmp_path), tmp_path / "alone" / "one.safetensors")
    with pytest.raises(GazeError, match="a tokenizer/ folder beside the file"):
        open_model(Options(init_from=str(tmp_path / "alone" / "one.safetensors")))
    inpainting = small_pipeline()
    options = {name: value for name, value in inpainting.unet.config.items() if not name.startswith("_")}
    inpainting.unet = type(inpainting.unet)(**{**options, "in_channels": 9})
    inpainting.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(GazeError, match="takes a mask"):
        open_model(Options(init_from=str(tmp_path / "inpainting")))
    with pytest.raises(GazeError, match="prediction_typ"):
        open_model(Options(init_from=str(bases["sd1"]), scheduler={"prediction_typ": "epsilon"}))


def narrow_folder(folder: Path) -> Path:
    narrow_pipeline("sd1").save_pretrained(folder / "narrow")
    return folder / "narrow"


# How it is computed


def test_checkpointed_and_compiled_runs_give_the_same_weights(bases, data, tmp_path, monkeypatch):
    """Compiled by the tracer alone: tests/long/compiled.py has the code made."""
    run_here(recipe_of(tmp_path / "plain", data, bases["sd1"]))
    calls = []
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *args, **options: calls.append(args[0]) or again(*args, **options)
    )
    again = torch.utils.checkpoint.checkpoint
    run_here(recipe_of(tmp_path / "twice", data, bases["sd1"], gradient_checkpointing=True))
    assert len(calls) > 10
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    run_here(recipe_of(tmp_path / "compiled", data, bases["sd1"], compile=True))
    assert counters["stats"]["calls_captured"] > 100
    plain = newest_files(tmp_path / "plain")["model-00000.safetensors"]
    assert newest_files(tmp_path / "twice")["model-00000.safetensors"] == plain
    assert newest_files(tmp_path / "compiled")["model-00000.safetensors"] == plain
    assert not any("_orig_mod" in name for name in weights(tmp_path / "compiled"))


def test_fp16_is_refused_on_a_cpu(bases, data, tmp_path):
    with pytest.raises(GazeError, match="fp16 needs a GPU") as error:
        run_here(recipe_of(tmp_path, data, bases["sd1"], mixed_precision="fp16"))
    assert "mixed_precision=bf16" in error.value.hint
    check_precision("fp16", torch.device("cuda"))


def test_an_overflow_is_the_scalers_until_its_scale_is_gone():
    """And the scaler's whole state is JSON."""
    inf, one = torch.tensor(torch.inf), torch.tensor(1.0)
    scaler = GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for scale in (4.0, 2.0):
        assert skips(scaler, inf)
        assert not skips(scaler, one)
        assert scaler.get_scale() == scale
        scaler.scale(weight.sum() * inf).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight.data, torch.ones(3))
    assert not skips(scaler, inf)
    assert not skips(None, inf)
    copy = GradScaler("cpu")
    copy.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert copy.state_dict() == scaler.state_dict()
