"""What a user of `python -m train` can get wrong or meet: answered in a few lines, with an exit code."""

from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from diffusion import files
from diffusion.errors import GazeError
from tests.small_pipeline import small_pipeline
from tests.train.tiny import make_pictures, make_vae, newest_files, run_here, tiny_recipe
from train import __main__ as command
from train import launch, loop, plan, report, snapshots
from train.__main__ import as_keys
from train.config import Recipe


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """`python -m train` with a recipe of so many words; gives exit code, problem and hint."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"phase": "autoencoder", "out": str(tmp_path / "run"), "pictures": 64,
                                      "data": {"folder": str(tmp_path)}}))  # fmt: skip
    monkeypatch.setattr("warnings.showwarning", None)

    def run(*words: str, config: str = str(recipe)) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["train", config, *words])
        code = command.main()
        problem, _, hint = capsys.readouterr().err.partition("\n  try: ")
        return code, problem, hint

    return run


@pytest.mark.parametrize(
    "words, keys",
    [
        (["--resume"], ['resume="auto"']),
        (["--resume", "seed=1"], ['resume="auto"', "seed=1"]),
        (["--resume=never"], ['resume="never"']),
        (["seed=1", "--resume", "never"], ["seed=1", 'resume="never"']),
        (["--resume", "runs/a: b/checkpoints/000000000016"], ['resume="runs/a: b/checkpoints/000000000016"']),
        (["--resume=runs/a=b"], ['resume="runs/a=b"']),
        (["--resume", "16", "out=x"], ['resume="16"', "out=x"]),
        (["seed=1"], ["seed=1"]),
    ],
)
def test_what_to_go_on_from_can_be_said_in_three_ways(words, keys):
    assert as_keys(words) == keys


@pytest.mark.parametrize("given", ["nowhere", "recipe.yaml", "."])
def test_what_is_no_checkpoint_is_named(tmp_path, ask, given):
    make_pictures(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(tiny_recipe(tmp_path / "run", tmp_path).model_dump(mode="json"))
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    code, problem, hint = ask("--resume", str(tmp_path / given))
    assert code == 1
    assert f"resume={tmp_path / given}" in problem
    assert "RUN/checkpoints" in hint


@pytest.mark.parametrize(
    "error, code, says, hint",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "memory does not suffice", "plan"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 75, "is gone", "fewer data.workers"),
        (MemoryError(), 1, "memory does not suffice", "gradient_checkpointing=true"),
        (OSError(28, "No space left on device", "runs/x/recipe.yaml"), 74, "runs/x/recipe.yaml: No space left", "free"),
        (OSError(5, "Input/output error", "runs/x"), 74, "runs/x: Input/output error", "repair the disk"),
        (OSError(30, "Read-only file system", "runs/x"), 1, "runs/x: Read-only file system", "permissions"),
        (OSError(24, "Too many open files"), 1, "Too many open files", "--debug"),
    ],
)
def test_what_the_machine_lacks_is_said_in_two_lines(ask, monkeypatch, error, code, says, hint):
    def fail(recipe):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    found, problem, tried = ask()
    assert found == code
    assert problem.startswith("error: ")
    assert says in problem
    assert hint in tried


@pytest.mark.parametrize(
    "words, says, hint",
    [
        (["export", "{0}/pictures"], "is no run", "the folder of a run"),
        (["data", "check", "{0}", "--workers", "-3"], "--workers is -3", "0 to 1024"),
        (["data", "pack", "{0}/pictures", "{0}/recipe.yaml"], "recipe.yaml' cannot be written", "another folder"),
    ],
)
def test_what_the_other_commands_cannot_do_is_said(tmp_path, ask, words, says, hint):
    make_pictures(tmp_path / "pictures")
    name, *others = (word.format(tmp_path) for word in words)
    code, problem, tried = ask(*others, config=name)
    assert code == 1
    assert says in problem
    assert tried.startswith(hint)


@pytest.mark.parametrize("name", ["export", "report", "plan"])
def test_a_full_disk_is_said_by_every_command(tmp_path, ask, monkeypatch, name):
    """Of the file that it writes, when it comes to write."""

    def full(*_, **__):
        raise OSError(28, "No space left on device", "the file")

    run_here(tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures"), pictures=8))
    monkeypatch.setattr(files, "save_file", refuses)
    monkeypatch.setattr(report, "replacing_file", full)
    monkeypatch.setattr(plan, "write_json", full)
    words = {"plan": [str(tmp_path / "run/recipe.yaml"), "--gpu", "h100", "--save"]}.get(name, [str(tmp_path / "run")])
    code, problem, hint = ask(*words, config=name)
    assert code == 74
    assert ": No space left on device" in problem
    assert "free some space" in hint


def refuses(*_):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_another_error_keeps_its_traceback(ask, monkeypatch):
    def fail(recipe):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        ask()


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    def taken(**options):
        raise dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE\nException raised from ...")

    monkeypatch.setattr(launch, "Accelerator", taken)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(GazeError, match=r"127\.0\.0\.1:29500: The server socket.*EADDRINUSE") as error:
        launch.make_accelerator(tiny_recipe(tmp_path, tmp_path))
    assert "--main_process_port" in error.value.hint


def test_a_rank_above_a_layers_own_is_refused(tmp_path):
    small_pipeline().save_pretrained(tmp_path / "base")
    model = {"init_from": str(tmp_path / "base"), "lora": {"rank": 500}}
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "pictures")).model_dump(exclude_unset=True)
    with pytest.raises(GazeError, match=r"model\.lora\.rank is 500, but unet\..* is a matrix of rank \d+ at most"):
        run_here(Recipe.model_validate(recipe | {"phase": "diffusion", "model": model}))


@pytest.mark.parametrize("place", ["data.cache", "data.folder"])
def test_a_file_where_a_folder_is_meant_is_named(tmp_path, place):
    file = tmp_path / "file"
    file.write_text("")
    pictures = file if place == "data.folder" else make_pictures(tmp_path / "pictures")
    options = {"data": {"cache": file}} if place == "data.cache" else {}
    with pytest.raises(GazeError, match="cannot be made" if options else "is no folder") as error:
        run_here(tiny_recipe(tmp_path / "run", pictures, make_vae(tmp_path / "vae"), **options))
    assert place in error.value.hint


def test_a_snapshot_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    pictures = make_pictures(tmp_path / "pictures")
    recipe = tiny_recipe(tmp_path / "run", pictures, pictures=8, ema={"snapshots_every": 8})
    monkeypatch.setattr(snapshots, "save_tensors", full)
    with pytest.warns(UserWarning, match="snapshot of picture 8 cannot be written.*No space.*the run goes on"):
        run_here(recipe)
    assert "powers-00000.safetensors" in newest_files(Path(recipe.out))
