import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from diffusion.errors import GazeError
from pipelines.scenes.things import read_things
from train.data import annotations, emoji, nouns
from train.data.folder import Folder
from train.data.masks import Masks
from train.data.scenes import build_scenes

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


def test_annotations_are_names_and_keywords():
    assert annotations.parse_annotations(XML) == {"x": ("dog face", ["dog", "face", "pet"])}


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
    assert emoji.captions("dog face", "a dog face", ["dog", "face", "pet"]) == [
        "dog face",
        "a dog face",
        "dog face, dog, face, pet",
    ]
    assert emoji.captions("dog face", "a dog face", ["dog", "face"]) == ["dog face", "a dog face"]
    assert emoji.captions("Dog", "a Dog", ["dog"]) == ["Dog", "a Dog"]
    assert emoji.captions("ninja", "ninja", []) == ["ninja"]


def test_the_spoken_name():
    assert emoji.spoken("flag: Japan") == "the flag of Japan"
    assert emoji.spoken("eagle") == "an eagle"
    assert emoji.spoken("man: dark skin tone, beard") == "a man with dark skin tone and beard"


@pytest.mark.parametrize(
    ("name", "gender", "one", "several"),
    [
        ("pomme rouge", "f", "une pomme rouge", "pommes rouges"),
        ("cheval", "m", "un cheval", "chevaux"),
        ("château", "m", "un château", "châteaux"),
        ("cœur bleu", "m", "un cœur bleu", "cœurs bleus"),
        ("ananas", "m", "un ananas", "ananas"),
        ("feu", "m", "un feu", "feux"),
        ("chaussure de sport", "f", "une chaussure de sport", "chaussures de sport"),
        ("gâteau d'anniversaire", "m", "un gâteau d'anniversaire", "gâteaux d'anniversaire"),
        ("ours en peluche", "m", "un ours en peluche", "ours en peluche"),
        ("arc-en-ciel", "m", "un arc-en-ciel", "arcs-en-ciel"),
        ("cerf-volant", "m", "un cerf-volant", "cerfs-volants"),
        ("pierre précieuse", "f", "une pierre précieuse", "pierres précieuses"),
    ],
)
def test_french_nouns_have_article_and_plural(name, gender, one, several):
    assert nouns.french(name, gender == "f") == (one, several)


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("dog", "a dog", "dogs"),
        ("eggplant", "an eggplant", "eggplants"),
        ("butterfly", "a butterfly", "butterflies"),
        ("key", "a key", "keys"),
        ("bus", "a bus", "buses"),
        ("tomato", "a tomato", "tomatoes"),
        ("video", "a video", "videos"),
        ("running shoe", "a running shoe", "running shoes"),
    ],
)
def test_english_nouns_have_article_and_plural(name, one, several):
    assert nouns.english(name) == (one, several)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("homme : peau mate et cheveux roux", "homme à la peau mate et aux cheveux roux"),
        ("femme : peau claire et chauve", "femme à la peau claire et chauve"),
        ("famille : homme, femme et fille", "famille : homme, femme et fille"),
        ("drapeau : Japon", "drapeau : Japon"),
        ("touches : 1", "touches : 1"),
        ("chatte", "chatte"),
    ],
)
def test_spoken_french_needs_no_unknown_gender(name, said):
    assert nouns.spoken_french("x", name) == said


def test_things_have_one_gender_and_their_spoken_name_has_it():
    assert not set(nouns.FEMININE) & set(nouns.MASCULINE)
    assert len(nouns.GENDERS) == len(nouns.FEMININE + nouns.MASCULINE)
    assert nouns.spoken_french("🍎", "pomme rouge") == "une pomme rouge"
    assert nouns.spoken_french("🐕", "chien") == "un chien"


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
    not all(path.exists() for path in emoji.PACKAGES), reason="the emoji packages are not installed"
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
def test_what_is_held_out_is_so_in_every_language(tmp_path):
    alone = emoji.build_emoji(tmp_path / "en", size=16, limit=300)
    both = emoji.build_emoji(tmp_path / "both", size=16, limit=300, languages=["en", "fr"])
    assert {key: both[key] for key in alone} == alone
    lines = {}
    for form in ("en", "both"):
        for split in ("train", "heldout"):
            text = (tmp_path / form / split / "metadata.jsonl").read_text(encoding="utf-8")
            lines[form, split] = [json.loads(line) for line in text.splitlines()]
    for old, new in zip(lines["en", "train"], lines["both", "train"], strict=True):
        assert new["text"][: len(old["text"])] == old["text"]
        assert {key: value for key, value in new.items() if key in old} == old | {"text": new["text"]}
    secret = {text for line in lines["both", "heldout"] for text in line["text"]}
    names = {name.casefold() for line in lines["both", "heldout"] for name in (line["name"], line["name_fr"])}
    assert len(names) == 2 * both["heldout"]
    for line in lines["both", "train"]:
        assert not secret & set(line["text"])
        keywords = [word for text in line["text"] for word in text.split(", ")[line["name"].count(", ") + 1 :]]
        assert not names & {word.casefold() for word in keywords}
    first = lines["both", "train"][0]
    assert first["name_fr"] in first["text"]
    assert not any("’" in line.get("name_fr", "") for split in ("train", "heldout") for line in lines["both", split])


@needs_packages
def test_languages_that_cldr_lacks_are_named(tmp_path):
    with pytest.raises(GazeError, match="does not name the emoji in the language 'frr'"):
        emoji.build_emoji(tmp_path, limit=2, languages=["en", "frr"])


@needs_packages
def test_a_glyph_on_white_is_the_picture():
    emojis, font = emoji.installed()
    for one in (e for e in emojis if e.key in "🍎🐕🔑⛵"):
        alone = emoji.glyph(one.text, font)
        assert alone.width == alone.height == max(alone.getbbox()[2:])
        on_white = Image.new("RGBA", alone.size, "white")
        on_white.alpha_composite(alone)
        canvas = emoji._drawn(one.text, font, "white")
        left, top, right, bottom = ImageChops.difference(
            canvas.convert("RGB"), Image.new("RGB", canvas.size, "white")
        ).getbbox()
        found = ImageChops.difference(on_white.convert("RGB"), Image.new("RGB", alone.size, "white")).getbbox()
        pairs = zip(
            on_white.convert("RGB").crop(found).tobytes(),
            canvas.convert("RGB").crop((left, top, right, bottom)).tobytes(),
            strict=True,
        )
        assert max(abs(a - b) for a, b in pairs) <= 2


@needs_packages
def test_scenes_are_written_as_the_judge_and_the_trainer_read_them(tmp_path):
    for name in ("a", "b"):
        build_scenes(tmp_path / name, 6, seed=3, with_masks=True)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    things = read_things(tmp_path / "a")
    assert [thing.nouns["fr"] for thing in things[:2]] == [
        ("une pomme rouge", "pommes rouges"),
        ("une banane", "bananes"),
    ]
    assert len(things) == len(nouns.GENDERS)
    found = Folder(tmp_path / "a")
    assert len(found) == 6
    assert all(len(entry.captions) == 2 for entry in found.entries)
    marked = Masks(tmp_path / "a").marked
    assert {name: {*each.objects} for name, each in marked.items()} == {
        entry.name: {*entry.captions} for entry in found.entries
    }
    with pytest.raises(GazeError, match="holds something already"):
        build_scenes(tmp_path / "a", 6)
    with pytest.raises(GazeError, match="no captions in the language 'es'"):
        build_scenes(tmp_path / "c", 6, languages=["es"])
    with pytest.raises(GazeError, match="unknown split 'held'"):
        build_scenes(tmp_path / "c", 6, split="held")
    assert not (tmp_path / "c").exists()


@needs_packages
def test_scenes_come_with_the_emoji_alone(tmp_path):
    """All that `train data emoji` trains on, to the byte, and nothing that it holds out."""
    build_scenes(tmp_path / "scenes", 6, size=16)
    build_scenes(tmp_path / "both", 6, size=16, with_emoji=True)
    emoji.build_emoji(tmp_path / "emoji", size=16, languages=["en", "fr"])
    scenes, alone = (tmp_path / name / "metadata.jsonl" for name in ("scenes", "emoji/train"))
    rows = [json.loads(line) for line in alone.read_text(encoding="utf-8").splitlines()]
    expected = [{**row, "file_name": f"emoji/{row['file_name']}"} for row in rows]
    lines = (tmp_path / "both" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[:6] == scenes.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[6:]] == expected
    found = Folder(tmp_path / "both")
    assert [entry.repeats for entry in found.entries] == [1] * 6 + [row["repeats"] for row in rows]
    assert all(
        found.read(6 + index) == (tmp_path / "emoji" / "train" / row["file_name"]).read_bytes()
        for index, row in enumerate(rows)
    )


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
    with pytest.raises(GazeError, match="cannot write the folder"):
        emoji.build_emoji(tmp_path / "file", limit=2)
