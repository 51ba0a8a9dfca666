"""Checkpoints: what is written is read, what is broken is passed over, what is sound is never deleted too early."""

import json
import os
import random
import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from diffusion.errors import GazeError
from train import checkpoint
from train.checkpoint import MANIFEST, NotSaved, load, newest, remove_leftovers, save, verify

STATE = {"identity": "recipe"}


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weights = {
        "w": torch.full((2, 3), value),
        "scalar": torch.tensor(value),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }
    return {"model": weights, "ema": {"w": torch.full((2, 3), -value)}, "optimizer": {"w:step": torch.tensor(7.0)}}


def write(folder: Path, *pictures: int, keep: int = 9) -> list[Path]:
    return [save(folder, count, tensors(count), STATE, keep) for count in pictures]


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_what_is_saved_comes_back(tmp_path):
    (path,) = write(tmp_path / "new" / "checkpoints", 8)
    assert path.name == "000000000008"
    assert verify(path) is None
    found, state = load(path, "recipe")
    assert state == {"identity": "recipe", "pictures": 8}
    for stem, expected in tensors(8).items():
        assert found[stem].keys() == expected.keys()
        assert all(torch.equal(found[stem][name], value) for name, value in expected.items())
    assert not list(path.parent.glob(".*"))


def test_the_newest_is_taken_and_the_oldest_pruned(tmp_path):
    assert newest(tmp_path) is None
    write(tmp_path, 8, 16, 24, 1_000_000_000_000, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000024", "1000000000000"]
    assert newest(tmp_path).name == "1000000000000"


def test_the_oldest_is_deleted_only_once_the_new_one_stands(tmp_path, monkeypatch):
    write(tmp_path, 8, 16, keep=2)
    standing = []
    remove = shutil.rmtree
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **_: (standing.append(newest(tmp_path)), remove(path))
    )
    write(tmp_path, 24, keep=2)
    assert [path.name for path in standing] == ["000000000024"]


def test_another_recipe_is_refused(tmp_path):
    (path,) = write(tmp_path / "checkpoints", 8)
    with pytest.raises(GazeError, match="another recipe") as error:
        load(path, "other")
    assert str(tmp_path / "recipe.yaml") in error.value.hint


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST]
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted", "longer"])
def test_a_damaged_file_means_the_checkpoint_before(tmp_path, name, damage):
    first, second = write(tmp_path, 8, 16)
    file = second / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "emptied": b"", "longer": content + b" "}[damage])
    with pytest.warns(UserWarning, match=f"{second.name} is passed over"):
        assert newest(tmp_path) == first


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    (path,) = write(tmp_path, 8)
    sizes = {file: file.stat().st_size for file in path.iterdir()}
    chance = random.Random(0)
    places = [(file, position, bit) for file in sizes for position in range(sizes[file]) for bit in range(8)]
    manifest = [place for place in places if place[0].name == MANIFEST]  # nothing else vouches for it
    for file, position, bit in chance.sample(places, 150) + manifest[::37]:
        flip(file, position, bit)
        assert verify(path) is not None, (file.name, position, bit)
        flip(file, position, bit)
    assert verify(path) is None


def test_a_file_that_does_not_belong_is_found(tmp_path):
    (path,) = write(tmp_path, 8)
    shutil.copy(path / "ema.safetensors", path / "more.safetensors")
    assert "more.safetensors" in verify(path)
    (other,) = write(tmp_path, 16)
    shutil.rmtree(path)
    other.rename(path)
    assert verify(path) is not None, "under the name of another one"


def test_a_later_format_is_named(tmp_path):
    (path,) = write(tmp_path, 8)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}, indent=2))
    assert "format 2" in verify(path)


def test_with_none_whole_the_user_decides(tmp_path):
    for path in write(tmp_path, 8, 16):
        (path / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(GazeError, match="none of the 2"):
        newest(tmp_path)


def test_broken_newer_ones_do_not_push_out_sound_ones(tmp_path):
    paths = write(tmp_path, 8, 16, 24, 32)
    for path in paths[2:]:
        (path / "state.json").unlink()
    save(tmp_path, 20, tensors(20), STATE, keep=2)
    assert [path.name for path in paths[1:] if path.exists()] == ["000000000016", "000000000024", "000000000032"]
    with pytest.warns(UserWarning, match="passed over"):
        assert newest(tmp_path).name == "000000000020"
    save(tmp_path, 24, tensors(24), STATE, keep=2)
    assert verify(paths[2]) is None, "written anew where the broken one was"


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (path,) = write(tmp_path, 8)
    (tmp_path / ".tmp-16-ab").mkdir()
    (tmp_path / ".tmp-16-ab" / "model.safetensors").touch()
    (tmp_path / "notes").mkdir()
    assert newest(tmp_path) == path
    assert (tmp_path / ".tmp-16-ab").exists(), "to look is not to touch: a run may be writing it"
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000008", "notes"]


def test_a_full_disk_is_an_error_that_leaves_the_others(tmp_path, monkeypatch):
    write(tmp_path, 8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(100, 99, 100))
    with pytest.raises(NotSaved, match=r"000000000016 cannot be written: no space") as error:
        write(tmp_path, 16)
    assert error.value.exit_code == 74
    assert [path.name for path in tmp_path.iterdir()] == ["000000000008"]


def test_dying_before_any_system_call_of_a_save_leaves_a_sound_checkpoint(tmp_path, monkeypatch):
    """Every fsync, rename and removal of a save in turn is where it ends; so is every file written."""

    class Died(BaseException):
        pass

    calls = 0
    left = 0

    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > left:
                raise Died
            return function(*arguments, **options)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (checkpoint.shutil, "rmtree"), (checkpoint, "save_file")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    monkeypatch.setattr(Path, "write_text", dying(Path.write_text))
    while True:
        folder = tmp_path / str(left)
        calls, left, allowed = 0, 10_000, left
        write(folder, 8, 16, keep=2)
        calls, left = 0, allowed
        try:
            write(folder, 24, keep=2)
        except Died:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert newest(folder) is not None
                assert len([path for path in folder.glob("[0-9]*") if verify(path) is None]) >= 2
            left += 1
        else:
            break
    assert left >= 10
    assert newest(folder).name == "000000000024"
