"""`gaze evaluate detect` and `gaze evaluate vqa`, on finished pictures and on those of a model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from pipelines.__main__ import app
from pipelines.judges.everyday import SKILLS, everyday
from pipelines.shapes.captions import caption
from pipelines.shapes.world import draw, scene
from tests.judges import asked_models, small_judges

N = 12


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of models, by name."""
    folder = tmp_path_factory.mktemp("judges")
    kinds = {"owl": asked_models.owl, "clip": small_judges.clip, "vilt": asked_models.vilt, "llava": asked_models.llava}
    return {name: kind(folder / name) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Pictures of the shapes world with their facts."""
    folder = tmp_path_factory.mktemp("finished")
    scenes = [scene(1, index) for index in range(N)]
    lines = [
        {"file_name": f"{index}.png", "text": caption(each), "facts": each.facts} for index, each in enumerate(scenes)
    ]
    for line, each in zip(lines, scenes, strict=True):
        draw(each).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_detect_judges_finished_pictures_by_their_facts(gaze, judges, finished, tmp_path):
    options = ["evaluate", "detect", "--pictures", finished, "--judge", judges["owl"], "--colours", judges["clip"]]
    rules = ["--threshold", 0.65, "--counting-threshold", 0.4, "--margin", 0.3, "--only-asked"]
    code, out, err = gaze(*options, *rules, "--page", "page.html", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [*report["skills"]] == ["single object", "two objects", "counting", "colours", "position", "colour binding"]
    assert all(part["n"] == 2 for part in report["skills"].values())
    assert report["n"] == N == len(report["pictures"])
    assert report["low"] <= report["score"] + 1e-9
    assert [report["settings"][name] for name in ("threshold", "counting_threshold", "margin")] == [0.65, 0.4, 0.3]
    scores: dict[bool, list[float]] = {True: [], False: []}  # of what is found where it is counted, and elsewhere
    for said in (picture["said"] for picture in report["pictures"]):
        scores[said["skill"] == "counting"] += [box[-1] for boxes in said["found"].values() for box in boxes]
    assert 0.4 < min(scores[True]) < 0.65 < min(scores[False])
    assert report["settings"]["colours"] == str(judges["clip"])
    assert sum(report["broken"].values()) > 0
    assert set(report["pictures"][0]["said"]) == {"skill", "broken", "found"}
    assert "colour binding" in (tmp_path / "page.html").read_text()


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_detect_asks_prompts_of_its_own_of_a_model(gaze, judges, model):
    code, out, err = gaze(
        *("evaluate", "detect", "--model", model, "--steps", 1, "-n", 6),
        *("--judge", judges["owl"], "--colours", judges["clip"]),
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [*SKILLS, "mean"]
    assert lines[9].startswith("pictures that break: ")
    assert "threshold 0.3, counting_threshold 0.3, max_overlap 0.7" in lines[10]


def test_facts_of_a_file_are_those_of_the_pictures_prompts(gaze, judges, finished, tmp_path):
    (tmp_path / "plain").mkdir()
    for index in range(2):
        entry = everyday(6 * index)
        draw(scene(1, index)).save(tmp_path / "plain" / f"{index}.png")
        (tmp_path / "plain" / f"{index}.txt").write_text(entry["prompt"])
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(everyday(index)) for index in range(9)))
    options = ["evaluate", "detect", "--pictures", "plain", "--judge", judges["owl"]]
    code, out, err = gaze(*options, "--facts", "facts.jsonl", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["skills"]["single_object"]["n"] == 2
    code, out, err = gaze(*options)
    assert (code, out) == (1, "")
    assert "nothing says what a picture of" in err


def test_vqa_asks_whether_it_is_shown(gaze, judges, finished):
    code, out, err = gaze("evaluate", "vqa", "--pictures", finished, "--judge", judges["llava"], "-n", 10, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["n"] == 10
    assert 0 <= report["low"] <= report["score"] <= report["high"] <= 1
    assert report["settings"]["question"] == 'Does this figure show "{prompt}"? Please answer yes or no.'
    first = report["pictures"][0]
    assert first["said"]["question"] == f'Does this figure show "{first["prompt"]}"? Please answer yes or no.'


def test_vqa_asks_questions_made_from_facts_or_of_a_file(gaze, judges, finished, tmp_path):
    options = ["evaluate", "vqa", "--pictures", finished, "--judge", judges["vilt"]]
    code, out, err = gaze(*options, "--score", "tifa")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["color", "counting", "object", "spatial", "tifa"]
    assert out.splitlines()[-1].endswith("questions made from facts")
    told = [{"caption": caption(scene(1, index)), "question": "is it red?", "answer": "yes"} for index in range(N)]
    (tmp_path / "questions.json").write_text(json.dumps(told))
    code, out, err = gaze(*options, "--questions", "questions.json", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    rights = [each["said"]["questions"][0]["said"] == "yes" for each in report["pictures"]]
    assert report["score"] == pytest.approx(sum(rights) / N)
    assert [*report["skills"]] == ["all"]
    assert report["skills"]["all"]["n"] == N


def test_every_command_of_the_documentation_can_be_asked():
    """They are not run there, because their models are large."""
    command, count = typer.main.get_command(app).commands["evaluate"], 0
    for page in sorted((Path(__file__).parents[2] / "docs").glob("evaluation*.md")):
        for words in (shlex.split(line, comments=True) for line in re.findall(r"evaluate (\w+ .*)", page.read_text())):
            if words[0] in command.commands and words[1].startswith("--"):
                command.commands[words[0]].make_context(words[0], words[1:])
                count += 1
    assert count >= 14


@pytest.mark.parametrize(
    "options, says",
    [
        (["detect", "--judge", "clip"], "a detector that is given names"),
        (["detect", "--judge", "owl", "--colours", "vilt"], "embeds texts and pictures"),
        (["detect", "--judge", "nowhere"], "there is no model folder 'nowhere'"),
        (["detect", "--judge", "owl", "--facts", "none.jsonl"], "none.jsonl"),
        (["vqa", "--judge", "owl"], "a model that answers questions about a picture"),
        (["vqa", "--judge", "vilt", "-n", "9"], "9 pictures are too few"),
        (["vqa", "--judge", "vilt", "--score", "tifo"], "did you mean 'tifa'"),
        (["vqa", "--judge", "vilt", "--question", "Is it good?"], "does not ask for the prompt"),
        (["vqa", "--judge", "vilt", "--score", "tifa", "--question", "x"], "--question says nothing to the score tifa"),
        (["vqa", "--judge", "vilt", "--questions", "none.json"], "questions file 'none.json' cannot be read"),
    ],
)
def test_what_is_wrong_is_named(gaze, judges, finished, options, says):
    named = [str(judges.get(option, option)) for option in options]
    code, out, err = gaze("evaluate", *named, "--pictures", finished)
    assert (code, out) == (1, "")
    assert says in err
    assert len(err.splitlines()) <= 3
