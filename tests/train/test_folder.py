"""Captioned pictures from a folder."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import GazeError
from tests.train.tiny import make_pictures
from train.data.drawn import draw_folder
from train.data.folder import Entry, Folder, check, decode, read_folder
from train.data.source import Record


def write(folder: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


# What a folder says


def test_metadata_gives_captions_and_repeats_in_its_order(tmp_path):
    strange = "a\u2028b\x85c \u00e9 😀"  # two separators that are line ends to str.splitlines
    write(
        tmp_path,
        {"file_name": "b.png", "text": ["one", "two"], "repeats": 3},
        "",
        {"file_name": "sub/a.png", "text": strange, "tags": 5},
        {"file_name": "c.png", "text": "", "repeats": 0},
    )
    assert read_folder(tmp_path) == [
        Entry(tmp_path / "b.png", ("one", "two"), 3),
        Entry(tmp_path / "sub/a.png", (strange,), 1),
        Entry(tmp_path / "c.png", ("",), 0),
    ]


def test_a_byte_order_mark_is_no_content(tmp_path):
    line = json.dumps({"file_name": "a.png", "text": "one"})
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert read_folder(tmp_path) == [Entry(tmp_path / "a.png", ("one",), 1)]


@pytest.mark.parametrize(
    "row, says",
    [
        ("{not json", "JSON"),
        ("[1]", "JSON"),
        ("5", "JSON"),
        ("[" * 100_000, "JSON"),
        ({"file_name": "a.png"}, "text"),
        ({"text": "a"}, "file_name"),
        ({"file_name": 5, "text": "a"}, "file_name"),
        ({"file_name": "a\0.png", "text": "a"}, "null"),
        ({"file_name": "a.png", "text": 5}, "caption"),
        ({"file_name": "a.png", "text": {"en": "a"}}, "caption"),
        ({"file_name": "a.png", "text": []}, "caption"),
        ({"file_name": "a.png", "text": ["a", None]}, "caption"),
        ({"file_name": "a.png", "text": "a", "repeats": -1}, "repeats"),
        ({"file_name": "a.png", "text": "a", "repeats": "2"}, "repeats"),
        ({"file_name": "../a.png", "text": "a"}, "outside"),
        ({"file_name": "/etc/a.png", "text": "a"}, "outside"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    write(tmp_path, {"file_name": "good.png", "text": "a"}, row)
    with pytest.raises(GazeError, match=r"metadata\.jsonl, line 2") as error:
        read_folder(tmp_path)
    assert says in str(error.value)


def test_metadata_in_another_encoding_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(GazeError, match="line 1"):
        read_folder(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(GazeError, match="outside"):
        read_folder(write(tmp_path / "data", {"file_name": "a.png", "text": "a"}))


def test_text_files_beside_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.png": "two\n", "a.JPG": " one ", "sub/c.webp": "é"}.items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert [(entry.file.name, entry.captions) for entry in read_folder(tmp_path)] == [
        ("a.JPG", ("one",)), ("b.png", ("two",)), ("c.webp", ("é",)),
    ]  # fmt: skip
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(GazeError, match=r"b\.txt is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(GazeError, match=r"1 of 3 pictures.*b\.png"):
        read_folder(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(GazeError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(GazeError, match="no captioned picture"):
        read_folder(tmp_path)


# Decoding


def test_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert torch.allclose((decode(tmp_path / "a.png", 8)[:, 0, 0] + 1) * 127.5, torch.tensor([255.0, 127, 127]), atol=1)


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "a.png")
    assert torch.allclose((decode(tmp_path / "a.png", 8) + 1) * 127.5, torch.tensor(128.0), atol=0.01)


def test_palette_grey_and_cmyk_are_converted(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.convert("P").save(tmp_path / "p.png")
    red.convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    red.convert("L").save(tmp_path / "l.png")
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    clear.save(tmp_path / "t.png", transparency=0)
    expected = {"p.png": (255, 0, 0), "c.jpg": (255, 0, 0), "l.png": (76, 76, 76), "t.png": (255, 255, 255)}
    for name, colour in expected.items():
        assert torch.allclose((decode(tmp_path / name, 8)[:, 4, 4] + 1) * 127.5, torch.tensor(colour).float(), atol=3)


def test_exif_turns_upright_and_the_central_square_is_taken(tmp_path):
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste("black", (16, 0, 24, 16))  # left half of the central square
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        # Stored so that a reader who follows the orientation gets `wide` again.
        undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
                7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
        stored = wide.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else wide
        stored.save(tmp_path / "a.png", exif=exif)
        pixels = decode(tmp_path / "a.png", 16)
        assert pixels[:, :, :6].max() < -0.9, orientation
        assert pixels[:, :, 10:].min() > 0.9, orientation


def break_in_many_ways(folder: Path) -> list[str]:
    good = (folder / "0.png").read_bytes()
    big = Image.new("1", (9000, 9000))
    big.save(folder / "bomb.png")
    bad = {"cut.png": good[: len(good) // 2], "empty.png": b"", "page.jpg": b"<html>", "noise.png": os.urandom(99)}
    bad["program.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return [*bad, "bomb.png", "missing.png"]


def test_exactly_the_broken_ones_are_skipped(tmp_path):
    entries = read_folder(make_pictures(tmp_path, 140))
    broken = [Entry(tmp_path / name, ("",)) for name in break_in_many_ways(tmp_path)]
    good, skipped = check(entries[:70] + broken + entries[70:], 16)
    assert good == entries
    assert [item.file for item in skipped] == [entry.file for entry in broken]
    assert all(item.reason for item in skipped)


def test_more_than_a_twentieth_broken_stops_the_run(tmp_path):
    entries = read_folder(make_pictures(tmp_path, 19))
    broken = [Entry(tmp_path / f"none{i}.png", ("",)) for i in range(2)]
    assert len(check(entries + broken[:1], 16)[1]) == 1
    with pytest.raises(GazeError, match=r"2 of 21 pictures.*none0\.png"):
        check(entries + broken, 16)


# What comes of it


def test_a_folder_is_a_source_of_records(tmp_path):
    entries = read_folder(make_pictures(tmp_path, 3))
    source = Folder(entries)
    assert (len(source), source.blocks) == (3, [3])
    for index, entry in enumerate(entries):
        content = entry.file.read_bytes()
        key = hashlib.sha256(content).hexdigest()
        assert source[index] == Record(str(entry.file), entry.captions, key, 16, 16, entry.repeats)
        assert source.read(index) == content


def test_the_fingerprint_is_of_names_captions_content_and_repeats(tmp_path):
    for name, colour in (("x/a.png", "red"), ("moved/a.png", "red"), ("x/b.png", "red"), ("other/a.png", "blue")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)

    def fingerprint(file, caption, repeats):
        return Folder([Entry(tmp_path / file, (caption,), repeats)]).fingerprint()

    one = fingerprint("x/a.png", "a", 1)
    assert one == fingerprint("moved/a.png", "a", 1)
    others = [("x/b.png", "a", 1), ("x/a.png", "b", 1), ("x/a.png", "a", 2), ("other/a.png", "a", 1)]
    assert len({one, *(fingerprint(*other) for other in others)}) == 5


def test_drawn_pictures_are_a_function_of_the_seed(tmp_path):
    first, again, other = (draw_folder(tmp_path / name, 5, 16, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (first / "metadata.jsonl").read_text() != (other / "metadata.jsonl").read_text()
    entries, skipped = check(read_folder(first), 16)
    assert (len(entries), skipped) == (5, [])
