"""Training LoRA: the base stays to the bit, and the file gives one picture here, in the command and in diffusers."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from diffusion.errors import GazeError
from diffusion.lora import FILE
from diffusion.pretrained import load_model
from pipelines import TextToImage
from tests.narrow_models import narrow_pipeline
from tests.small_pipeline import small_pipeline
from tests.train.test_finetune import chosen, recipe_of
from tests.train.tiny import newest_files, run_here, run_one_step, weights
from train import run as running
from train.model import Predict
from train.run import export

ENDS = ("to_q", "to_k", "to_v", "to_out.0")
# Layers of every kind: a 1x1 convolution on tokens (SD 1.x), convolutions, linear layers; and the text encoders.
MANY = {"rank": 3, "alpha": 6.0, "layers": [*ENDS, "proj_in", "conv1", "time_emb_proj", "q_proj", "fc2"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for kind, pipeline in {"sd1": small_pipeline(), "sdxl": narrow_pipeline("sdxl")}.items():
        pipeline.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sd1", "sdxl")}


@pytest.fixture(scope="module")
def run(tmp_path_factory, bases, data) -> Path:
    """Of the U-Net's attention, all options at their defaults."""
    out = tmp_path_factory.mktemp("run")
    run_here(recipe_of(out, data, bases["sd1"], model={"lora": {"rank": 2}}))
    return out


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_one_file_gives_one_picture_everywhere(bases, data, tmp_path, gaze, kind):
    options = {"lora": MANY, "train": ["unet.*", "text_model*"]}
    run_here(recipe_of(tmp_path / "run", data, bases[kind], model=options, optimizer={"learning_rate": 3e-2}))
    folder = tmp_path / "run" / "model"
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert {name.split(".")[0] for name in load_file(folder / FILE)} == load_model(bases[kind]).modules.keys() - {"vae"}

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    drawn = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32}
    ours = TextToImage.from_pretrained(bases[kind])
    plain = ours("a red cat", scheduler="ddim", **drawn).pixels_BCHW
    ours.load_lora(folder)
    with_lora = ours("a red cat", scheduler="ddim", **drawn).pixels_BCHW
    assert (with_lora - plain).abs().max() > 0.05

    theirs = DiffusionPipeline.from_pretrained(bases[kind])
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.load_lora_weights(folder)
    expected = theirs("a red cat", output_type="pt", **drawn).images
    assert ((with_lora / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-4

    shown = ["--model", str(bases[kind]), "--lora", str(folder / FILE), "--steps", "3", "--scheduler", "ddim"]
    code, _, _ = gaze(
        "generate", "a red cat", *shown, "--seed", "7", "--size", "32x32", "-o", str(tmp_path / "cat.png")
    )
    assert code == 0
    same = ours("a red cat", scheduler="ddim", num_inference_steps=3, seed=7, height=32, width=32).images[0]
    assert Image.open(tmp_path / "cat.png").tobytes() == same.tobytes()


def test_pictures_drawn_while_training_are_those_of_the_file(bases, data, tmp_path):
    """peft's layers in the run against ours over the base: the average is what both have."""
    recipe = recipe_of(tmp_path, data, bases["sd1"], optimizer={"learning_rate": 3e-2},
                       model={"lora": MANY, "defaults": {"num_inference_steps": 3}},
                       validation={"every": 16, "prompts": ["a red cat"], "seed": 3})  # fmt: skip
    run_here(recipe)
    pipe = TextToImage.from_pretrained(bases["sd1"])
    pipe.load_lora(tmp_path / "model")
    expected = pipe(["a red cat"], seed=3, num_inference_steps=3).images[0]
    with Image.open(tmp_path / "samples" / "000000000016.png") as shown:
        difference = torch.tensor([*shown.convert("RGB").crop((6, 6, 38, 38)).tobytes()]) - torch.tensor(
            [*expected.tobytes()]
        )
    assert difference.abs().max() <= 1


def test_the_base_is_frozen_to_the_bit_and_nothing_of_it_is_kept(run, bases):
    names = weights(run).keys()
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert weights(run, "ema").keys() == names
    assert {name.split(":")[0] for name in weights(run, "optimizer")} <= names
    assert all(any(f".{end}.lora_" in name for end in ENDS) for name in names)


def test_no_weight_of_the_base_moves(bases, data, tmp_path, monkeypatch):
    phases = []
    made = running.make_phase
    monkeypatch.setattr(running, "make_phase", lambda *args: phases.append(made(*args)) or phases[-1])
    run_here(recipe_of(tmp_path, data, bases["sd1"], model={"lora": MANY, "train": ["*"]}))
    phase = phases[0]  # the other one is made for the export
    before = load_model(bases["sd1"]).modules
    for part, network in phase.model.modules.items():
        after = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
        for name, value in before[part].state_dict().items():
            assert torch.equal(after[name], value), name
    assert all("lora_" in name for name, value in phase.module.named_parameters() if value.requires_grad)
    assert all(value.grad is None for value in phase.module.parameters() if not value.requires_grad)


def test_the_file_holds_the_average_and_alpha(run, bases, data, tmp_path):
    """Scaled by alpha / rank, which no reader then needs to know."""
    averages, written = weights(run, "ema"), load_file(run / "model" / FILE)
    assert {name.replace(".default", "") for name in averages} == written.keys()
    for name, value in averages.items():
        assert torch.equal(written[name.replace(".default", "")], value)
    recipe = recipe_of(tmp_path, data, bases["sd1"], pictures=8, model={"lora": {"rank": 2, "alpha": 5.0}})
    run_here(recipe)
    averages, written = weights(tmp_path, "ema"), load_file(tmp_path / "model" / FILE)
    for name, value in averages.items():
        assert torch.equal(written[name.replace(".default", "")], value * (2.5 if "lora_B" in name else 1))
    before = (tmp_path / "model" / FILE).read_bytes()
    export(recipe)
    assert (tmp_path / "model" / FILE).read_bytes() == before


def test_half_precision_is_exported_when_asked(bases, data, tmp_path):
    run_here(recipe_of(tmp_path, data, bases["sd1"], pictures=8, model={"lora": {"rank": 1}, "save_as": "float16"}))
    assert {value.dtype for value in load_file(tmp_path / "model" / FILE).values()} == {torch.float16}


def test_a_stopped_run_goes_on_to_the_bit(run, bases, data, tmp_path):
    recipe = recipe_of(tmp_path, data, bases["sd1"], model={"lora": {"rank": 2}})
    run_one_step(recipe)
    run_here(recipe)
    assert newest_files(tmp_path) == newest_files(run)


def test_matrices_train_as_pefts_on_diffusers_own_model(bases):
    """The same start, the same inputs: the same gradients, up to rounding."""
    model = chosen(bases["sd1"], lora={"rank": 2, "alpha": 3.0, "layers": ENDS})
    theirs = DiffusionPipeline.from_pretrained(bases["sd1"], safety_checker=None)
    theirs.unet.requires_grad_(False)
    theirs.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=[*ENDS]))
    for part in (model.unet, model.text.model, theirs.unet, theirs.text_encoder):
        part.double()
    ours, others = (
        {name: value for name, value in unet.named_parameters() if value.requires_grad}
        for unet in (model.unet, theirs.unet)
    )
    assert ours.keys() == others.keys()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(torch.randn(value.shape, generator=generator))
            others[name].copy_(value)
    x, timestep = torch.randn(2, 4, 8, 8, generator=generator).double(), torch.tensor([5.0, 700.0]).double()
    tokens = model.text.tokens(["a red cat", "dog"])
    Predict(model)(x, timestep, [tokens]).square().mean().backward()
    theirs.unet(x, timestep, theirs.text_encoder(tokens)[0]).sample.square().mean().backward()
    largest = max(value.grad.abs().max() for value in others.values())
    for name, value in ours.items():
        assert (value.grad - others[name].grad).abs().max() < 1e-9 * largest


@pytest.mark.parametrize(
    ("options", "says", "near"),
    [
        ({"lora": {"rank": 1, "layers": ["to_qq"]}}, "to_qq", "to_q"),
        ({"lora": {"rank": 1}, "train": ["unet.conv_in.*"]}, "unet.conv_in.*", ".to_q.weight"),
        ({"lora": {"rank": 1, "layers": ["to_q"]}, "train": ["text_model.*"]}, "text_model.*", "unet."),
    ],
)
def test_layers_that_are_not_there_are_named(bases, options, says, near):
    with pytest.raises(GazeError) as error:
        chosen(bases["sd1"], **options)
    assert says in error.value.problem
    assert near in error.value.hint


def test_without_peft_the_error_says_what_to_install(bases, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **options):
        if name == "peft":
            raise ImportError(name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GazeError, match="peft, which is not installed") as error:
        chosen(bases["sd1"], lora={"rank": 1})
    assert "[lora]" in error.value.hint
    chosen(bases["sd1"])  # needs none


def test_a_lora_needs_a_model_to_lie_beside(data, tmp_path):
    with pytest.raises(ValueError, match=r"needs model\.init_from"):
        recipe_of(tmp_path, data, Path("x"), model={"init_from": None, "lora": {"rank": 1}})
    assert (
        json.loads(json.dumps(recipe_of(tmp_path, data, Path("x")).model_dump(mode="json")))["model"]["lora"]["rank"]
        == 0
    )
