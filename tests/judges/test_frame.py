"""The frame that all judges share: drawn or finished, by one process or several, the worst kept and shown."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.judges.frame import WORST, by_score, in_common, judged, worst_of
from pipelines.judges.interval import LEAST, of_mean, of_share
from pipelines.judges.page import render
from pipelines.judges.pictures import Asked
from pipelines.judges.report import report_of, table
from pipelines.judges.verdict import Verdict
from pipelines.processes import Processes
from tests.distributed.test_pictures import Store


def by_level(prompts, images):
    """The darker the worse."""
    return [
        Verdict(float(np.asarray(image).mean()), {"read": prompt})
        for prompt, image in zip(prompts, images, strict=True)
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, order = tmp_path_factory.mktemp("finished"), np.random.default_rng(0).permutation(100)
    for number, level in enumerate(order.tolist()):
        Image.new("RGB", (8, 8), (level, level, level)).save(folder / f"{number:03}.png")
    return [Asked(f"level \\({level}\\)", {}, str(folder / f"{number:03}.png")) for number, level in enumerate(order)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_are_judged_in_their_order_and_the_worst_keep_their_pixels(finished, count):
    store, told = Store(), []
    found = [
        judged(Processes(rank, count, store), finished, {}, by_level, 8, lambda *at: told.append(at))
        for rank in reversed(range(count))
    ]
    assert found[:-1] == [None] * (count - 1)
    cases = found[-1]
    assert [case.asked for case in cases] == finished
    assert [f"level ({case.verdict.score:.0f})" for case in cases] == [case.verdict.said["read"] for case in cases]
    worst = worst_of(cases)
    assert [case.verdict.score for case in worst] == [*range(WORST)]
    assert [np.asarray(case.image).mean() for case in worst] == [*range(WORST)]
    assert sum(case.image is not None for case in cases) <= WORST * count
    assert in_common(cases) == {}
    assert cases[3].row() == {
        "prompt": finished[3].prompt,
        "score": cases[3].verdict.score,
        "file": finished[3].file,
        "said": cases[3].verdict.said,
    }
    assert len(told) == 100


def test_drawn_pictures_are_those_of_gaze_generate(pipe, model):
    asked = [Asked("a red cat"), Asked("(dog:1.2)"), Asked("red \\(cat\\)")]
    images = []

    def judge(prompts, pictures):
        images.extend(pictures)
        return by_level(prompts, pictures)

    cases = judged(Processes(), asked, {"model": model, "num_inference_steps": 2, "seed": 5}, judge)
    assert [case.verdict.said["read"] for case in cases] == ["a red cat", "dog", "red (cat)"]
    for number, (each, image) in enumerate(zip(asked, images, strict=True)):
        (expected,) = pipe(each.prompt, seed=5 + number, num_inference_steps=2).images
        assert expected.tobytes() == image.tobytes()
    settings = in_common(cases)
    assert (settings["seed"], settings["num_inference_steps"], settings["model"]) == (5, 2, model)
    assert [case.row()["seed"] for case in cases] == [5, 6, 7]
    json.dumps([case.row() for case in cases])


def test_a_score_that_is_no_number_is_an_error(finished):
    with pytest.raises(GazeError, match=r"the judge says nan of the picture of 'level"):
        judged(Processes(), finished, {}, lambda prompts, images: [Verdict(float("nan"), {})])


def test_the_interval_of_a_mean():
    scores = np.random.default_rng(0).gamma(2, size=200).tolist()
    found = of_mean(scores, seed=1)
    assert found == of_mean(scores, seed=1) != of_mean(scores, seed=2)
    error = np.std(scores) / np.sqrt(200)
    assert found["score"] == pytest.approx(np.mean(scores))
    assert (found["low"], found["high"]) == pytest.approx(
        (np.mean(scores) - 1.96 * error, np.mean(scores) + 1.96 * error), abs=0.3 * error
    )
    assert of_mean([0.5] * LEAST) == {"score": 0.5, "low": 0.5, "high": 0.5, "n": LEAST}
    with pytest.raises(GazeError, match="9 pictures are too few"):
        of_mean([0.5] * (LEAST - 1))
    with pytest.raises(GazeError, match="1 picture is too few"):
        of_mean([0.5])
    assert of_share(0.5, 20)["low"] == pytest.approx(0.2993, abs=1e-4)  # Wilson


def test_page_and_table_say_what_the_report_says(finished):
    tricky = [*finished[:20], Asked("<script>alert('&')</script>", {}, finished[20].file)]
    cases = judged(Processes(), tricky, {}, by_level)
    report = report_of(cases, of_mean([case.verdict.score for case in cases]), {"judge": "<x>", "numbers": [1, 2.5]})
    json.dumps(report, allow_nan=False)
    assert list(report) == ["score", "low", "high", "n", "settings", "pictures"]
    text = render("a title", report, worst_of(cases, by_score)[:5])
    assert text.count("<figure>") == 5
    assert "<script>alert" not in text
    assert "&lt;x&gt;" in text
    assert "The worst 5 of 21" in text
    assert "http" not in text.replace("http-equiv", "")
    lines = table("levels", report).splitlines()
    assert lines[1].split() == [
        "levels",
        *(f"{report[key]:.4f}" for key in ("score", "low")),
        "to",
        f"{report['high']:.4f}",
        "21",
    ]
    assert "judge <x>" in lines[-1]
