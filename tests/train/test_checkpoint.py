"""Checkpoints: what is written is read, what is broken is passed over, what is sound is never deleted too early."""

import io
import json
import os
import random
import re
import resource
import shutil
import sys
import threading
import warnings
from collections import namedtuple
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import safe_open
from torch import nn

from diffusion.errors import GazeError
from tests.train.threads import together
from tests.train.tiny import PROCESSES, free_port, make_pictures, newest_files, run_here, tiny_recipe
from train import checkpoint, checkpoint_files
from train.checkpoint import Checkpoints, NotSaved
from train.checkpoint_files import ALONE, MANIFEST, differences, folders, load, verify
from train.processes import Processes
from train.run import open_folder
from train.sharding import parted_like
from train.store import Store

RECIPE = {"seed": 0, "optimizer": {"learning_rate": 1e-3, "clip": 1.0}}
STATE = {"identity": "recipe", "recipe": RECIPE}


def tensors(value: float) -> checkpoint_files.Tensors:
    weights = {
        "w": torch.full((2, 3), float(value)),
        "scalar": torch.tensor(value, dtype=torch.float64),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "half": torch.full((3,), value, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
    }
    return {"model": weights, "ema": {"w": torch.full((2, 3), -float(value))}, "optimizer": {}}


def write(folder: Path, *pictures: int, keep: int = 9, processes: Processes = ALONE) -> list[Path]:
    checkpoints = Checkpoints(folder, keep, processes)
    return [checkpoints.save(count, tensors(count), STATE) for count in pictures]


def newest(folder: Path) -> Path | None:
    return Checkpoints(folder, 2).newest()


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def same(found: checkpoint_files.Tensors, expected: checkpoint_files.Tensors) -> None:
    assert found.keys() == expected.keys()
    for stem, values in expected.items():
        assert found[stem].keys() == values.keys()
        for name, value in values.items():
            assert found[stem][name].dtype == value.dtype
            assert torch.equal(found[stem][name], value)


# What is written is read


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_what_any_number_of_processes_saved_comes_back(tmp_path, processes):
    paths = together(processes, lambda rank: write(tmp_path / "new" / "checkpoints", 8, processes=rank))
    ((path,), *_) = paths
    assert paths == [[path]] * processes
    assert path.name == "000000000008"
    assert verify(path) is None
    found, state = load(path, STATE)
    assert state == STATE
    same(found, tensors(8))
    assert not list(path.parent.glob(".*"))
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["format"], manifest["pictures"], manifest["processes"]) == (2, 8, processes)
    assert {file.name for file in path.iterdir()} == {MANIFEST, *manifest["files"]}


def test_safetensors_reads_the_files_and_the_tensors_are_aligned(tmp_path):
    (path,) = write(tmp_path, 8)
    with safe_open(path / "model-00000.safetensors", "pt") as file:
        same({"model": {name: file.get_tensor(name) for name in file.keys()}}, {"model": tensors(8)["model"]})  # noqa: SIM118
    content = (path / "model-00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors(8)["model"][name].element_size() == 0


def test_the_bytes_are_split_evenly_over_the_processes(tmp_path):
    chance = random.Random(0)
    weights = {str(number): torch.zeros(chance.randrange(1, 4000)) for number in range(200)}
    (path, *_) = together(4, lambda rank: Checkpoints(tmp_path, 2, rank).save(8, {"model": weights}, STATE))
    sizes = [file.stat().st_size for file in path.glob("model-*")]
    assert len(sizes) == 4
    assert max(sizes) < 1.02 * min(sizes)


def test_each_process_hashes_its_share_and_all_hear_the_verdict(tmp_path, monkeypatch):
    (path, *_) = together(4, lambda rank: write(tmp_path, 8, processes=rank)[0])
    hashed = []
    describe = checkpoint_files._described
    monkeypatch.setattr(checkpoint_files, "_described", lambda file: hashed.append(file.name) or describe(file))
    assert together(3, lambda rank: verify(path, rank)) == [None] * 3
    assert sorted(hashed) == sorted(file.name for file in path.glob("*.safetensors"))
    flip(path / "ema-00001.safetensors" if (path / "ema-00001.safetensors").exists() else path / hashed[0], -1, 3)
    verdicts = together(3, lambda rank: verify(path, rank))
    assert verdicts[0].endswith("changed since it was written")
    assert len(set(verdicts)) == 1


def test_a_load_takes_no_memory_until_a_tensor_is_touched(tmp_path):
    if sys.platform != "linux":
        pytest.skip("/proc tells")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    large = {"model": {str(number): torch.zeros(2**22) for number in range(4)}}
    path = Checkpoints(tmp_path, 2).save(8, large, STATE)
    before = resident()
    found, _ = load(path, STATE)
    assert resident() - before < 2**22
    assert float(found["model"]["0"].sum()) == 0


# Which one is taken, which are kept


def test_the_newest_is_taken_and_the_oldest_pruned(tmp_path):
    assert newest(tmp_path) is None
    write(tmp_path, 8, 16, 24, 1_000_000_000_000, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000024", "1000000000000"]
    assert newest(tmp_path).name == "1000000000000"


def test_the_oldest_is_deleted_only_once_the_new_one_stands(tmp_path, monkeypatch):
    write(tmp_path, 8, 16, keep=2)
    standing = []
    discard = checkpoint_files.discard
    monkeypatch.setattr(checkpoint_files, "discard", lambda path: (standing.append(newest(tmp_path)), discard(path)))
    write(tmp_path, 24, keep=2)
    assert [path.name for path in standing] == ["000000000024"]


def test_broken_newer_ones_do_not_push_out_sound_ones(tmp_path):
    paths = write(tmp_path, 8, 16, 24, 32)
    for path in paths[2:]:
        (path / MANIFEST).unlink()
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.find("auto") == paths[1]
    checkpoints.save(20, tensors(20), STATE)
    assert [path.name for path in paths if path.exists()] == ["000000000016", "000000000024", "000000000032"]
    checkpoints.save(24, tensors(24), STATE)
    assert verify(paths[2]) is None, "written anew where the broken one was"
    checkpoints.save(40, tensors(40), STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000024", "000000000040"], (
        "the broken one is gone"
    )


def test_resume_never_auto_and_a_path(tmp_path):
    first, second = write(tmp_path / "here", 8, 16)
    checkpoints = Checkpoints(tmp_path / "there", 2)
    assert checkpoints.find("never") is None
    assert checkpoints.find("auto") is None
    assert checkpoints.find(str(first)) == first
    here = Checkpoints(tmp_path / "here", 2)
    assert here.find("auto") == second
    assert here.find(str(first)) == first
    with pytest.raises(GazeError, match="resume is never"):
        here.find("never")
    flip(first / "ema-00000.safetensors", 20, 2)
    for path, says in ((first, "ema-00000.safetensors changed"), (tmp_path / "nowhere", "No such file")):
        with pytest.raises(GazeError, match=f"resume={path}.*{says}"):
            here.find(str(path))


def there(folder: Path) -> list[str]:
    """What lies there; a mark of its own is left out."""
    return sorted(re.sub("-[0-9a-f]{8}$", "", path.name) for path in folder.iterdir() if path.is_dir())


def test_going_back_sets_the_newer_ones_aside_and_the_same_command_goes_on(tmp_path):
    first, *_ = write(tmp_path, 8, 16, 24, 32)

    def go_back(processes: Processes) -> list[Path]:
        checkpoints = Checkpoints(tmp_path, 2, processes)
        found = [checkpoints.find(str(first))]
        checkpoints.save(16, tensors(-16), STATE)
        return found + [Checkpoints(tmp_path, 2, processes).find(resume) for resume in (str(first), "auto")]

    assert Checkpoints(tmp_path, 2).find(str(first)) == first
    assert len(there(tmp_path)) == 4, "to look is not to touch"
    second = tmp_path / "000000000016"
    assert together(2, go_back) == [[first, second, second]] * 2
    abandoned = [f"abandoned-{count:012d}" for count in (16, 24, 32)]
    assert there(tmp_path) == [first.name, second.name, *abandoned]
    again = Checkpoints(tmp_path, 2)
    assert again.find(str(first)) == second
    for count in (24, 32):
        again.save(count, tensors(count), STATE)
    assert not first.exists()
    assert Checkpoints(tmp_path, 2).find(str(first)).name == "000000000032", "also where it has been pruned"
    assert Checkpoints(tmp_path, 2).find(str(tmp_path / "000000000024")).name == "000000000024"
    assert there(tmp_path) == ["000000000024", "000000000032", *abandoned]


@pytest.mark.parametrize("dies", ["_write_flushed", "write_share"])
def test_killed_while_it_goes_back_it_goes_back_again(tmp_path, monkeypatch, dies):
    (given,) = write(tmp_path / "other", 16)
    older, newer = write(tmp_path / "run", 8, 24)

    def die(*_: object) -> NoReturn:
        raise Died

    checkpoints = Checkpoints(tmp_path / "run", 2)
    assert checkpoints.find(str(given)) == given
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, dies, die)
        with pytest.raises(Died):
            checkpoints.save(24, tensors(-24), STATE)
    assert there(tmp_path / "run") == [older.name, f"abandoned-{newer.name}"]
    checkpoints = Checkpoints(tmp_path / "run", 2)
    assert checkpoints.find(str(given)) == given
    checkpoints.save(24, tensors(-24), STATE)
    assert Checkpoints(tmp_path / "run", 2).find(str(given)) == newer


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (path,) = write(tmp_path, 8)
    (tmp_path / ".tmp-16-ab").mkdir()
    (tmp_path / ".tmp-16-ab" / "model.safetensors").touch()
    (tmp_path / "notes").mkdir()
    assert newest(tmp_path) == path
    assert (tmp_path / ".tmp-16-ab").exists(), "to look is not to touch: a run may be writing it"
    Checkpoints(tmp_path, 2).remove_leftovers(16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000008", "notes"]


def test_what_a_killed_run_had_no_time_to_remove_is_removed(tmp_path):
    write(tmp_path, 8, 16, 24, keep=3)
    Checkpoints(tmp_path, 2).remove_leftovers(24)
    assert [path.name for path in folders(tmp_path)] == ["000000000024", "000000000016"]


@pytest.mark.parametrize(
    "option, open_it",
    [
        ("out", lambda folder, processes: open_folder(tiny_recipe(folder, folder), processes)),
        ("data.cache", Store),
    ],
)
def test_machines_that_see_different_folders_are_told(tmp_path, option, open_it):
    (tmp_path / "0").mkdir()

    def work(processes: Processes) -> str:
        with pytest.raises(GazeError) as error:
            open_it(tmp_path / str(processes.rank // 2), processes)
        return str(error.value)

    for said in together(3, work):
        assert "process 2 does not see what process 0 writes" in said
        assert f"{option}=DIR on a file system that all machines share" in said
    assert list((tmp_path / "0").iterdir()) == []


# What is broken is found


@pytest.mark.parametrize("name", ["model-00000.safetensors", "ema-00000.safetensors", MANIFEST])
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
    (path, *_) = together(2, lambda rank: write(tmp_path, 8, processes=rank)[0])
    sizes = {file: file.stat().st_size for file in path.iterdir()}
    chance = random.Random(0)
    places = [(file, position, bit) for file in sizes for position in range(sizes[file]) for bit in range(8)]
    manifest = [place for place in places if place[0].name == MANIFEST]  # nothing else vouches for it
    for file, position, bit in chance.sample(places, 150) + chance.sample(manifest, 150):
        flip(file, position, bit)
        assert verify(path) is not None, (file.name, position, bit)
        flip(file, position, bit)
    assert verify(path) is None


def test_a_file_that_does_not_belong_is_found(tmp_path):
    (path,) = write(tmp_path, 8)
    shutil.copy(path / "ema-00000.safetensors", path / "more.safetensors")
    assert "more.safetensors" in verify(path)
    (other,) = write(tmp_path, 16)
    shutil.rmtree(path)
    other.rename(path)
    assert "16 pictures under another name" in verify(path)


def test_an_earlier_format_is_named(tmp_path):
    (path,) = write(tmp_path, 8)
    (path / MANIFEST).write_text(json.dumps({"format": 1, "pictures": 8, "files": {}}))
    assert "format 1, of an earlier version" in verify(path)
    with (
        pytest.warns(UserWarning, match=r"passed over.*an earlier"),
        pytest.raises(GazeError, match=r"none of.*an earlier"),
    ):
        newest(tmp_path)


def test_a_checkpoint_of_a_later_version_is_neither_passed_over_nor_replaced(tmp_path):
    _, path = write(tmp_path, 8, 16)
    (path / MANIFEST).write_bytes(checkpoint_files._sealed({"format": 3, "pictures": 16, "files": {}}))
    assert "format 3, of a later version" in verify(path)
    with pytest.raises(GazeError, match=f"{path} cannot be used: it has format 3, of a later version") as error:
        newest(tmp_path)
    assert "another out=DIR" in error.value.hint
    (path / MANIFEST).write_text(json.dumps({"format": 3, "pictures": 16, "files": {}}))
    with pytest.warns(UserWarning, match="changed since it was written"):
        assert newest(tmp_path).name == "000000000008", "a flipped bit makes a 3 of a 2"


def test_a_manifest_that_is_no_json_is_named(tmp_path):
    (path,) = write(tmp_path, 8)
    (path / MANIFEST).write_text("x")
    assert verify(path).startswith("manifest.json is no JSON")


def test_with_none_whole_the_user_decides(tmp_path):
    for path in write(tmp_path, 8, 16):
        (path / "model-00000.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(GazeError, match="none of the 2"):
        newest(tmp_path)


def test_another_recipe_is_refused_by_the_keys_that_differ(tmp_path):
    (path,) = write(tmp_path / "checkpoints", 8)
    now = {"identity": "other", "recipe": {"seed": 0, "optimizer": {"learning_rate": 2e-3}, "new": [1]}}
    with pytest.raises(GazeError, match=r"another recipe: optimizer\.learning_rate 0\.001, now 0\.002; ") as error:
        load(path, now)
    assert "optimizer.clip 1.0, now null; new null, now [1]" in error.value.problem
    assert str(tmp_path / "recipe.yaml") in error.value.hint
    with pytest.raises(GazeError, match="over other data"):
        load(path, STATE | {"identity": "recipe-of-other-data"})
    many = {str(number): number for number in range(9)}
    assert differences(many, {}).endswith("and 4 more")


# What cannot be written


def test_a_full_disk_is_a_warning_twice_and_then_an_error(tmp_path, monkeypatch):
    (path,) = write(tmp_path, 8)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(100, 99, 100))
    checkpoints = Checkpoints(tmp_path, 2)
    for count in (16, 24):
        with pytest.warns(
            UserWarning, match=rf"{count} cannot be written.*no space.*needed: \d+ bytes, free: 100 byte"
        ):
            assert checkpoints.save(count, tensors(count), STATE) is None
    with pytest.raises(
        NotSaved, match=r"000000000032 cannot be written.*no space.*needed: 103 bytes, free: 100"
    ) as error:
        checkpoints.save(32, tensors(32), STATE)
    assert error.value.exit_code == 74
    with pytest.raises(NotSaved):
        Checkpoints(tmp_path, 2).save(16, tensors(16), STATE, last=True)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    assert verify(path) is None


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_on_one_process_is_retried_then_told_by_all(tmp_path, monkeypatch, failing):
    together(3, lambda rank: write(tmp_path, 8, processes=rank))
    write_flushed, failures = checkpoint_files._write_flushed, []

    def broken(path: Path, parts):
        if threading.current_thread().name == str(failing) and left:
            left.pop()
            raise OSError(28, "No space left on device", str(path))
        return write_flushed(path, parts)

    monkeypatch.setattr(checkpoint_files, "_write_flushed", broken)
    left = [None]
    (path, *_) = together(3, lambda rank: write(tmp_path, 16, processes=rank)[0])
    assert path.name == "000000000016", "the second attempt is as good as the first"
    left = [None] * 4

    def work(processes: Processes) -> list[str | None]:
        checkpoints = Checkpoints(tmp_path, 9, processes)
        saved = [checkpoints.save(count, tensors(count), STATE) for count in (24, 32, 40)]
        failures.append(checkpoints.failed)
        return [path and path.name for path in saved]

    with pytest.warns(UserWarning, match=f"in process {failing}, OSError.*No space left") as told:
        assert together(3, work) == [[None, None, "000000000040"]] * 3
    assert len(told) == 2, "by the first process alone"
    assert failures == [0, 0, 0], "counted in a row"
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [8, 16, 40]


def test_what_reads_back_otherwise_is_not_saved(tmp_path, monkeypatch):
    write(tmp_path, 8)
    describe = checkpoint_files._described
    monkeypatch.setattr(checkpoint_files, "_described", lambda path: describe(path) | {"bytes": 1})
    with pytest.raises(NotSaved, match=r"read again after writing: .*changed"):
        Checkpoints(tmp_path, 2).save(16, tensors(16), STATE, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000008"]


def fill(folder: Path) -> None:
    """In a process of its own: the system refuses every byte past a limit, at 100 places of a save."""
    warnings.simplefilter("ignore")
    first, second = write(folder, 8, 16, keep=2)
    longest = max(file.stat().st_size for file in second.iterdir())
    for place in range(100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest * place // 100, resource.RLIM_INFINITY))
        checkpoints = Checkpoints(folder, 2)
        assert checkpoints.save(24, tensors(24), STATE) is None
        with pytest.raises(NotSaved, match=r"000000000032 cannot be written: .*File too large.*needed: .* bytes, free"):
            checkpoints.save(32, tensors(32), STATE, last=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert [verify(first), verify(second)] == [None, None]
        assert sorted(path.name for path in folder.iterdir()) == [first.name, second.name]
    assert write(folder, 24, keep=2)[0] == newest(folder)


def test_refused_at_100_places_of_a_save_the_old_ones_stand(tmp_path):
    process = PROCESSES.Process(target=fill, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


# Whole runs


def test_a_run_goes_on_past_a_failed_save_and_ends_at_a_failed_last_one(tmp_path, monkeypatch):
    pictures = make_pictures(tmp_path / "pictures")
    straight = tiny_recipe(tmp_path / "straight", pictures, pictures=48)
    run_here(straight)
    recipe = tiny_recipe(tmp_path / "run", pictures, pictures=48)
    publish = checkpoint_files.publish

    def full(aside: Path, final: Path, manifest) -> None:
        if int(final.name) in fails:
            raise OSError(28, "No space left on device")
        publish(aside, final, manifest)

    monkeypatch.setattr(checkpoint_files, "publish", full)
    fails = (16, 48)
    with pytest.warns(UserWarning, match="000000000016 cannot be written"), pytest.raises(NotSaved, match="No space"):
        run_here(recipe)
    assert [path.name for path in (recipe.out / "checkpoints").iterdir()] == ["000000000032"]
    fails = ()
    run_here(recipe)
    assert newest_files(recipe.out) == newest_files(straight.out)


def test_a_run_begins_from_the_checkpoint_it_is_given(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "pictures")
    straight = tiny_recipe(tmp_path / "straight", pictures, pictures=48)
    run_here(straight)
    given = straight.out / "checkpoints" / "000000000032"
    run_here(tiny_recipe(tmp_path / "run", pictures, pictures=48, resume=str(given)))
    assert f"resumed from {given}" in capsys.readouterr().err
    assert there(tmp_path / "run" / "checkpoints") == ["000000000048"]
    assert newest_files(tmp_path / "run") == newest_files(straight.out)
    other = tiny_recipe(tmp_path / "other", pictures, pictures=48, resume=str(given), seed=3)
    with pytest.raises(GazeError, match="another recipe: seed 0, now 3"):
        run_here(other)


# Where it may die


class Died(BaseException):
    pass


class Dying:
    """Lets one thread die at one of its writes, flushes, renames and removals; half of a write is done. What it would
    do after that fails too."""

    def __init__(self, monkeypatch, thread: str):
        self.thread, self.calls, self.left = thread, 0, 10_000
        for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))
        plain, meet, die = Path.open, self.meet, self.die

        class File(io.FileIO):
            def write(self, part) -> int:
                if meet():
                    super().write(memoryview(part)[: len(part) // 2])
                    die()
                return super().write(part)

        monkeypatch.setattr(Path, "open", lambda path, mode: File(path, "w") if mode == "wb" else plain(path, mode))

    def meet(self) -> bool:
        """Whether this call is one that the thread does not live to see."""
        here = threading.current_thread().name == self.thread
        self.calls += here
        return here and self.calls > self.left

    def die(self) -> NoReturn:
        raise Died

    def guard(self, function):
        def call(*arguments, **options):
            if self.meet():
                self.die()
            return function(*arguments, **options)

        return call


@pytest.mark.parametrize("processes, victim", [(1, 0), (2, 0), (2, 1)])
def test_dying_at_any_write_flush_or_rename_of_a_save_leaves_two_sound_checkpoints(
    tmp_path, monkeypatch, processes, victim
):
    dying = Dying(monkeypatch, str(victim))
    places = 0
    while True:
        folder = tmp_path / str(places)
        dying.left = 10_000
        together(processes, lambda rank, to=folder: write(to, 8, 16, keep=2, processes=rank))
        dying.calls, dying.left = 0, places
        try:
            together(processes, lambda rank, to=folder: write(to, 24, keep=2, processes=rank))
        except Died:
            dying.left = 10_000
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert newest(folder) is not None
            sound = [path for path in folder.glob("[0-9]*") if verify(path) is None]
            assert len(sound) == len(list(folder.glob("[0-9]*"))) >= 2
            places += 1
        else:
            break
    dying.left = 10_000
    assert places >= (7 if victim else 20)
    assert sorted(path.name for path in folder.iterdir()) == ["000000000016", "000000000024"]


# Real processes


def two(rank: int, port: int, folder: Path) -> None:
    """Trains a sharded module beside a whole one, saves it, reads it back in shards, and fails on rank 1 alone."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    processes = Processes(rank, 2)
    stored: list[checkpoint_files.Tensors] = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        if sharded:
            fully_shard(module, mesh=mesh)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        torch.manual_seed(1)
        module(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        names = {parameter: name for name, parameter in module.named_parameters()}
        state = {f"{names[p]}:{key}": value for p, values in optimizer.state.items() for key, value in values.items()}
        stored.append({"model": module.state_dict(), "optimizer": state})
    whole, shards = stored
    checkpoints = Checkpoints(folder / "checkpoints", 9, processes)
    assert checkpoints.find("auto") is None
    path = checkpoints.save(8, shards, STATE)
    found, _ = load(path, STATE)
    for stem, values in whole.items():
        assert found[stem].keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(found[stem][name], value)
            again = parted_like(shards[stem][name], found[stem][name])
            assert type(again) is type(shards[stem][name])
            local = [
                tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in (again, shards[stem][name])
            ]
            assert torch.equal(*local)
    alone = Checkpoints(folder / f"alone-{rank}", 9).save(8, found, STATE)
    assert Checkpoints(folder / "checkpoints", 9, processes).find(str(alone.parents[1] / "alone-0" / alone.name))

    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    assert [checkpoints.save(count, shards, STATE) for count in (16, 24)] == [None, None]
    with pytest.raises(NotSaved, match=r"in process 1, OSError.*File too large"):
        checkpoints.save(32, shards, STATE)
    assert Checkpoints(folder / "checkpoints", 9, processes).newest() == path
    torch.distributed.destroy_process_group()


def test_two_processes_with_sharded_tensors_agree(tmp_path):
    port = free_port()
    processes = [PROCESSES.Process(target=two, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found, _ = load(tmp_path / "checkpoints" / "000000000008", STATE)
    same(found, load(tmp_path / "alone-0" / "000000000008", STATE)[0])
