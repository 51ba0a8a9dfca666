import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from diffusion.errors import GazeError
from train.data import emoji

LIST = """\
# group: People & Body
# subgroup: person-role
1F469 1F3FD 200D 1F52C  ; fully-qualified     # 👩🏽‍🔬 E4.0 woman scientist: medium skin tone
2620                    ; unqualified         # ☠ E1.0 skull and crossbones
1F3FB                   ; component           # 🏻 E1.0 light skin tone
# group: Flags
1F1F3 1F1F5             ; fully-qualified     # 🇳🇵 E2.0 flag: Nepal
"""

XML = """<ldml><annotations>
<annotation cp="x">dog | face | pet</annotation><annotation cp="x" type="tts">dog face</annotation>
</annotations></ldml>"""


def test_only_fully_qualified_emoji_are_read_with_their_group():
    scientist, nepal = emoji.parse_emoji_list(LIST.splitlines())
    assert scientist == ("\U0001f469\U0001f3fd\u200d\U0001f52c", "woman scientist: medium skin tone", "People & Body")
    assert scientist.file_name == "1f469-1f3fd-200d-1f52c.png"
    assert (nepal.name, nepal.group) == ("flag: Nepal", "Flags")


def test_annotations_are_keywords_without_the_name():
    assert emoji.parse_annotations(XML) == {"x": ["dog", "face", "pet"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("woman scientist: medium-light skin tone", "woman scientist"),
        ("man: dark skin tone, beard", "man: beard"),
        ("kiss: woman, man, light skin tone, dark skin tone", "kiss: woman, man"),
        ("person: red hair", "person: red hair"),
        ("flag: Nepal", "flag: Nepal"),
        ("red apple", "red apple"),
    ],
)
def test_idea_is_the_name_without_skin_tones(name, expected):
    assert emoji.idea(name) == expected


def test_captions_are_dropped_when_they_say_no_more_than_the_name():
    assert emoji.captions("dog face", ["dog", "face", "pet"]) == [
        "dog face",
        "a dog face",
        "dog face, dog, face, pet",
    ]
    assert emoji.captions("dog face", ["dog", "face"]) == ["dog face", "a dog face"]
    assert emoji.captions("Dog", ["dog"]) == ["Dog", "a Dog"]
    assert emoji.captions("ninja", []) == ["ninja", "a ninja"]


def test_the_spoken_name():
    assert emoji.spoken("flag: Japan") == "the flag of Japan"
    assert emoji.spoken("eagle") == "an eagle"
    assert emoji.spoken("man: dark skin tone, beard") == "a man with dark skin tone and beard"


def test_a_lone_idea_is_seen_as_often_as_the_balance_says():
    assert [emoji.repeats(n, 4.0) for n in (1, 2, 4, 6, 26)] == [4, 2, 1, 1, 1]
    assert [emoji.repeats(n, 1.0) for n in (1, 2, 26)] == [1, 1, 1]


def test_held_out_is_a_tenth_of_the_names_with_exactly_one_skin_tone():
    held_out = [n for n in (f"thing {i}: dark skin tone" for i in range(1000)) if emoji.is_held_out(n)]
    assert 70 < len(held_out) < 130
    assert all(hashlib.sha256(n.encode()).digest()[-1] % 2 == 0 for n in held_out)  # a multiple of 10 is even
    assert not any(emoji.is_held_out(f"thing {i}") for i in range(100))
    assert not any(emoji.is_held_out(f"thing {i}: dark skin tone, light skin tone") for i in range(100))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(emoji, "PACKAGES", {Path("/nowhere/a.ttf"): "fonts-a", Path("/nowhere/b"): "unicode-b"})
    with pytest.raises(GazeError, match=r"(?s)/nowhere/a.ttf.*apt-get install fonts-a unicode-b"):
        emoji.build_emoji(Path("unused"))


needs_packages = pytest.mark.skipif(
    not all(path.is_file() for path in emoji.PACKAGES), reason="the emoji packages are not installed"
)


@needs_packages
def test_the_whole_list_splits_as_documented():
    names = [e.name for e in emoji.parse_emoji_list(emoji.EMOJI_LIST.read_text(encoding="utf-8").splitlines())]
    assert len(names) == len(set(names))
    assert all(name.count("skin tone") == 1 for name in names if emoji.is_held_out(name))
    if len(names) == 3655:  # unicode-data 15.0
        assert sum(name.count("skin tone") == 1 for name in names) == 1525
        assert sum(map(emoji.is_held_out, names)) == 168


@needs_packages
def test_build_writes_the_same_folder_twice_and_keeps_the_held_out_apart(tmp_path):
    summary = emoji.build_emoji(tmp_path / "a", size=32, limit=260)
    assert summary == emoji.build_emoji(tmp_path / "b", size=32, limit=260)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)

    def read(split):
        text = (tmp_path / "a" / split / "metadata.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    lines = {split: read(split) for split in ("train", "heldout")}
    assert len(lines["train"]) == summary["train"]
    assert len(lines["heldout"]) == summary["heldout"] > 0
    assert summary["train"] + summary["heldout"] + len(summary["left_out_like_heldout"]) == 260
    assert len(files) == summary["train"] + summary["heldout"] + 3

    texts = {split: {text for line in lines[split] for text in line["text"]} for split in lines}
    assert not texts["train"] & texts["heldout"]
    pixels = {
        split: {Image.open(tmp_path / "a" / split / line["file_name"]).tobytes() for line in lines[split]}
        for split in lines
    }
    assert not pixels["train"] & pixels["heldout"]
    assert all(line["text"][0] == line["name"] and line["repeats"] >= 1 for line in lines["train"])


@needs_packages
def test_pictures_are_whole_and_on_white(tmp_path):
    emoji.build_emoji(tmp_path, size=64, limit=3)
    for path in (tmp_path / "train").glob("*.png"):
        picture = Image.open(path)
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        box = ImageChops.difference(picture, Image.new("RGB", (64, 64), "white")).getbbox()
        assert box is not None
        left, top, right, bottom = box
        assert min(left, top, 64 - right, 64 - bottom) >= 1
        assert max(right - left, bottom - top) > 48


@needs_packages
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GazeError, match="cannot write the emoji folder"):
        emoji.build_emoji(tmp_path / "file", limit=2)
