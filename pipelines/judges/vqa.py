"""Judges that ask a model about a picture: TIFA (Hu et al. 2023) and VQAScore (Lin et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

from PIL import Image

from diffusion.errors import GazeError

from .interval import of_mean, of_share
from .questions import Question
from .verdict import Judge, Verdict

YES = "Yes"
DOES_IT_SHOW = 'Does this figure show "{prompt}"? Please answer yes or no.'  # Lin et al. 2024, section 3


class Answer(NamedTuple):
    """text: one of the choices; None: the model can say none of them. probability: that it says this, of all that it
    could say. cut: the question was longer than the model reads."""

    text: str | None
    probability: float
    cut: bool = False


# A picture, a question, the answers to choose from -> the answer.
Ask = Callable[[Image.Image, str, Sequence[str]], Answer]


def tifa_judge(ask: Ask, questions: Mapping[str, Sequence[Question]]) -> Judge:
    """A judge that gives the share of a prompt's questions whose answer is right.

    It says questions: of each question, choices, answer, said (the model's choice), probability, kind, right and cut.
    Raises GazeError: a prompt has no questions; the model's own.
    """

    def judge(prompt: str, picture: Image.Image) -> Verdict:
        if not questions.get(prompt):
            raise GazeError(f"there are no questions about {prompt!r:.200}", "a file with some for each prompt")
        asked = []
        for each in questions[prompt]:
            answer = ask(picture, each.question, each.choices)
            asked.append(
                each._asdict()
                | {"said": answer.text, "probability": answer.probability, "right": answer.text == each.answer}
                | {"cut": answer.cut}
            )
        return Verdict(fmean(each["right"] for each in asked), {"questions": asked})

    return lambda prompts, pictures: [judge(*each) for each in zip(prompts, pictures, strict=True)]


def tifa_summary(verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """score, low, high and n of the mean over the pictures (see `of_mean`), and skills: for each kind of question the
    share of right answers, and n, the pictures that it is asked about. What is asked about one picture is right or
    wrong together, so the interval is that of a share of n, not of the questions. Raises GazeError: too few pictures.
    """
    rights: dict[str, list[list[bool]]] = {}  # of each kind and picture
    for verdict in verdicts:
        of_picture: dict[str, list[bool]] = {}
        for each in verdict.said["questions"]:
            of_picture.setdefault(each["kind"], []).append(each["right"])
        for kind, right in of_picture.items():
            rights.setdefault(kind, []).append(right)
    skills = {kind: of_share(fmean(chain.from_iterable(rights[kind])), len(rights[kind])) for kind in sorted(rights)}
    return {**of_mean([verdict.score for verdict in verdicts], seed), "skills": skills}


def vqascore_judge(ask: Ask, question: str = DOES_IT_SHOW) -> Judge:
    """A judge that gives the probability of the answer "Yes" when asked whether the picture shows its prompt.

    question: has {prompt} where the prompt stands. It says question, and cut. Raises GazeError: the question has no
    such place; the model cannot say yes.
    """
    if "{prompt}" not in question:
        raise GazeError(f"the question {question!r:.200} does not ask for the prompt", DOES_IT_SHOW)

    def judge(prompt: str, picture: Image.Image) -> Verdict:
        asked = question.replace("{prompt}", prompt)
        answer = ask(picture, asked, [YES])
        if answer.text is None:
            raise GazeError(f"this model cannot answer {YES!r}", "a model of visual question answering")
        return Verdict(answer.probability, {"question": asked, "cut": answer.cut})

    return lambda prompts, pictures: [judge(*each) for each in zip(prompts, pictures, strict=True)]
