"""Whole runs of a few steps: what they write, and that a stop or a kill anywhere changes nothing."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from diffusion.text import TextEncoder
from pipelines import TextToImage
from tests.train.threads import together
from tests.train.tiny import (
    difference,
    make_pictures,
    make_vae,
    newest_files,
    open_phase,
    rows,
    run_here,
    run_one_step,
    start,
    tiny_recipe,
    weights,
)
from train import __main__ as command
from train import loop
from train.data.decode import decode
from train.data.folder import Folder
from train.data.stream import Sample
from train.loop import NotFinite, Stopped, is_due, not_finite
from train.processes import Processes
from train.run import export, remove_leftovers
from train.validation import validate

PROMPTS = ("red square", "a blue one")


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory, data) -> Path:
    """The vae/ folder of an autoencoder run."""
    out = tmp_path_factory.mktemp("autoencoder")
    run_here(tiny_recipe(out, data, pictures=400, validation={"every": 200}, log_every=200, checkpoint_every=200,
                         optimizer={"learning_rate": 5e-3}))  # fmt: skip
    return out / "model" / "vae"


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, vae) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight")
    run_here(tiny_recipe(out, data, vae))
    return out


@pytest.fixture
def diffusion(tmp_path, data, vae):
    return lambda **changes: tiny_recipe(tmp_path / "run", data, vae, **changes)


def same_learning(one: Path, other: Path, tolerance: float) -> None:
    """Losses and gradient norms agree, and the weights, relative to the largest of all."""
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first == pytest.approx(second, rel=tolerance)
    assert difference(weights(one), weights(other)) < tolerance


# What a run does and writes


def test_a_run_leaves_its_recipe_metrics_checkpoints_and_model(straight):
    assert [row["pictures"] for row in rows(straight)] == [16, 32, 48, 64, 80]
    assert all({"loss", "learning_rate", "gradient_norm"} <= row.keys() for row in rows(straight))
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["000000000064", "000000000080"]
    assert {path.name for path in straight.iterdir()} == {
        "cache", "checkpoints", "environment.jsonl", "metrics.jsonl", "model", "recipe.yaml",
    }  # fmt: skip
    assert newest_files(straight).keys() == {
        "model-00000.safetensors", "ema-00000.safetensors", "optimizer-00000.safetensors", "manifest.json",
    }  # fmt: skip


def test_diffusers_opens_the_model_and_draws_the_same(straight):
    pipeline = StableDiffusionPipeline.from_pretrained(straight / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    ours = TextToImage.from_pretrained(straight / "model")
    start_noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": start_noise}
    theirs = pipeline("a red square", output_type="pt", **options).images
    pixels = ours("a red square", **options).pixels_BCHW
    assert pixels.shape == (1, 3, 16, 16)
    assert (theirs - (pixels / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3


def test_the_model_has_the_averaged_weights(straight):
    model = load_model(straight / "model")
    averages = weights(straight, "ema")
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, averages[f"unet.{name}"])
    assert not torch.equal(averages["unet.conv_in.weight"], weights(straight)["unet.conv_in.weight"])


def test_export_writes_the_same_model_from_a_checkpoint(straight, data, vae):
    before = {path: path.read_bytes() for path in (straight / "model").rglob("*") if path.is_file()}
    (straight / "checkpoints" / ".tmp-96-of-a-run-that-goes-on").mkdir()
    export(tiny_recipe(straight, data, vae))
    assert {path: path.read_bytes() for path in (straight / "model").rglob("*") if path.is_file()} == before
    (straight / "checkpoints" / ".tmp-96-of-a-run-that-goes-on").rmdir()


def test_training_lowers_the_loss(diffusion):
    recipe = diffusion(pictures=800, log_every=160, checkpoint_every=800, optimizer={"learning_rate": 5e-3})
    run_here(recipe)
    losses = [row["loss"] for row in rows(recipe.out)]
    assert losses[-1] < 0.9 * losses[0]


def test_drawn_pictures_need_no_data(tmp_path, vae):
    recipe = tiny_recipe(tmp_path / "run", None, vae, pictures=16, data={"folder": None, "drawn": 6})
    run_here(recipe)
    assert len(Folder(tmp_path / "run" / "drawn")) == 6


# What must change nothing


def test_validation_on_or_off_gives_the_same_bits(straight, diffusion):
    recipe = diffusion(
        validation={"every": 32, "prompts": PROMPTS, "seed": 3}, model={"defaults": {"num_inference_steps": 2}}
    )
    run_here(recipe)
    with Image.open(recipe.out / "samples" / "000000000032.png") as picture:
        assert picture.width > 2 * 16
    assert sorted(path.stem for path in (recipe.out / "samples").iterdir()) == [f"{n:012d}" for n in (32, 64, 80)]
    for name in ("model-00000.safetensors", "ema-00000.safetensors", "optimizer-00000.safetensors"):
        assert newest_files(recipe.out)[name] == newest_files(straight)[name]
    assert rows(recipe.out) == rows(straight)


def test_the_log_of_samples_is_of_the_stream_and_outlives_a_stop(diffusion):
    recipe = diffusion(log_samples=True, checkpoint_every=80)
    run_one_step(recipe)
    log = recipe.out / "samples-00000.jsonl"
    with log.open("a") as file:
        file.write('{"pictures": 16, "samples": []}\n{"pic')  # of a step that no checkpoint holds, and cut short
    for name in (".recipe.yaml-0a1b2c3d", "samples/.000000000016.png-0a1b2c3d"):
        (recipe.out / name).parent.mkdir(exist_ok=True)
        (recipe.out / name).touch()
    run_here(recipe)
    assert not list(recipe.out.rglob(".*"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["pictures"] for line in lines] == [*range(8, 81, 8)]
    stream, _ = open_phase(recipe)
    seen = [row for line in lines for row in line["samples"]]
    assert seen == [[n, stream[n].index, stream[n].key] for n in range(80)]
    dropped = [row["captions_dropped"] for row in rows(recipe.out)]
    parts = [range(n, n + 16) for n in range(0, 80, 16)]
    assert dropped == pytest.approx([sum(stream[n].dropped for n in part) / len(part) for part in parts])


@pytest.mark.parametrize("at_the_end", [True, False])
def test_only_what_a_run_leaves_half_written_is_removed(tmp_path, at_the_end):
    own = [".tmp-" + "0123456789abcdef" * 2, ".recipe.yaml-0a1b2c3d", "samples/.000000000016.png-0a1b2c3d",
           "snapshots/.000000000016.safetensors-0a1b2c3d", "snapshots/.tmpXCibi7"]  # fmt: skip
    exported = [".model-0a1b2c3d/unet", ".model-0a1b2c3d-old/unet"]
    others = ["samples/.nfs0000000001a2b3c400000001", ".report.html-0a1b2c3d", ".model-of-mine/unet",
              "samples/.ipynb_checkpoints/1.png-0a1b2c3d"]  # fmt: skip
    for name in (*own, *exported, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, at_the_end)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, *(() if at_the_end else exported)}


def test_workers_give_the_same_bits(diffusion):
    found = []
    for workers in (0, 2):
        recipe = diffusion(out=Path(f"{diffusion().out}{workers}"), pictures=32,
                           data={"cache_latents": False, "workers": workers})  # fmt: skip
        run_here(recipe)
        found.append(newest_files(recipe.out)["model-00000.safetensors"])
    assert found[0] == found[1]


def test_accumulation_equals_one_large_batch(straight, diffusion):
    recipe = diffusion(gradient_accumulation_steps=4)
    run_here(recipe)
    same_learning(straight, recipe.out, 1e-5)


def test_cached_latents_equal_those_encoded_every_time(straight, diffusion):
    recipe = diffusion(data={"cache_latents": False})
    run_here(recipe)
    same_learning(straight, recipe.out, 1e-5)


def test_the_losses_of_a_batch_are_a_function_of_its_positions(diffusion):
    recipe = diffusion()
    samples, phase = open_phase(recipe)
    with torch.no_grad():
        whole = phase.loss(phase.module, [samples[n] for n in range(8)])
        parts = [phase.loss(phase.module, [samples[n] for n in part]) for part in ((7, 0, 2), (1, 3, 4, 5, 6))]
    torch.testing.assert_close(torch.cat(parts)[[1, 3, 2, 4, 5, 6, 7, 0]], whole, rtol=1e-5, atol=1e-6)


# Stops and kills


def saved(out: Path) -> int:
    """Pictures of the newest checkpoint."""
    return max([0, *(int(path.name) for path in (out / "checkpoints").glob("[0-9]*"))])


def test_resumed_after_kills_at_random_instants_the_bits_are_the_same(tmp_path, data, vae):
    """Every step ends with a checkpoint, so that many of the kills meet a save."""
    recipe = tiny_recipe(tmp_path / "straight", data, vae, pictures=120, checkpoint_every=8, log_every=8)
    process = start(recipe)
    process.join()
    assert process.exitcode == 0
    killed = recipe.model_copy(update={"out": tmp_path / "killed"})
    chance, kills, exitcode = random.Random(0), 0, None
    while exitcode is None:
        before = saved(killed.out)
        process = start(killed)
        while process.exitcode is None and saved(killed.out) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.03))
        if kills == 5:
            process.join()
        exitcode = process.exitcode
        if exitcode is None:
            process.kill()
            process.join()
            kills += 1
    assert exitcode == 0
    assert kills >= 2
    assert newest_files(killed.out) == newest_files(recipe.out)
    assert rows(killed.out) == rows(recipe.out)
    assert not list((killed.out / "checkpoints").glob(".*"))
    unet = "model/unet/diffusion_pytorch_model.safetensors"
    assert (killed.out / unet).read_bytes() == (recipe.out / unet).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(tmp_path, data, vae, number):
    recipe = tiny_recipe(tmp_path, data, vae, pictures=100_000, checkpoint_every=100_000, log_every=8)
    process = start(recipe)
    while not (tmp_path / "metrics.jsonl").exists() and process.exitcode is None:
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 130
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert int(saved.name) == max(row["pictures"] for row in rows(tmp_path))
    assert int(saved.name) % 8 == 0


def test_resuming_inside_warm_up_and_an_epoch_changes_no_bit(straight, tmp_path, data, vae):
    recipe = tiny_recipe(tmp_path, data, vae)
    assert [run_one_step(recipe) for _ in range(9)] == [*range(8, 80, 8)]
    run_here(recipe)
    assert newest_files(tmp_path) == newest_files(straight)
    assert rows(tmp_path) == rows(straight), "also those that a stop cut in two"


def test_handlers_of_the_caller_come_back(straight):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_gradient_that_is_not_finite_stops_before_the_step(diffusion, monkeypatch, capsys):
    from train.diffusion_phase import DiffusionPhase

    good = DiffusionPhase.loss

    def poisoned(self, module, samples):
        loss = good(self, module, samples)
        return loss * float("nan") if any(sample.position == 45 for sample in samples) else loss

    recipe = diffusion()
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPhase, "loss", poisoned)
        with pytest.raises(NotFinite, match="pictures 40 to 47") as error:
            run_here(recipe)
    assert error.value.exit_code == 70
    assert max((recipe.out / "checkpoints").iterdir()).name == "000000000032"
    for part in ("model", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in weights(recipe.out, part).values())
    run_here(recipe)
    assert rows(recipe.out)[-1]["pictures"] == 80


def test_samples_are_named_whose_loss_is_not_finite_or_else_all_of_the_gradient():
    def said(rank: Processes, loss_B: list[float]) -> str:
        samples = [Sample(position, 9 - position, *[None] * 8) for position in range(40 + rank.rank, 44, 2)]
        run = SimpleNamespace(seen=40, recipe=SimpleNamespace(batch_size=4), processes=rank,
                              source=[SimpleNamespace(name=f"{number}.png") for number in range(-50, 0)])  # fmt: skip
        return not_finite(run, [(samples, torch.tensor(loss_B))]).problem

    loss = together(2, lambda rank: said(rank, [1.0, float("nan") if rank.rank else 1.0]))
    assert loss[0] == loss[1]
    assert "pictures 40 to 43 is not finite: the loss of -34.png (picture 43, process 1);" in loss[0]
    gradient = together(2, lambda rank: said(rank, [1.0, 1.0]))
    assert [gradient[0].count(f"picture {position}, process {position % 2})") for position in range(40, 44)] == [1] * 4


def test_a_learning_rate_far_too_high_is_found_too(diffusion):
    with pytest.raises(NotFinite):
        run_here(diffusion(pictures=8000, optimizer={"learning_rate": 1e30, "warmup": 0}))


# Other ways to run


def test_bf16_trains_float32_weights(straight, diffusion):
    recipe = diffusion(mixed_precision="bf16")
    run_here(recipe)
    assert {value.dtype for value in weights(recipe.out).values()} == {torch.float32}
    assert newest_files(recipe.out)["model-00000.safetensors"] != newest_files(straight)["model-00000.safetensors"]
    same_learning(straight, recipe.out, 0.05)


def test_the_text_encoder_learns_at_its_share_of_the_rate(straight, diffusion):
    recipe = diffusion(optimizer={"text_share": 1e-3})
    fresh = open_phase(recipe)[1].module.state_dict()
    run_here(recipe)
    moved = {name: float((value - fresh[name]).abs().max()) for name, value in weights(recipe.out).items()}
    assert 0 < max(change for name, change in moved.items() if name.startswith("text_model.")) < 2e-5
    assert max(change for name, change in moved.items() if name.startswith("unet.")) > 1e-4


def test_fresh_token_embeddings_have_the_spread_asked_for(diffusion):
    for spread in (0.02, 0.5):
        recipe = diffusion(model={"text": {"token_std": spread}})
        module = open_phase(recipe)[1].module
        tokens = module.get_parameter("text_model.embeddings.token_embedding.weight")
        assert float(tokens.detach().std()) == pytest.approx(spread, rel=0.1)


def test_the_export_can_be_half_as_large(diffusion):
    recipe = diffusion(pictures=16, model={"save_as": "float16"})
    folder = run_here(recipe)
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {part.stat().st_mode & 0o777 for part in folder.rglob("*.safetensors")} == {
        (folder / "model_index.json").stat().st_mode & 0o777
    }
    assert load_model(folder).unet.conv_in.weight.dtype == torch.float32


def test_the_autoencoder_phase_ends_with_latents_of_unit_variance(trained_vae, data):
    figures = [row["psnr"] for row in rows(trained_vae.parents[1]) if "psnr" in row]
    assert figures[1] > figures[0] > 5
    vae = AutoencoderKL.from_pretrained(trained_vae)
    pixels = torch.stack([decode(data / name, (16, 16))[0] for name in Folder(data).files])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        again = vae.decode(latents / vae.config.scaling_factor).sample
    assert latents.std() == pytest.approx(1, abs=1e-3)
    psnr = -10 * ((again.clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4).log10().mean()
    assert psnr == pytest.approx(figures[1], abs=1e-3)


def test_the_text_phase_learns_what_the_captions_show_and_the_diffusion_phase_begins_from_it(
    tmp_path, data, trained_vae
):
    first = tiny_recipe(tmp_path / "text", data, trained_vae, phase="text", pictures=1600, log_every=400, batch_size=16,
                        data={"caption_dropout": 0.0}, optimizer={"learning_rate": 5e-3},
                        validation={"every": 1600, "prompts": PROMPTS})  # fmt: skip
    folder = run_here(first)
    assert {path.name for path in folder.iterdir()} == {"text_encoder", "tokenizer"}
    assert run_here(first) == folder  # the same command again, after its end
    losses = [row["loss"] for row in rows(first.out)]
    pixels = torch.stack([decode(data / name, (16, 16))[0] for name in Folder(data).files])
    with torch.no_grad():
        latents = Autoencoder.from_pretrained(trained_vae).encode(pixels)[0]
    without_words = float((latents - latents.mean(0)).square().mean())
    assert losses[-1] < 0.3 * without_words < losses[0]
    assert (first.out / "samples" / "000000001600.png").is_file()

    second = tiny_recipe(tmp_path / "diffusion", data, trained_vae, model={"text_from": folder})
    phase = open_phase(second)[1]
    begun = phase.module.state_dict()
    for name, value in TextEncoder.from_pretrained(
        folder / "text_encoder", folder / "tokenizer"
    ).model.named_parameters():
        assert begun[f"text_model.{name}"].equal(value)
    run_here(second)
    trained = weights(second.out)
    weight = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert not trained[weight].equal(begun[weight])


def test_a_look_that_a_signal_cut_short_is_made_up_for(diffusion, monkeypatch):
    recipe = diffusion(validation={"every": 32, "prompts": PROMPTS}, model={"defaults": {"num_inference_steps": 1}})
    grid = recipe.out / "samples" / "000000000032.png"

    def validate_and_be_stopped(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        validate(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", validate_and_be_stopped)
        with pytest.raises(Stopped) as stopped:
            run_here(recipe)
    assert stopped.value.args == (32,)
    assert not grid.exists()
    run_here(recipe)
    assert grid.exists()
    steps = [row["pictures"] for row in rows(recipe.out)]
    assert steps == sorted(steps)
    lines = map(json.loads, (recipe.out / "metrics.jsonl").read_text().splitlines())
    (after,) = (line for line in lines if line["pictures"] == 48)
    assert "seconds/validation" in after  # and so not in its speed


def test_a_step_is_due_at_multiples_and_at_the_end():
    due = [seen for seen in range(7, 106, 7) if is_due(seen - 7, seen, 100, 20)]
    assert due == [21, 42, 63, 84, 105]
    assert not is_due(93, 100, 100, 0)


# Bad input


def test_a_checkpoint_of_another_recipe_is_refused_and_nothing_is_touched(diffusion):
    run_here(diffusion(pictures=16))
    before = {path: path.read_bytes() for path in diffusion().out.rglob("*") if path.is_file()}
    with pytest.raises(GazeError, match="another recipe"):
        run_here(diffusion(pictures=16, seed=1))
    with pytest.raises(GazeError, match="resume is never"):
        run_here(diffusion(pictures=16, resume="never"))
    assert {path: path.read_bytes() for path in diffusion().out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_over_another_autoencoder_or_other_captions_is_refused(tmp_path, vae):
    pictures = make_pictures(tmp_path / "pictures")
    own = make_vae(tmp_path / "vae")
    recipe = tiny_recipe(tmp_path / "run", pictures, own, pictures=16)
    run_here(recipe)
    file = own / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(GazeError, match="or autoencoder"):
        run_here(recipe)
    content[-3] ^= 1
    file.write_bytes(content)
    run_here(recipe)
    metadata = pictures / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red one", "a rot one"))
    with pytest.raises(GazeError, match="other data"):
        run_here(recipe)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"data": {"size": 15}}, "does not divide by 2"),
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "does not divide by 1 processes x 2"),
        ({"model": {"unet": {"in_channels": 3}}}, r"model\.unet\.in_channels is 3"),
        ({"model": {"unet": {"layers_per_blok": 3}}}, "layers_per_blok"),
        ({"model": {"scheduler": {"beta_stat": 3}}}, "beta_stat"),
        ({"model": {"defaults": {"scheduler": "eulr"}}}, "eulr"),
        ({"model": {"defaults": {"num_inference_steps": 0}}}, "num_inference_steps"),
        ({"model": {"autoencoder_from": "nowhere"}}, "nowhere"),
        ({"data": {"folder": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(diffusion, changes, says):
    with pytest.raises(GazeError, match=says):
        run_here(diffusion(**changes))
    assert not (diffusion().out / "checkpoints").exists()


def test_an_autoencoder_that_cannot_be_built(tmp_path, data):
    with pytest.raises(GazeError, match="block_out_chanels") as error:
        run_here(tiny_recipe(tmp_path, data, model={"autoencoder": {"block_out_chanels": [8]}}))
    assert "'block_out_channels'" in error.value.hint
    with pytest.raises(GazeError, match="norm_num_groups, 3, must divide"):
        run_here(tiny_recipe(tmp_path, data, model={"autoencoder": {"norm_num_groups": 3}}))
    with pytest.raises(GazeError, match="does not divide"):
        run_here(tiny_recipe(tmp_path, data, data={"size": 15}))


def test_broken_pictures_are_listed_beside_the_run(tmp_path, vae):
    pictures = make_pictures(tmp_path / "pictures", 40)
    (pictures / "7.png").write_bytes(b"no picture")
    recipe = tiny_recipe(tmp_path / "run", pictures, vae, pictures=16)
    with pytest.warns(UserWarning, match=r"1 of 40 pictures are left out.*7\.png"):
        run_here(recipe)
    assert (tmp_path / "run" / "skipped.txt").read_text().startswith("7.png: ")


def test_a_folder_that_cannot_be_written_is_an_error_of_two_lines(tmp_path, data, vae, monkeypatch, capsys):
    (tmp_path / "file").touch()
    recipe = tmp_path / "recipe.yaml"
    values = tiny_recipe(tmp_path / "file" / "run", data, vae).model_dump(mode="json")
    recipe.write_text(json.dumps(values))
    monkeypatch.setattr("sys.argv", ["train", str(recipe)])
    monkeypatch.setattr("warnings.showwarning", None)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert command.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: folder '{tmp_path}/file/run' cannot be written")
    assert printed.err.endswith("try: another place with out=DIR\n")


@pytest.mark.parametrize("words", [["none.yaml"], ["data", "emoj"], ["export", "none"]])
def test_the_command_answers_bad_words(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["train", *words])
    monkeypatch.setattr("warnings.showwarning", None)
    assert command.main() == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_help_names_every_form(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    assert command.main() == 0
    assert "accelerate launch -m train CONFIG" in capsys.readouterr().out
