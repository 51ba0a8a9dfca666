"""Captioned pictures from a folder, which of them decode, and the order in which a run sees them."""

import json
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from diffusion.errors import GazeError
from tests.pictures import odd_folder
from tests.train.tiny import make_pictures, tiny_recipe
from train.data import look as looking
from train.data.command import main
from train.data.folder import Folder
from train.data.look import look, refuse_many
from train.data.open import open_source
from train.data.source import Entry, Skipped


def write(folder: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


# What a folder says


def test_metadata_gives_captions_and_repeats_in_its_order(tmp_path):
    strange = "a\u2028b\x85c \u00e9 😀\0"  # two separators that are line ends to str.splitlines
    write(
        tmp_path,
        {"file_name": "b.png", "text": ["one", "two"], "repeats": 3},
        "",
        {"file_name": "sub/a.png", "text": strange, "tags": 5},
        {"file_name": "c.png", "text": "", "repeats": 0},
        {"file_name": "d.png"},
        {"file_name": "e.png", "text": None},
        '{"file_name": "f.png", "text": "\\ud800x"}',
    )
    folder = Folder(tmp_path)
    assert list(folder) == [
        Entry("b.png", ("one", "two"), 3),
        Entry("sub/a.png", (strange,), 1),
        Entry("c.png", ("",), 0),
        Entry("d.png", ()),
        Entry("e.png", ()),
        Entry("f.png", ("?x",)),
    ]
    assert (len(folder), folder.blocks) == (6, [6])


def test_a_byte_order_mark_is_no_content(tmp_path):
    line = json.dumps({"file_name": "a.png", "text": "one"})
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert list(Folder(tmp_path)) == [Entry("a.png", ("one",))]


@pytest.mark.parametrize(
    "row, says",
    [
        ("{not json", "JSON"),
        ("[1]", "JSON"),
        ("5", "JSON"),
        ("[" * 100_000, "JSON"),
        ({"text": "a"}, "file_name"),
        ({"file_name": 5, "text": "a"}, "file_name"),
        ({"file_name": "a\0.png", "text": "a"}, "null"),
        ({"file_name": "a.png", "text": 5}, "caption"),
        ({"file_name": "a.png", "text": {"en": "a"}}, "caption"),
        ({"file_name": "a.png", "text": ["a", None]}, "caption"),
        ({"file_name": "a.png", "text": "a", "repeats": -1}, "repeats"),
        ({"file_name": "a.png", "text": "a", "repeats": "2"}, "repeats"),
        ({"file_name": "a.png", "text": "a", "repeats": 2**32}, "repeats is 4294967296"),
        ({"file_name": "../a.png", "text": "a"}, "outside"),
        ({"file_name": "/etc/a.png", "text": "a"}, "outside"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    write(tmp_path, {"file_name": "good.png", "text": "a"}, row)
    with pytest.raises(GazeError, match=r"metadata\.jsonl, line 2") as error:
        Folder(tmp_path)
    assert says in str(error.value)


def test_metadata_in_another_encoding_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(GazeError, match="line 1"):
        Folder(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(GazeError, match="outside"):
        Folder(write(tmp_path / "data", {"file_name": "a.png", "text": "a"}))


def test_text_files_beside_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.png": "two\n", "a.JPG": " one ", "sub/c.webp": "é", "d.gif": ""}.items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    expected = [Entry("a.JPG", ("one",)), Entry("b.png", ("two",)), Entry("d.gif", ("",)), Entry("sub/c.webp", ("é",))]
    assert list(Folder(tmp_path)) == expected
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(GazeError, match=r"b\.txt is not UTF-8"):
        Folder(tmp_path)
    (tmp_path / "b.txt").unlink()
    assert Folder(tmp_path)[1] == Entry("b.png", ())


def test_nothing_to_read(tmp_path):
    with pytest.raises(GazeError, match="does not exist"):
        Folder(tmp_path / "none")
    with pytest.raises(GazeError, match="no captioned picture"):
        Folder(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(GazeError, match=f"try: data.shards={tmp_path}"):
        Folder(tmp_path)


def test_a_name_that_is_not_unicode_is_read(tmp_path):
    name = os.fsdecode(b"\xff.png")
    Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    (tmp_path / name).with_suffix(".txt").write_text("a")
    source, skipped = look(Folder(tmp_path))
    assert [record.name for record in source] == ["?.png"]
    assert source.read(0) == (tmp_path / name).read_bytes()
    assert not skipped


# Which pictures decode


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # of Pillow, called by the test
def test_exactly_what_does_not_decode_is_left_out_and_listed(tmp_path):
    good, bad = odd_folder(tmp_path / "data", 140, 13)
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "data", data={"workers": 2})
    with pytest.warns(UserWarning, match=f"{len(bad)} of 140 pictures are left out, first {bad[0]}") as warned:
        source = open_source(recipe)
    assert len(warned) == 1
    assert [record.name for record in source] == good
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == bad
    assert all(line.split(": ", 1)[1] for line in listed)
    assert next(line for line in listed if "silent" in line).endswith("it has no caption")
    again, skipped = look(Folder(tmp_path / "data"))
    assert again.fingerprint() == source.fingerprint()
    assert [f"{name}: {reason}" for name, reason in skipped] == listed
    for index, record in enumerate(source):
        content = source.read(index)
        with Image.open(tmp_path / "data" / record.name) as opened:
            assert opened.size == (record.width, record.height)
        assert content == (tmp_path / "data" / record.name).read_bytes()
    assert source.blocks == [len(good)]


def test_upright_sizes_are_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (record,) = look(Folder(write(tmp_path, {"file_name": "a.jpg", "text": "a"})))[0]
    assert (record.height, record.width) == (30, 20)


def test_more_than_a_twentieth_left_out_stops_the_run(tmp_path):
    pictures = make_pictures(tmp_path / "data", 20)
    recipe = tiny_recipe(tmp_path / "run", pictures)
    (pictures / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 20"):
        assert len(open_source(recipe)) == 19
    (pictures / "5.png").unlink()
    with (
        pytest.warns(UserWarning, match="2 of 20"),
        pytest.raises(GazeError, match=r"2 of 20 .*more than 5%.*first 3\.png"),
    ):
        open_source(recipe)
    assert (tmp_path / "run" / "skipped.txt").read_text().count("\n") == 2
    refuse_many([], 0)
    with pytest.raises(GazeError, match="1 of 1"):
        refuse_many([Skipped("a", "b")], 1)


class Answers:
    """A place whose reasons say which process read."""

    blocks = (9, 100)

    def __len__(self):
        return 109

    def __getitem__(self, index):
        return Entry(f"{index}", ("a",))

    def read(self, index):
        raise GazeError(f"{os.getpid()} {index}")

    def fingerprint(self):
        return ""


def test_workers_are_processes_of_their_own():
    for workers in (0, 2):
        reasons = [item.reason.split() for item in look(Answers(), workers)[1]]
        assert [int(index) for _, index in reasons] == list(range(109))
        pids = {int(pid) for pid, _ in reasons}
        assert (os.getpid() in pids, len(pids)) == (workers == 0, max(workers, 1))


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    folder = Folder(make_pictures(tmp_path, 1))
    monkeypatch.setattr("train.data.folder.LARGEST", 50)
    with pytest.raises(GazeError, match="more than 50"):
        folder.read(0)


class Ranks:
    """Two processes, as threads that wait for each other."""

    def __init__(self):
        self.values, self.barrier = {}, threading.Barrier(2, timeout=30)

    def of(self, rank):
        ranks = self

        class One:
            count, first = 2, rank == 0

            def gather(self, value):
                ranks.values[rank] = json.dumps(value)
                ranks.barrier.wait()
                both = [json.loads(ranks.values[0]), json.loads(ranks.values[1])]
                ranks.barrier.wait()
                return both

        One.rank = rank
        return One()

    def run(self, action):
        results = {}

        def one(rank):
            try:
                results[rank] = action(self.of(rank))
            except GazeError as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results[0], results[1]


def test_processes_share_the_look(tmp_path, monkeypatch):
    odd_folder(tmp_path / "data", 101, 12)
    alone, skipped = look(Folder(tmp_path / "data"))
    seen = []
    examine = looking.examine
    monkeypatch.setattr(looking, "examine", lambda place, index: seen.append(index) or examine(place, index))
    for source, left in Ranks().run(lambda processes: look(Folder(tmp_path / "data"), 0, processes)):
        assert (list(source), left) == (list(alone), skipped)
        assert source.fingerprint() == alone.fingerprint()
    assert sorted(seen) == list(range(101))


def test_processes_that_see_other_pictures_are_told(tmp_path):
    folders = [make_pictures(tmp_path / str(rank), 4 + rank) for rank in (0, 1)]
    for error in Ranks().run(lambda processes: look(Folder(folders[processes.rank]), 0, processes)):
        assert "see different pictures" in str(error)


def test_a_picture_that_changes_later_is_named(tmp_path):
    source, _ = look(Folder(make_pictures(tmp_path, 3)))
    assert source.read(1) == (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes())
    with pytest.raises(GazeError, match=r"1\.png has changed since the run began: its content is another"):
        source.read(1)
    (tmp_path / "0.png").unlink()
    with pytest.raises(GazeError, match=r"0\.png has changed since the run began: the file cannot be read: No such"):
        source.read(0)


def test_the_fingerprint_is_of_all_that_is_known(tmp_path):
    def fingerprint(name="a.png", text="a", repeats=1, colour="red", place="x"):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(folder / name)
        return look(Folder(write(folder, {"file_name": name, "text": text, "repeats": repeats})))[0].fingerprint()

    one = fingerprint()
    assert one == fingerprint(place="moved")
    others = [fingerprint(name="b.png"), fingerprint(text="b"), fingerprint(repeats=2), fingerprint(colour="blue")]
    assert len({one, *others}) == 5


@pytest.mark.parametrize("name", ["whit", "#12", "rgb(1"])
def test_a_background_that_is_no_colour_is_refused_at_once(tmp_path, name):
    recipe = tiny_recipe(tmp_path / "run", make_pictures(tmp_path / "data"), data={"background": name})
    with pytest.raises(GazeError, match=r"data\.background"):
        open_source(recipe)


# The commands


def test_check_names_what_is_wrong_with_a_folder(tmp_path, capsys):
    pictures = make_pictures(tmp_path, 10)
    assert main(["check", str(pictures), "--workers", "0"]) == 0
    (pictures / "3.png").write_bytes(b"<html>")
    assert main(["check", str(pictures), "--workers", "0"]) == 1
    assert capsys.readouterr().out.startswith("3.png: the file cannot be read as a picture")


def test_stats_tell_sizes_shapes_captions_and_equals(tmp_path, capsys):
    sizes = {"a": (20, 10), "b": (20, 10), "c": (10, 10), "d": (10, 40), "e": (30, 20)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    (tmp_path / "f.png").touch()
    texts = {"a": "one", "b": ["one", "three"], "c": "", "d": "seventh", "e": "x" * 100, "f": "x"}
    rows = [{"file_name": f"{name}.png", "text": text, "repeats": 2} for name, text in texts.items()]
    assert main(["stats", str(write(tmp_path, *rows)), "--json", "--workers", "0"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pictures": 5,
        "visits per epoch": 10,
        "height": {"least": 10, "median": 10, "most": 40},
        "width": {"least": 10, "median": 20, "most": 30},
        "megapixels": {"least": 0.0, "median": 0.0, "most": 0.001},
        "width / height": {"0.00 to 0.50": 1, "1.00 to 1.25": 1, "1.50 to 2.00": 1, "2.00 to inf": 2},
        "captions per picture": {"least": 1, "median": 1, "most": 2},
        "characters per caption": {"least": 0, "median": 4, "most": 100},
        "empty captions": 1,
        "pictures that another one equals": 1,
        "equal pictures": [["a.png", "b.png"]],
        "left out": 1,
    }
    assert main(["stats", str(tmp_path), "--workers", "0"]) == 0
    assert "pictures: 5\n" in capsys.readouterr().out


def test_a_command_of_another_name(tmp_path):
    with pytest.raises(GazeError, match="did you mean 'pack'"):
        main(["pak"])
