import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.evaluation import evaluate_retrieval, pool, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_stays_inside():
    assert [1 - end for end in reversed(wilson(2, 7))] == pytest.approx(wilson(5, 7))
    assert wilson(0, 7)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(0, 12)[0] == 0.0
    assert wilson(7, 7)[1] == pytest.approx(1.0, abs=1e-12)
    assert wilson(7, 7)[1] <= 1.0


@pytest.fixture
def data(tmp_path):
    """Noise pictures of 64 px: 12 seen, of which the last two are one picture, and 5 held out."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("heldout", 5)):
        folder = tmp_path / split
        folder.mkdir()
        lines = []
        for i in range(count):
            if (split, i) != ("train", 11):
                levels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{i}.png")
            lines.append(
                json.dumps({"file_name": f"{i}.png", "text": [f"{split} {i}", "noise"], "name": f"{split} {i}"})
            )
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


class FakePipe:
    """Answers a name with a picture file of `data`."""

    def __init__(self, data, answer=lambda name: name):
        self.data, self.answer, self.asked = data, answer, []

    def __call__(self, prompts, seed, num_inference_steps, guidance_scale):
        self.asked += [(prompt, seed + i) for i, prompt in enumerate(prompts)]
        settings = [{"prompt": p, "negative_prompt": "", "seed": seed, "num_inference_steps": 7} for p in prompts]
        return SimpleNamespace(images=[self.open(prompt) for prompt in prompts], settings=settings)

    def open(self, prompt):
        split, number = self.answer(prompt).split()
        return Image.open(self.data / split / f"{number}.png")


def test_a_perfect_model_scores_one(data):
    result = evaluate_retrieval(FakePipe(data), data)
    assert (result["score"], result["n"], result["right"], result["split"]) == (1.0, 5, 5, "heldout")
    assert (result["low"], result["high"]) == pytest.approx(wilson(5, 5))
    assert result["misses"] == []
    assert result["settings"] == {"seed": 0, "true_pictures": 17, "num_inference_steps": 7}


def test_a_model_that_always_draws_one_picture_is_right_once(data):
    result = evaluate_retrieval(FakePipe(data, lambda name: "heldout 3"), data)
    assert result["right"] == 1
    assert [miss["prompt"] for miss in result["misses"]] == ["heldout 0", "heldout 1", "heldout 2", "heldout 4"]
    assert {miss["nearest"] for miss in result["misses"]} == {"heldout 3"}


def test_a_model_that_is_right_half_the_time(data):
    pipe = FakePipe(data, lambda name: name if int(name.split()[1]) % 2 == 0 else "train 0")
    result = evaluate_retrieval(pipe, data, split="seen")
    # 0, 2, 4, 6, 8, 10; and 11 is drawn as train 0
    assert (result["right"], result["n"], result["score"]) == (6, 12, 0.5)


def test_pictures_of_the_other_split_compete(data):
    result = evaluate_retrieval(FakePipe(data, lambda name: "train 5"), data)
    assert (result["score"], result["misses"][0]["nearest"]) == (0.0, "train 5")


def test_the_same_picture_under_another_name_is_right_and_counted(data):
    pipe = FakePipe(data)
    result = evaluate_retrieval(pipe, data, split="seen")
    assert (result["score"], result["right_under_another_name"]) == (1.0, 1)


def test_the_choice_and_the_seeds_depend_on_the_seed_alone(data):
    pipes = [FakePipe(data) for _ in range(3)]
    done = []
    evaluate_retrieval(pipes[0], data, "seen", n=6, seed=3, batch=4, progress=lambda *at: done.append(at))
    evaluate_retrieval(pipes[1], data, "seen", n=6, seed=3, batch=1)
    evaluate_retrieval(pipes[2], data, "seen", n=6, seed=4)
    assert pipes[0].asked == pipes[1].asked
    assert [seed for _, seed in pipes[0].asked] == [3, 4, 5, 6, 7, 8]
    assert [name for name, _ in pipes[0].asked] != [name for name, _ in pipes[2].asked]
    assert done == [(4, 6), (6, 6)]


def test_pooling_is_the_mean_on_white():
    levels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = levels.reshape(32, 2, 32, 2, 3).astype(float).mean(axis=(1, 3)) / 127.5 - 1
    assert pool(Image.fromarray(levels)).reshape(3, 32, 32).numpy() == pytest.approx(means.transpose(2, 0, 1), abs=1e-6)
    assert pool(Image.new("RGBA", (64, 64), (0, 0, 0, 0))).min() == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "held"}, "unknown split"),
        ({"n": 0}, "the heldout split has 5"),
        ({"n": 6}, "the heldout split has 5"),
        ({"batch": 0}, "batch size is 0"),
        ({"data": "/nowhere"}, "/nowhere/train/metadata.jsonl cannot be read"),
    ],
)
def test_bad_arguments_are_named(data, change, says):
    with pytest.raises(GazeError, match=says):
        evaluate_retrieval(FakePipe(data), **({"data": data} | change))


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"file_name": "0.png"}', '{"file_name": "no.png", "text": "a"}', "7"]
)
def test_a_broken_line_is_named(data, line):
    path = data / "heldout" / "metadata.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(GazeError, match=r"heldout/metadata\.jsonl, line 6"):
        evaluate_retrieval(FakePipe(data), data)


def test_finished_pictures_are_judged_by_their_prompts(gaze, data):
    """Each of the five is right, when it is asked for by its name, and another where names are exchanged."""
    finished = data / "finished"
    finished.mkdir()
    for number in range(5):
        (finished / f"{number}.png").write_bytes((data / "heldout" / f"{number}.png").read_bytes())
        (finished / f"{number}.txt").write_text(f"heldout {number if number < 3 else 7 - number}")
    options = ["evaluate", "retrieval", "--data", data, "--pictures", finished]
    code, out, err = gaze(*options, "--json", "--page", "worst.html")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["right"], report["n"], report["score"]) == (3, 5, 0.6)
    assert report["misses"] == [{"prompt": f"heldout {n}", "nearest": f"heldout {7 - n}"} for n in (4, 3)]
    assert report["settings"] == {"true_pictures": 17, "pictures": str(finished)}
    assert (data / "worst.html").read_text().count("<figure>") == 5
    assert "3 of 5" in gaze(*options)[1]
    code, out, err = gaze(*options, "--split", "seen")
    assert (code, out) == (1, "")
    assert "'heldout 0', which is no name that is asked for" in err
