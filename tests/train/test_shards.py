"""Tar shards: what is packed comes back, other programs can read it, and nothing broken or hostile goes unseen."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from diffusion.errors import GazeError
from tests.pictures import odd_folder, picture
from tests.train.tiny import PROCESSES, make_pictures, tiny_recipe
from train.data import pack as packing
from train.data import remote
from train.data.check import check
from train.data.command import main
from train.data.folder import Folder
from train.data.look import look
from train.data.open import open_source
from train.data.pack import pack
from train.data.shards import Shards, _lines

COUNT, SIZE = 25, 10  # pictures, and those of a shard


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures") / "data", COUNT)


@pytest.fixture(scope="module")
def packed(pictures, tmp_path_factory):
    """No test changes it."""
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(Folder(pictures), out, SIZE)
    return out


@pytest.fixture
def copied(packed, tmp_path):
    return copy(packed, tmp_path / "copied")


def copy(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(folder):
    return Shards(str(folder), folder / "cache")


def problems(folder):
    return list(check(opened(folder)))


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# What is packed comes back


def test_what_is_packed_comes_back(pictures, packed):
    source, _ = look(Folder(pictures))
    shards = opened(packed)
    assert (len(shards), list(shards.blocks)) == (COUNT, [10, 10, 5])
    for index, record in enumerate(source):
        assert shards[index][1:] == record[1:]
        assert shards[index].name == f"{index // SIZE:05d}.tar/{index:09d}.png"
        assert shards.read(index) == source.read(index)
    visits = [sum(record.repeats for record in list(source)[start : start + SIZE]) for start in (0, 10, 20)]
    assert [shard.visits for shard in shards.shards] == visits
    assert sorted(path.name for path in packed.iterdir()) == sorted(
        ["manifest.json", "skipped.txt"] + [f"{n:05d}.{kind}" for n in range(3) for kind in ("tar", "jsonl")]
    )
    assert problems(packed) == []


def test_the_recipe_opens_shards(packed, tmp_path):
    recipe = tiny_recipe(tmp_path, None, data={"shards": str(packed)})
    source = open_source(recipe)
    assert [source.read(index) for index in (24, 0, 11)] == [opened(packed).read(index) for index in (24, 0, 11)]
    assert not (tmp_path / "skipped.txt").exists()


def test_the_same_pictures_give_the_same_bytes(pictures, packed, tmp_path):
    moved = copy(pictures, tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    pack(Folder(moved), tmp_path / "out", SIZE, workers=2)
    assert files(tmp_path / "out") == files(packed)


def test_the_fingerprint_is_of_the_content(pictures, packed, tmp_path):
    pack(Folder(pictures), tmp_path / "same", SIZE)
    assert opened(tmp_path / "same").fingerprint() == opened(packed).fingerprint()
    other = copy(pictures, tmp_path / "other")
    picture(99).save(other / "3.png")
    pack(Folder(other), tmp_path / "changed", SIZE)
    assert opened(tmp_path / "changed").fingerprint() != opened(packed).fingerprint()


def webdataset(file, regex=re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")):
    """Samples of a tar stream as WebDataset groups them: consecutive members whose names agree up to the first dot."""
    sample = {}
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            if not member.isreg():
                continue
            key, suffix = regex.match(member.name).groups()
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            sample |= {"__key__": key, suffix.lower(): tar.extractfile(member).read()}
    if sample:
        yield sample


def test_other_programs_read_the_shards(pictures, packed):
    source, _ = look(Folder(pictures))
    samples = [sample for path in sorted(packed.glob("*.tar")) for sample in webdataset(io.BytesIO(path.read_bytes()))]
    assert len(samples) == COUNT
    for sample, index in zip(samples, range(COUNT), strict=True):
        record = source[index]
        assert sample["png"] == source.read(index)
        assert sample["txt"].decode() == record.captions[0]
        told = json.loads(sample["json"])
        assert (told["captions"], told["repeats"], told["name"]) == ([*record.captions], record.repeats, record.name)
        assert (told["sha256"], told["height"], told["width"]) == (record.key, 16, 16)


def test_what_does_not_decode_is_left_out(tmp_path):
    good, bad = odd_folder(tmp_path / "data", 140, 12)
    assert main(["pack", str(tmp_path / "data"), str(tmp_path / "out"), "--shard-size", "50", "--workers", "2"]) == 0
    shards = opened(tmp_path / "out")
    assert [json.loads(line)["name"] for shard in shards.shards for line in shards.lines(shard)] == good
    assert [line.split(": ")[0] for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()] == bad
    assert problems(tmp_path / "out") == []
    suffixes = Counter(Path(shards[index].name).suffix for index in range(len(shards)))
    assert suffixes == Counter({".png": len(good) - 3, ".jpg": 2, ".gif": 1})


def test_shards_can_be_packed_again(packed, tmp_path):
    assert main(["pack", str(packed), str(tmp_path / "out"), "--shard-size", "7", "--workers", "0"]) == 0
    again, before = opened(tmp_path / "out"), opened(packed)
    assert list(again.blocks) == [7, 7, 7, 4]
    assert [again[index][1:] for index in range(COUNT)] == [before[index][1:] for index in range(COUNT)]


# Interrupted, repaired, refused


def test_an_interrupted_pack_goes_on(pictures, packed, tmp_path, monkeypatch):
    made = []
    real = packing._pack_one

    def counted(*arguments):
        if not (tmp_path / "out" / f"{arguments[-1]:05d}.json").exists():
            made.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(packing, "_pack_one", counted)
    examine = packing.examine
    monkeypatch.setattr(packing, "examine", lambda place, index: examine(place, index if index < 15 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        pack(Folder(pictures), tmp_path / "out", SIZE)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(GazeError, match=r"manifest\.json is missing"):
        opened(tmp_path / "out")
    monkeypatch.setattr(packing, "examine", examine)
    (tmp_path / "out" / ".00001.tar-0badc0de").write_bytes(b"left by a kill")
    made.clear()
    pack(Folder(pictures), tmp_path / "out", SIZE)
    assert made == [1, 2]
    assert files(tmp_path / "out") == files(packed)
    made.clear()
    pack(Folder(pictures), tmp_path / "out", SIZE)
    assert files(tmp_path / "out") == files(packed)


def _pack_slowly(pictures, out):
    examine = packing.examine
    packing.examine = lambda place, index: time.sleep(0.004) or examine(place, index)
    pack(Folder(pictures), out, SIZE)


def test_a_killed_pack_goes_on(pictures, packed, tmp_path):
    killed = 0
    for attempt in range(8):
        process = PROCESSES.Process(target=_pack_slowly, args=(pictures, tmp_path / "out"))
        process.start()
        process.join(0.03 + 0.03 * attempt)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        if (tmp_path / "out" / "manifest.json").exists():
            assert problems(tmp_path / "out") == []
    assert killed
    pack(Folder(pictures), tmp_path / "out", SIZE)
    assert files(tmp_path / "out") == files(packed)


def test_a_pack_killed_at_its_first_file_goes_on(pictures, packed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".unfinished.json-0123abcd").write_text("{")
    pack(Folder(pictures), out, SIZE)
    assert files(out) == files(packed)


def test_too_many_broken_ones_stop_the_pack_and_repaired_it_goes_on(pictures, packed, tmp_path):
    data = copy(pictures, tmp_path / "data")
    for name in ("3.png", "4.png"):
        (data / name).write_bytes(b"")
    with pytest.raises(GazeError, match=r"2 of 25 pictures .*first 3\.png"):
        pack(Folder(data), tmp_path / "out", SIZE)
    assert not (tmp_path / "out" / "manifest.json").exists()
    for name in ("3.png", "4.png"):
        (data / name).write_bytes((pictures / name).read_bytes())
    pack(Folder(data), tmp_path / "out", SIZE)
    assert files(tmp_path / "out") == files(packed)


def test_a_folder_with_something_else_is_not_written_to(pictures, copied, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(GazeError, match="something else than shards"):
        pack(Folder(pictures), tmp_path / "full", SIZE)
    before = files(copied)
    with pytest.raises(GazeError, match="other pictures, captions or shard size"):
        pack(Folder(pictures), copied, SIZE + 1)
    assert files(copied) == before
    with pytest.raises(GazeError, match="shard size is 0"):
        pack(Folder(pictures), tmp_path / "none", 0)
    (tmp_path / "file").touch()
    with pytest.raises(GazeError, match="cannot be written"):
        pack(Folder(pictures), tmp_path / "file", SIZE)


def test_a_full_disk_is_named(pictures, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "sha256_of", full)
    with pytest.raises(GazeError, match=r"(?s)out cannot be written: No space left.*goes on"):
        pack(Folder(pictures), tmp_path / "out", SIZE)


# Broken and hostile (D4)


def test_a_shard_cut_anywhere_is_refused(copied):
    tar = copied / "00001.tar"
    whole = tar.read_bytes()
    for end in range(0, len(whole), 64):
        tar.write_bytes(whole[:end])
        with pytest.raises(GazeError, match=rf"00001\.tar has {end} bytes, its manifest says {len(whole)}"):
            opened(copied)
    tar.write_bytes(whole)
    index = copied / "00000.jsonl"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(GazeError, match=r"00000\.jsonl has"):
        opened(copied)
    index.unlink()
    with pytest.raises(GazeError, match=r"00000\.jsonl is missing"):
        opened(copied)
    tar.unlink()
    with pytest.raises(GazeError, match="missing"):
        opened(copied)


def test_a_changed_byte_is_found(copied):
    shards = opened(copied)
    line = shards.line(shards.shards[1], 4)
    for position in (line.offset, line.offset + line.size - 1):
        change(copied / "00001.tar", position)
        with pytest.raises(GazeError, match=r"00001\.tar: 000000014\.png is not what its manifest says"):
            shards.read(14)
        assert shards.read(13)
        found = problems(copied)
        assert found[0] == "00001.tar: its sha256 is not the manifest's"
        assert "00001.tar: 000000014.png: its sha256 is not the index's" in found
        change(copied / "00001.tar", position)
    assert problems(copied) == []
    change(copied / "00000.jsonl", 30)
    _lines.cache_clear()
    with pytest.raises(GazeError, match="not the index that the manifest names"):
        opened(copied)[0]
    assert any("not the index" in problem for problem in problems(copied))


def change(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


HOSTILE = {
    "duplicate": (member("000000000.png", b"again"), "'000000000.png' is there 2 times, not 1"),
    "outside": (member("../x.png", b"x"), r"'\.\./x\.png' is no KEY"),
    "absolute": (member("/tmp/x.png", b"x"), r"'/tmp/x\.png' is no KEY"),
    "symlink": (member("000000099.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link, folder or device"),
    "hardlink": (member("000000099.png", type=tarfile.LNKTYPE, linkname="../../x"), "is a link, folder or device"),
    "device": (member("000000099.png", type=tarfile.CHRTYPE, devmajor=1), "is a link, folder or device"),
    "pickle": (member("000000000.pickle", b"cos\nsystem\n."), r"'000000000\.pickle' is no KEY"),
    "pyd": (member("000000000.pyd", b"cos\nsystem\n."), r"'000000000\.pyd' is no KEY"),
    "pth": (member("000000000.pth", b"cos\nsystem\n."), r"'000000000\.pth' is no KEY"),
    "unnamed": (member("000000099.png", b"x"), "'000000099.png' is there 1 times, not 0"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_found(copied, kind):
    (info, content), says = HOSTILE[kind]
    with tarfile.open(copied / "00000.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    if (copied / "00000.tar").stat().st_size != opened_size(copied):
        with pytest.raises(GazeError, match=r"00000\.tar has"):
            opened(copied)
    agree(copied)  # the stranger also wrote the manifest
    before = sorted(copied.parent.rglob("*"))
    found = problems(copied)
    assert any(re.search(says, problem) for problem in found), found
    assert opened(copied).read(0)
    assert sorted(copied.parent.rglob("*")) == before


def opened_size(folder):
    return json.loads((folder / "manifest.json").read_text())["shards"][0]["bytes"]


def agree(folder, **first):
    """Makes the manifest agree with the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        tar, index = (folder / f"{shard['name']}.{kind}" for kind in ("tar", "jsonl"))
        shard |= {"bytes": tar.stat().st_size, "sha256": sha256(tar.read_bytes())}
        shard |= {"index_bytes": index.stat().st_size, "index_sha256": sha256(index.read_bytes())}
    manifest["shards"][0] |= first
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"key": "../x"}, "key"),
        ({"suffix": "pickle"}, "suffix"),
        ({"offset": -1}, "offset"),
        ({"size": 10**30}, "size"),
        ({"captions": []}, "captions"),
        ({"captions": [5]}, "captions"),
        ({"sha256": "0"}, "sha256"),
        ({"height": 0}, "height"),
        ({"repeats": 1.5}, "repeats"),
        ({"repeats": 2**32}, "repeats"),
        ({"more": 1}, "more"),
    ],
)
def test_a_hostile_index_is_refused(copied, change, says):
    index = copied / "00000.jsonl"
    lines = index.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    index.write_text("\n".join(lines) + "\n")
    agree(copied)
    shards = opened(copied)
    assert shards[2].captions
    for action in (shards.__getitem__, shards.read):
        with pytest.raises(GazeError, match=rf"00000\.jsonl, line 4 is not as .*{says}"):
            action(3)
    assert problems(copied)


def test_an_index_with_a_key_twice_or_other_counts_is_found(copied):
    index = copied / "00000.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")
    agree(copied, visits=99)
    found = "\n".join(problems(copied))
    assert "key 000000000 occurs 2 times" in found
    assert "the manifest says 99 visits" in found
    assert "'000000009.png' is there 1 times, not 0" in found
    index.write_text("\n".join(lines[:-1]) + "\n")
    agree(copied)
    assert any("the manifest says 10 pictures, the index has 9" in problem for problem in problems(copied))
    with pytest.raises(GazeError, match="line 10"):
        opened(copied)[9]


def test_a_wrong_size_of_a_picture_and_a_stray_shard_are_found(copied):
    index = copied / "00000.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"height": 17}), *lines[1:]]) + "\n")
    agree(copied)
    (copied / "00007.tar").touch()
    found = problems(copied)
    assert found == ["00007.tar: the manifest does not name it", "00000.tar: 000000000.png: its size is not 17 x 16"]
    assert main(["check", str(copied), "--workers", "0"]) == 1


@pytest.mark.parametrize(
    "manifest, says",
    [
        ("", "not as"),
        ("[]", "not as"),
        ("[" * 100_000, "not as"),
        ('{"format": 2, "new": 1}', "of format 2; this version reads 1"),
        ('{"format": 1}', "source: Field required"),
        ('{"format": "1", "source": "", "shard_size": 1, "shards": []}', "format"),
    ],
)
def test_a_manifest_that_is_none(copied, manifest, says):
    (copied / "manifest.json").write_text(manifest)
    with pytest.raises(GazeError, match=says) as error:
        opened(copied)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "", ".", "a\n"])
def test_a_shard_of_a_hostile_name_is_refused(copied, name):
    agree(copied, name=name)
    with pytest.raises(GazeError, match=r"shards\.0\.name"):
        opened(copied)


def test_no_shards_at_all(copied, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    with pytest.raises(GazeError, match="holds no picture"):
        open_source(tiny_recipe(tmp_path, None, data={"shards": str(copied)}))
    with pytest.raises(GazeError, match=r"manifest\.json is missing.*\n.*data pack"):
        open_source(tiny_recipe(tmp_path, None, data={"shards": str(tmp_path / "none")}))


# At an address


@pytest.fixture
def url(packed):
    """The shards in fsspec's memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    memory.rm("/shards", recursive=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("cache", [None, "kept"])
def test_shards_of_a_url_are_fetched_once_and_kept(packed, url, tmp_path, cache, monkeypatch):
    fetched = []
    download = remote._download
    monkeypatch.setattr(remote, "_download", lambda url, *rest: fetched.append(url) or download(url, *rest))
    recipe = tiny_recipe(tmp_path / "run", None, data={"shards": url, "cache": cache and tmp_path / cache})
    for _ in range(2):
        source = open_source(recipe)
        local = opened(packed)
        assert [source[index] for index in range(COUNT)] == [local[index] for index in range(COUNT)]
        assert source.read(12) == local.read(12)
        assert source.fingerprint() == local.fingerprint()
    assert sorted(Path(name).name for name in fetched) == ["00000.jsonl", "00001.jsonl", "00001.tar", "00002.jsonl"]
    kept = tmp_path / (cache or "run/cache") / "shards"
    assert sorted(path.stem for path in kept.glob("[!.]*")) == sorted(
        [shard.index_sha256 for shard in local.shards] + [local.shards[1].sha256]
    )
    assert list(check(Shards(url, kept))) == []


def test_a_shard_of_other_content_is_not_kept(url, tmp_path, impatient):
    import fsspec

    memory = fsspec.filesystem("memory")
    whole = memory.cat("/shards/00000.tar")
    for content in (whole[:-1], whole + b"\0", b"\1" + whole[1:], b""):
        memory.pipe("/shards/00000.tar", content)
        with pytest.raises(GazeError, match=r"00000\.tar is not what its manifest says"):
            Shards(url, tmp_path).read(0)
        assert [path.suffix for path in tmp_path.glob("[!.]*")] == [".jsonl"]
    memory.rm("/shards/00000.tar")
    with pytest.raises(GazeError, match=r"00000\.tar cannot be read: FileNotFoundError"):
        Shards(url, tmp_path).read(0)


def test_addresses_that_do_not_answer(tmp_path, impatient):
    for place, says in {
        "memory://nothing/here": r"manifest\.json cannot be read: FileNotFoundError",
        "noprotocol://x": "Protocol not known: noprotocol",
    }.items():
        with pytest.raises(GazeError, match=says) as error:
            Shards(place, tmp_path)
        assert len(str(error.value).splitlines()) <= 3


def test_a_network_that_fails_for_a_while_is_asked_again(url, tmp_path, monkeypatch):
    attempts, pauses = [], []
    download = remote._download

    def failing(*arguments):
        attempts.append(arguments)
        if len(attempts) < 3:
            raise ConnectionResetError("reset by peer")
        download(*arguments)

    monkeypatch.setattr(remote, "_download", failing)
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert Shards(url, tmp_path)[0].captions
    assert pauses == [1.0, 5.0]
    attempts[:] = [()] * -10
    monkeypatch.setattr(remote, "_download", lambda *_: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
    with pytest.raises(GazeError, match="ConnectionResetError: reset by peer"):
        Shards(url, tmp_path)[COUNT - 1]


class Answer(Exception):
    """As aiohttp's error of a status."""

    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize(
    "cause, asked",
    [
        (ConnectionRefusedError("refused"), 3),
        (Answer(503), 3),
        (Answer(404), 1),
        (None, 1),
        (FileNotFoundError("x"), 1),
    ],
)
def test_over_http_a_server_that_does_not_answer_is_asked_again(impatient, monkeypatch, cause, asked):
    """Of all that happens over HTTP fsspec says that there is no such file, and only the cause tells."""
    attempts = []

    def fail(url):
        attempts.append(url)
        raise FileNotFoundError(url) from cause

    monkeypatch.setattr(remote, "_read", fail)
    with pytest.raises(GazeError, match=type(cause or FileNotFoundError()).__name__):
        remote.fetch_text("http://x.example/manifest.json")
    assert len(attempts) == asked


def test_the_oldest_make_room(url, tmp_path, monkeypatch):
    shards = Shards(url, tmp_path)
    for index in (0, 10):
        shards.read(index)
    old, new = (tmp_path / f"{shard.sha256}.tar" for shard in shards.shards[:2])
    for path in tmp_path.glob("[!.]*"):
        os.utime(path, (2, 2))
    os.utime(old, (1, 1))
    usage = type(remote.shutil.disk_usage("/"))
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage(0, 0, 0 if old.exists() else 2**40))
    shards.read(20)
    assert (old.exists(), new.exists()) == (False, True)
    assert shards.read(0)


def test_without_fsspec(url, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(GazeError, match=r"needs fsspec.*\n.*pip install -e '\.\[shards\]'"):
        Shards(url, tmp_path)


def test_pictures_of_a_real_format_get_its_suffix(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "really.png", "WEBP")
    (tmp_path / "data" / "really.txt").write_text("a")
    pack(Folder(tmp_path / "data"), tmp_path / "out")
    assert opened(tmp_path / "out")[0].name == "00000.tar/000000000.webp"
