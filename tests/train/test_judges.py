"""What validation.judges ask for and how they mark it, against the scores of `gaze evaluate`; and what does not fit."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.evaluation import evaluate_retrieval
from pipelines.scenes import evaluation as emoji_scenes
from pipelines.scenes.captions import caption as emoji_caption
from pipelines.scenes.world import draw as draw_scene
from pipelines.shapes.captions import caption, vocabulary
from pipelines.shapes.evaluation import exam, score
from pipelines.shapes.world import draw, scene
from pipelines.shipped import DEFAULT_MODEL
from tests.made_things import GLYPHS, THINGS, write_glyphs
from tests.train.tiny import open_phase, tiny_recipe
from train import judges
from train.config import Judging, load_recipe
from train.judges import open_judges, scores

SPLITS = ("seen", "heldout")
SHAPES = [SimpleNamespace(captions=("a red circle", "a large disc"))] * 3
OTHERS = [SimpleNamespace(captions=("a dog on a beach",))] * 40
BLANK = Image.new("RGB", (64, 64), "white")


class Pipe:
    """Draws what `answers` has for a prompt, or for a seed, and notes what it is asked for."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def plan(self, request): ...

    def __call__(self, prompts, seed, **options):
        self.asked.append((prompts, {"seed": seed, **options}))
        known = [self.answers.get(prompt, self.answers.get(seed + i, BLANK)) for i, prompt in enumerate(prompts)]
        return SimpleNamespace(images=known, settings=[{}])


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """The judge of a name, and the pipe that draws for it."""

    def open_one(name, answers, folder=None, **judging):
        pipe = Pipe(answers)
        monkeypatch.setattr(judges, "TextToImage", lambda model: pipe)
        validation = {"every": 8, "judges": [name], "judging": judging}
        recipe = tiny_recipe(tmp_path, folder or tmp_path, tmp_path, validation=validation)
        return open_judges(recipe, SHAPES, None)[name], pipe

    return open_one


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_are_marked_as_gaze_evaluate_scores_them(opened, split):
    """By a model that draws two things of three as they should be, and the third of the scene before."""
    scenes = exam(split, 31, judges.SCENES)
    pictures = [draw(scenes[i - (i % 3 == 2)]) for i in range(31)]
    judge, _ = opened("shapes", dict(enumerate(pictures)), prompts=31, split=split)
    found = scores("shapes", judge.skills, judge.marks(range(31)))
    expected = score(scenes, pictures)
    assert 0.5 < found["shapes"].score < 0.9
    assert found["shapes"] == (pytest.approx(expected["score"]), 31)
    assert {
        name.removeprefix("shapes/").replace("_", " "): figure for name, figure in found.items() if "/" in name
    } == {skill: (pytest.approx(part["score"]), part["n"]) for skill, part in expected["skills"].items()}


def test_scenes_are_marked_as_their_judge_does(opened, tmp_path):
    """By a model that draws every third one as the scene before."""
    write_glyphs(tmp_path)
    asked = emoji_scenes.exam([*THINGS], "seen", 12, judges.SCENES)
    drawn = [draw_scene(asked[i - (i % 3 == 2)], GLYPHS) for i in range(12)]
    judge, pipe = opened("scenes", dict(enumerate(drawn)), prompts=12, split="seen")
    assert judge.marks(range(12)) == [float(i % 3 != 2) for i in range(12)]
    assert pipe.asked[0][0] == [emoji_caption(each, THINGS) for each in asked]
    assert [skill.replace("_", " ") for skill in judge.skills] == [each.facts["skill"] for each in asked]
    assert not {each.name for each in asked} & {each.name for each in emoji_scenes.exam([*THINGS], "seen", 12)}
    with pytest.raises(GazeError, match=r"validation.judges: scenes: .*glyphs"):
        opened("scenes", {}, folder=tmp_path / "other")


def test_the_exam_of_gaze_evaluate_is_not_what_the_best_is_chosen_by():
    for split in SPLITS:
        assert not {each.name for each in exam(split, 6)} & {each.name for each in exam(split, 6, judges.SCENES)}


def test_each_picture_has_its_seed_and_the_settings(opened):
    judge, pipe = opened("shapes", {}, prompts=12, seed=5, num_inference_steps=3, guidance_scale=1.5)
    assert judge.marks(range(4, 7)) == [0, 0, 0]
    prompts = [caption(each) for each in exam("heldout", 12, judges.SCENES)][4:7]
    assert pipe.asked == [(prompts, {"seed": 9, "num_inference_steps": 3, "guidance_scale": 1.5})]
    _, pipe = opened("shapes", {}, prompts=12)
    assert pipe.asked == []


@pytest.fixture
def named(tmp_path):
    """A folder with train/ and heldout/, and its pictures by name."""
    pictures = {}
    for split, names in (("train", "abcdef"), ("heldout", "uvw")):
        (tmp_path / "data" / split).mkdir(parents=True)
        rows = []
        for number, name in enumerate(names):
            pictures[name] = Image.new("RGB", (32, 32), (40 * number, 250 * (split == "train"), 99))
            pictures[name].save(tmp_path / "data" / split / f"{name}.png")
            rows.append(json.dumps({"file_name": f"{name}.png", "text": [name], "name": name}) + "\n")
        (tmp_path / "data" / split / "metadata.jsonl").write_text("".join(rows))
    return tmp_path / "data", pictures


@pytest.mark.parametrize("split, right", [("seen", 5), ("heldout", 2)])
def test_retrieval_is_marked_as_gaze_evaluate_scores_it(opened, named, split, right):
    folder, pictures = named
    n = {"seen": 6, "heldout": 3}[split]
    answers = pictures | {"b": pictures["w"], "w": pictures["b"]}
    judge, pipe = opened("retrieval", answers, folder / "train", split=split, prompts=n)
    marks = judge.marks(range(n))
    assert sum(marks) == right
    assert scores("retrieval", judge.skills, marks) == {"retrieval": (pytest.approx(right / n), n)}

    assert evaluate_retrieval(pipe, folder, split, n)["right"] == right


def test_brackets_in_a_name_are_no_weights(opened, named):
    folder, pictures = named
    metadata = folder / "heldout" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"v"', '"v (old)"'))
    judge, pipe = opened("retrieval", {r"v \(old\)": pictures["v"]}, folder / "train", prompts=3)
    assert sum(judge.marks(range(3))) == 1
    assert sorted(pipe.asked[0][0]) == ["u", r"v \(old\)", "w"]


def test_the_vocabulary_is_what_captions_say():
    assert {word for index in range(90) for word in caption(scene(0, index)).split()} < vocabulary()
    assert len(vocabulary()) == 47  # docs/shapes.md


# Bad input


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"phase": "text"}, "this is phase text"),
        ({"validation": {"judges": ["shapes"]}}, "validation.every and validation.judging.every are 0"),
        ({"validation": {"every": 8, "judges": ["shape"]}}, "'scenes' or 'retrieval'"),
        ({"validation": {"every": 8, "judges": ["shapes"], "judging": {"promts": 6}}}, "promts"),
        ({"validation": {"every": 8, "judges": ["shapes"], "judging": {"batch": 0}}}, "batch"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be(tmp_path, changes, says):
    validation = {"every": 8, "judges": ["shapes"]}
    values = tiny_recipe(tmp_path, tmp_path, tmp_path).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values | {"validation": validation} | changes))
    with pytest.raises(GazeError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


def ask(tmp_path, source=SHAPES, name="shapes", **judging):
    recipe = tiny_recipe(tmp_path, tmp_path, tmp_path, validation={"every": 8, "judges": [name], "judging": judging})
    return open_judges(recipe, source, None)


def test_data_of_another_world_are_refused_and_those_of_several_are_not(tmp_path, opened):
    with pytest.raises(
        GazeError, match=r"40 of 40 captions of the data .* other words, as 'a dog on a beach'"
    ) as error:
        ask(tmp_path, OTHERS)
    assert "train data shapes" in error.value.hint
    with pytest.raises(GazeError, match="40 of 42 captions"):
        ask(tmp_path, [*OTHERS, SHAPES[0]])
    opened("shapes", {})
    ask(tmp_path, [*OTHERS[:10], SHAPES[0]])
    ask(tmp_path, OTHERS[:1] * 2500 + SHAPES[:1] * 1000)


def test_retrieval_needs_a_folder_with_both_parts(tmp_path, named):
    with pytest.raises(GazeError, match=r"retrieval needs the true pictures .* train and heldout") as error:
        ask(tmp_path, name="retrieval")
    assert error.value.hint.startswith("data.folder=FOLDER/train")
    validation = {"every": 8, "judges": ["retrieval"]}  # 120 prompts
    with pytest.raises(GazeError, match=r"validation\.judges: retrieval: 120 prompts .* heldout split has 3"):
        open_judges(tiny_recipe(tmp_path, named[0] / "train", tmp_path, validation=validation), SHAPES, None)


def test_settings_that_no_judge_takes_are_named(tmp_path, opened):
    with pytest.raises(GazeError, match="5 prompts are too few for 6 skills") as error:
        ask(tmp_path, prompts=5)
    assert "120" in error.value.hint
    with pytest.raises(GazeError, match="no figure 'shapes/two objects'") as error:
        opened("shapes", {}, best="shapes/two objects")
    assert "shapes/two_objects" in error.value.hint
    with pytest.raises(GazeError, match="no figure 'retrieval'"):
        opened("shapes", {}, best="retrieval")
    opened("shapes", {}, best="shapes/counting")


def test_a_judge_that_does_not_fit_is_found_before_anything_is_encoded(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a dog on a beach")
    vae = DEFAULT_MODEL / "vae"
    recipe = tiny_recipe(tmp_path / "run", tmp_path, vae, validation={"every": 8, "judges": ["shapes"]})
    with pytest.raises(GazeError, match=r"validation\.judges: shapes"):
        open_phase(recipe)
    assert not (tmp_path / "run" / "cache").exists()
    (tmp_path / "1.txt").write_text("a red circle")
    odd = recipe.validation.model_copy(update={"judging": Judging(num_inference_steps=2**16)})
    with pytest.raises(GazeError, match=r"validation\.judging: 65536 sampling steps"):
        open_phase(recipe.model_copy(update={"validation": odd}))
    assert not (tmp_path / "run" / "cache").exists()
