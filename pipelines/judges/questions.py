"""Questions about a picture whose answers its prompt gives, as in TIFA (Hu et al. 2023): of a file, or from facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.errors import GazeError

from .everyday import SIDES, plural, with_article
from .facts import COLOURS, Facts, facts_for
from .pictures import Asked

EXAMPLE = (
    '{"prompt": "a red cup", "questions": '
    '[{"question": "What color is the cup?", "choices": ["red", "blue"], "answer": "red", "element_type": "color"}]}'
)
TRUTH = ("yes", "no")
PLACES = ("left", "right", "above", "below")


class Question(NamedTuple):
    """answer: the right one of the choices. kind: what is asked for, "object", "counting", "color", "spatial", ..."""

    question: str
    choices: tuple[str, ...]
    answer: str
    kind: str


def questions_of(facts: Facts) -> list[Question]:
    """What can be asked about facts (see `facts_of`), in English: of each object whether it is there, and if they are
    stated or there must not be more, how many there are, their color and where it lies."""
    limited = {each["class"] for each in facts["exclude"]}
    include = facts["include"]
    asked = []
    for each in include:
        name, count = each["class"], each["count"]
        many = plural(name)
        asked.append(Question(f"Is there {with_article(name)} in the picture?", TRUTH, "yes", "object"))
        if count > 1 or name in limited:
            choices = tuple(str(number) for number in range(max(1, count - 1), max(1, count - 1) + 4))
            asked.append(Question(f"How many {many} are in the picture?", choices, str(count), "counting"))
        if "color" in each:
            which = f"are the {many}" if count > 1 else f"is the {name}"
            choices = tuple(dict.fromkeys([*COLOURS, each["color"]]))
            asked.append(Question(f"What color {which}?", choices, each["color"], "color"))
        if "position" in each:
            relation, target = each["position"]
            other, side = include[target]["class"], SIDES.get(relation, relation)
            where = f"Where is the {name}, seen from the {other}?"
            asked.append(Question(f"Is the {name} {side} the {other}?", TRUTH, "yes", "spatial"))
            asked.append(Question(where, PLACES, relation.removesuffix(" of"), "spatial"))
    return [*dict.fromkeys(asked)]


def questions_for(asked: Sequence[Asked], file: str | None = None) -> dict[str, list[Question]]:
    """The questions about each text that is asked for: those of a file, or what can be asked about its facts. Raises
    GazeError: there are none about one."""
    if file is None:
        return {text: questions_of(facts) for text, facts in facts_for(asked).items()}
    read = read_questions(file)
    missing = next((each.text for each in asked if each.text not in read), None)
    if missing is not None:
        raise GazeError(f"{file!r} has no questions about {missing!r:.200}", "a file with some for each prompt")
    return {each.text: read[each.text] for each in asked}


def read_questions(file: str) -> dict[str, list[Question]]:
    """The questions of each prompt, of a JSON list or a file with one JSON object a line.

    An object has "prompt" (or "caption") and "questions", a list, or is itself a question, as in TIFA's files: with
    "question", "choices" (without: yes and no), "answer" and maybe "element_type". Raises GazeError.
    """
    questions: dict[str, list[Question]] = {}
    for where, entry in _entries(file):
        prompt = entry.get("prompt", entry.get("caption"))
        listed = entry.get("questions", [entry])
        if not isinstance(prompt, str) or not isinstance(listed, list) or not listed:
            raise GazeError(f"{where} has no prompt with questions", f"lines such as {EXAMPLE}")
        questions.setdefault(prompt, []).extend(_question(where, each) for each in listed)
    if not questions:
        raise GazeError(f"{file!r} holds no question", f"lines such as {EXAMPLE}")
    return questions


def _entries(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object is, for messages, and the object."""
    try:
        text = Path(file).read_text("utf-8-sig")
        whole = text.lstrip().startswith("[")
        entries = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise GazeError(f"questions file {file!r} cannot be read: {error}", f"lines such as {EXAMPLE}") from None
    for number, entry in enumerate(entries, start=1):
        where = f"{file}, entry {number}"
        if not isinstance(entry, dict):
            raise GazeError(f"{where}: {entry!r:.100} is no JSON object", f"lines such as {EXAMPLE}")
        yield where, entry


def _question(where: str, entry: Any) -> Question:
    stated = entry if isinstance(entry, dict) else {}
    choices = stated.get("choices") or TRUTH
    listed = choices if isinstance(choices, list | tuple) else [None]
    texts: list[Any] = [stated.get("question"), stated.get("answer"), *listed]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise GazeError(f"{where}: {entry!r:.200} is no question with an answer", f"lines such as {EXAMPLE}")
    question, answer, *known = texts
    if answer not in known:
        problem = f"{where}: the answer {answer!r:.100} to {question!r:.200} is none of its choices"
        raise GazeError(problem, f"{', '.join(known):.300}")
    return Question(question, tuple(known), answer, str(stated.get("element_type") or stated.get("kind") or "all"))
