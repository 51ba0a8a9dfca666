"""The score on scenes of emoji: of finished pictures in two languages, of a model, and what is said of bad input."""

import json

import pytest
from PIL import Image

from pipelines.evaluation import wilson
from pipelines.scenes.captions import caption
from pipelines.scenes.evaluation import exam
from pipelines.scenes.world import SKILLS, draw
from tests.made_things import GLYPHS, THINGS, write_glyphs

N = 12


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_glyphs(tmp_path_factory.mktemp("scenes"))


def finished(folder, language, without=()):
    """Pictures of the exam, true but for those without anything."""
    folder.mkdir()
    lines = []
    for index, each in enumerate(exam([*THINGS], "seen", N)):
        picture = Image.new("RGB", (64, 64), "white") if index in without else draw(each, GLYPHS, 96)
        picture.save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption(each, THINGS, language)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("language", ["en", "fr"])
def test_finished_pictures_are_scored(gaze, scenes, tmp_path, language):
    folder = finished(tmp_path / "pictures", language, without=(2, 8))  # both of the skill counting
    options = ["evaluate", "scenes", "--data", scenes, "--split", "seen", "-n", N, "--language", language]
    code, out, err = gaze(*options, "--pictures", folder, "--json", "--sheet", "worst.png")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["n"], report["right"], report["split"], report["language"]) == (N, 10, "seen", language)
    assert report["score"] == pytest.approx(5 / 6)
    assert (report["low"], report["high"]) == pytest.approx(wilson(10, 12))
    assert [*report["skills"]] == [*SKILLS]
    assert report["skills"]["counting"]["score"] == 0
    assert report["broken"] == {"kind": 0, "count": 2, "position": 0, "background": 0, "nothing else": 0}
    assert [miss["seen"] for miss in report["misses"]] == [["white background"]] * 2
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width > 200


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_a_model_is_scored(gaze, scenes, model):
    options = ["evaluate", "scenes", "--data", scenes, "--model", model, "--steps", 1, "-n", 6, "--language", "fr"]
    code, out, err = gaze(*options)
    assert (code, err) == (0, "")
    assert "all at once" in out
    assert "heldout combinations" in out


def test_bad_input_is_named(gaze, scenes, model, tmp_path):
    broken = write_glyphs(tmp_path / "broken")
    (broken / "glyphs" / "metadata.jsonl").write_text('{"file_name": "0.png", "name": "apple"}\n')
    english = write_glyphs(tmp_path / "english_only")
    metadata = english / "glyphs" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"fr"', '"de"'))
    options = ["evaluate", "scenes", "--model", model]
    for more, says in (
        (["--data", scenes, "-n", 5], "too few"),
        (["--data", scenes, "--split", "sene"], "did you mean 'seen'"),
        (["--data", scenes, "--language", "de"], "no captions in the language 'de'"),
        (["--data", tmp_path], "glyphs/metadata.jsonl cannot be read"),
        (["--data", broken], "line 1: 'nouns'"),
        (["--data", english], "line 1: 'fr'"),
        (
            ["--data", scenes, "--pictures", finished(tmp_path / "english", "en"), "--language", "fr"],
            "none of the exam",
        ),
    ):
        code, out, err = gaze(*options[: 2 if "--pictures" in more else 4], *more)
        assert (code, out) == (1, "")
        assert says in err
