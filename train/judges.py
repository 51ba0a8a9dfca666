"""validation.judges: what each of them asks a model to draw, and how it marks the pictures.

A judge that is to be used here has a line in EXAMS: its exam, and what each of the prompts is a test of, "" where there
are no kinds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from diffusion.errors import GazeError, nearest
from diffusion.pretrained import Model
from diffusion.prompts import escape
from pipelines import evaluation
from pipelines.evaluation import ENGLISH, FOLDERS
from pipelines.scenes import evaluation as emoji_scenes
from pipelines.shapes import evaluation as plain_shapes
from pipelines.shapes.captions import vocabulary
from pipelines.skills import EXAM, Exam
from pipelines.text_to_image import Request, TextToImage

from .config import Judging, Recipe
from .data.source import Source

SCENES = EXAM - 1  # the seed of those asked for here, so that `gaze evaluate shapes` is an exam that chose nothing
LOOKED_AT = 1_000  # captions, evenly over the data
LEAST = 0.1  # of them must be of a judge's world


Asked = tuple[Exam | evaluation.Exam, list[str]]


class Judge(NamedTuple):
    """skills: of each prompt, as in EXAMS. marks: the numbers of prompts, consecutive -> the marks of the pictures that
    the model draws of them now."""

    skills: Sequence[str]
    marks: Callable[[Sequence[int]], list[float]]


class Figure(NamedTuple):
    """n: pictures that it is of."""

    score: float
    n: int


def open_judges(recipe: Recipe, source: Source, model: Model) -> dict[str, Judge]:
    """Those of recipe.validation.judges, by name. Raises GazeError where one does not fit the data, or for settings
    that it or the model does not take."""
    asked = recipe.validation.judging
    judges: dict[str, Judge] = {
        name: _judge(*EXAMS[name](recipe, source), asked, model) for name in recipe.validation.judges
    }
    figures = [name for judge, own in judges.items() for name in scores(judge, own.skills, [0] * len(own.skills))]
    if judges and asked.best is not None and asked.best not in figures:
        raise GazeError(f"validation.judging.best: there is no figure {asked.best!r}", nearest(asked.best, figures))
    return judges


def _judge(exam: Exam | evaluation.Exam, skills: list[str], asked: Judging, model: Model) -> Judge:
    pipe = TextToImage(model)
    options = {"num_inference_steps": asked.num_inference_steps, "guidance_scale": asked.guidance_scale}
    last = len(exam.prompts) - 1
    try:  # a bad value would else end the run at the first look
        pipe.plan(Request(escape(exam.prompts[last]), seed=asked.seed + last, **options))  # type: ignore[arg-type]
    except GazeError as error:
        raise GazeError(f"validation.judging: {error.problem}", error.hint) from None

    def marks(numbers: Sequence[int]) -> list[float]:
        prompts = [exam.prompts[number] for number in numbers]
        drawn = pipe([escape(prompt) for prompt in prompts], seed=asked.seed + numbers[0], **options)
        return [verdict.score for verdict in exam.judge(prompts, drawn.images)]

    return Judge(skills, marks)


def scores(name: str, skills: Sequence[str], marks: Sequence[float]) -> dict[str, Figure]:
    """The figures of a judge of this name, by name: the mean of each skill's marks, and as its score that of these."""
    of_skill: dict[str, list[float]] = {skill: [] for skill in skills}
    for skill, mark in zip(skills, marks, strict=True):
        of_skill[skill].append(mark)
    means = {skill: Figure(fmean(own), len(own)) for skill, own in of_skill.items()}
    whole = Figure(fmean(mean.score for mean in means.values()), len(marks))
    return {name: whole, **{f"{name}/{skill}": mean for skill, mean in means.items() if skill}}


# The judges


def shapes(recipe: Recipe, source: Source) -> Asked:
    """Scenes of the shapes world; a picture that breaks no fact of its caption is right. See docs/shapes.md."""
    words, asked = vocabulary(), recipe.validation.judging
    places = range(0, len(source), -(-len(source) // LOOKED_AT))
    captions = [caption for place in places for caption in source[place].captions]
    others = [caption for caption in captions if not words.issuperset(caption.split())]
    if len(captions) - len(others) < LEAST * len(captions):
        raise GazeError(
            f"validation.judges: shapes asks for scenes of plain shapes, and {len(others)} of {len(captions)} captions "
            f"of the data that were looked at have other words, as {others[0]!r:.80}",
            "data of `python -m train data shapes`; or retrieval, for a folder of `python -m train data emoji`",
        )
    try:
        chosen = plain_shapes.ask(asked.split, asked.prompts, SCENES)
    except GazeError as error:
        raise GazeError(f"validation.judging.prompts: {error.problem}", "120, which is 20 of each") from None
    return chosen, _skills(chosen)


def scenes(recipe: Recipe, source: Source) -> Asked:
    """Scenes of emoji, asked for in English; a picture that breaks no fact of its caption is right. See
    docs/emoji-scenes.md."""
    asked = recipe.validation.judging
    try:
        chosen = emoji_scenes.ask(recipe.data.folder or recipe.out, asked.split, asked.prompts, seed=SCENES)
    except GazeError as error:
        raise GazeError(f"validation.judges: scenes: {error.problem}", error.hint) from None
    return chosen, _skills(chosen)


def retrieval(recipe: Recipe, source: Source) -> Asked:
    """Names of pictures; right is what is nearest to the true one, see `pipelines.evaluation.evaluate_retrieval`."""
    asked, folder = recipe.validation.judging, (recipe.data.folder or recipe.out).resolve()
    heldout = folder.with_name(FOLDERS["heldout"])
    if recipe.data.folder is None or folder.name != FOLDERS["seen"] or not heldout.is_dir():
        raise GazeError(
            f"validation.judges: retrieval needs the true pictures of a folder with {' and '.join(FOLDERS.values())}, "
            f"of which data.folder is the former; here it is {recipe.data.folder}",
            "data.folder=FOLDER/train, of `python -m train data emoji FOLDER`",
        )
    try:
        chosen = evaluation.ask(folder.parent, asked.split, asked.prompts, asked.seed, ENGLISH)
    except GazeError as error:
        raise GazeError(f"validation.judges: retrieval: {error.problem}", error.hint) from None
    return chosen, [""] * len(chosen.prompts)


def _skills(exam: Exam) -> list[str]:
    return [facts["skill"].replace(" ", "_") for facts in exam.facts]


EXAMS: Mapping[str, Callable[[Recipe, Source], Asked]] = {
    "shapes": shapes,
    "scenes": scenes,
    "retrieval": retrieval,
}
