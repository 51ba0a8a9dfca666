"""The score on the shapes world, of models that draw what is asked for, or something else, and at the command line."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.evaluation import wilson
from pipelines.shapes.captions import caption
from pipelines.shapes.evaluation import evaluate_shapes, exam, score
from pipelines.shapes.world import SKILLS, draw
from pipelines.skills import EXAM, table
from tests.small_pipeline import small_pipeline

N = 30
BLANK = Image.new("RGB", (64, 64), "white")


class FakePipe:
    """Knows the exam; `answer` changes the scene that it draws, None draws nothing."""

    def __init__(self, split="heldout", answer=lambda each: each, size=64):
        self.scenes = {caption(each): each for each in exam(split, N)}
        self.answer, self.size, self.asked = answer, size, []

    def __call__(self, prompts, seed, num_inference_steps, guidance_scale):
        self.asked += [(prompt, seed + i) for i, prompt in enumerate(prompts)]
        answers = [self.answer(self.scenes[prompt]) for prompt in prompts]
        images = [BLANK if answer is None else draw(answer, self.size) for answer in answers]
        return SimpleNamespace(images=images, settings=[{"prompt": p, "seed": 9, "steps": 7} for p in prompts])


@pytest.mark.parametrize("split", ["seen", "heldout"])
@pytest.mark.parametrize("size", [64, 96])
def test_a_perfect_model_scores_one(split, size):
    report, pictures = evaluate_shapes(FakePipe(split, size=size), split, N)
    assert (report["score"], report["n"], report["right"], report["split"]) == (1.0, N, N, split)
    assert (report["low"], report["high"]) == pytest.approx(wilson(N, N))
    assert [*report["skills"]] == [*SKILLS]
    assert all((part["score"], part["n"]) == (1.0, 5) for part in report["skills"].values())
    assert report["misses"] == []
    assert report["settings"] == {"seed": 0, "steps": 7}
    assert len(pictures) == N


def test_a_model_that_cannot_count_fails_at_counting_alone():
    def few(each):
        return replace(each, objects=each.objects[:1]) if each.facts["skill"] == "counting" else each

    report, _ = evaluate_shapes(FakePipe(answer=few), n=N)
    assert report["score"] == pytest.approx(5 / 6)
    assert (report["low"], report["high"]) == pytest.approx(wilson(25, 30))
    assert report["skills"]["counting"] == {
        "score": 0.0,
        "n": 5,
        **dict(zip(("low", "high"), wilson(0, 5), strict=True)),
    }
    assert report["broken"] == {"shape": 0, "colour": 0, "size": 0, "count": 5, "position": 0, "nothing else": 0}
    assert {(miss["skill"], *miss["broken"]) for miss in report["misses"]} == {("counting", "count")}
    assert report["misses"][0]["seen"][0].startswith("small ")


def test_the_score_is_the_mean_of_the_skills_when_they_are_not_equally_many():
    scenes = exam("seen", 8)  # two of the first two skills
    pictures = [BLANK, *(draw(each) for each in scenes[1:])]
    report = score(scenes, pictures)
    assert report["score"] == pytest.approx((0.5 + 5) / 6)
    assert (report["n"], report["right"]) == (8, 7)
    worth = 36 / (2 / 2 + 4 / 1)  # pictures: the mean's variance is the sum of p (1 - p) / n over 36
    assert (report["low"], report["high"]) == pytest.approx(wilson(worth * 5.5 / 6, worth))


def test_prompts_and_seeds_do_not_depend_on_the_batch():
    pipes, done = [FakePipe(), FakePipe()], []
    evaluate_shapes(pipes[0], n=N, seed=3, batch=N, progress=lambda *at: done.append(at))
    evaluate_shapes(pipes[1], n=N, seed=3, batch=7)
    assert pipes[0].asked == pipes[1].asked
    assert [seed for _, seed in pipes[0].asked] == [*range(3, 3 + N)]
    assert done == [(N, N)]
    assert EXAM < 0  # training data has no such seed


def test_the_table_has_each_skill_and_what_breaks():
    lines = table(evaluate_shapes(FakePipe(answer=lambda each: None), n=N)[0]).splitlines()
    assert [line.split("  ")[0] for line in lines[1:8]] == [*SKILLS, "mean"]
    assert lines[7].split() == ["mean", "0.0%", "0.0%", "to", f"{wilson(0, N)[1]:.1%}", "30"]
    assert "heldout combinations; pictures that break: count 30" in lines


@pytest.mark.parametrize(
    "change, says",
    [
        ({"n": 5}, "5 prompts are too few for 6 skills"),
        ({"split": "sene"}, "did you mean 'seen'"),
        ({"batch": 0}, "is 0"),
    ],
)
def test_bad_arguments_are_named(change, says):
    with pytest.raises(GazeError, match=says):
        evaluate_shapes(FakePipe(), **{"n": 6, **change})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_the_command_scores_any_model(gaze, model, tmp_path):
    options = ["evaluate", "shapes", "--model", model, "--steps", 1, "-n", 6, "--split", "seen"]
    code, out, err = gaze(*options, "--json", "--sheet", "worst.png")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert {"score", "low", "high", "n", "skills"} <= set(report)
    assert report["n"] == 6
    assert 0 <= report["low"] <= report["score"] <= report["high"] <= 1
    with Image.open(tmp_path / "worst.png") as sheet:
        assert sheet.width > 64
    code, out, err = gaze(*options)
    assert (code, err) == (0, "")
    assert "colour binding" in out
    assert "num_inference_steps 1" in out


def test_finished_pictures_are_judged_by_their_prompts(gaze, tmp_path):
    (tmp_path / "made").mkdir()
    lines = []
    for number, each in enumerate(reversed(exam("seen", 12))):
        draw(each if number else replace(each, objects=each.objects[:0]), 96).save(tmp_path / "made" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption(each)}) + "\n")
    (tmp_path / "made" / "metadata.jsonl").write_text("".join(lines))
    options = ["evaluate", "shapes", "--pictures", "made", "--split", "seen"]
    code, out, err = gaze(*options, "--json", "--sheet", "worst.png", "--page", "worst.html")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["n"], report["right"], report["settings"]) == (12, 11, {"pictures": "made"})
    assert [miss["broken"] for miss in report["misses"]] == [["count"]]
    page = (tmp_path / "worst.html").read_text()
    assert page.index(report["misses"][0]["prompt"]) < page.index(caption(exam("seen", 12)[0]))
    for changes, says in (
        (["--split", "heldout"], "is none of the exam's 300"),
        (["-n", 6], "is none of the exam's 6"),
        (["--model", "model"], "model would say how to draw"),
    ):
        code, out, err = gaze(*options, *changes)
        assert (code, out) == (1, "")
        assert says in err
    (tmp_path / "made" / "metadata.jsonl").write_text("".join(lines[:5]))
    assert "there is no picture of the skill" in gaze(*options)[2]


def test_a_caption_says_the_same_facts_wherever_it_occurs():
    facts = {}
    for split in ("seen", "heldout"):
        for each in exam(split, 240):
            assert facts.setdefault(caption(each), each.facts) == each.facts


def test_the_command_names_what_is_wrong(gaze, model):
    for options, says in (
        (["-n", 5], "too few"),
        (["--split", "sene"], "did you mean 'seen'"),
        (["--sheet", "worst.jpg"], "written as PNG"),
    ):
        code, out, err = gaze("evaluate", "shapes", "--model", model, *options)
        assert (code, out) == (1, "")
        assert says in err
