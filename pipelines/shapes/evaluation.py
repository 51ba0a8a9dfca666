"""How often does a model draw what a caption of the shapes world says? An exact score, skill by skill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..facts import Facts
from ..skills import EXAM, Exam, Judged, draw_all, enough, sum_up
from .captions import caption
from .judge import FACTS, check, see
from .world import SKILLS, Scene, scene


def exam(split: str = "heldout", n: int = 300, seed: int = EXAM) -> list[Scene]:
    """The scenes whose captions are asked for, always the same, the skills in turn. GazeError: n < 6, no such split."""
    return [scene(seed, index, split) for index in range(enough(n, SKILLS))]


def ask(split: str, n: int, seed: int = EXAM) -> Exam:
    """Its captions, and the judge of their pictures. Raises GazeError as `exam` does."""
    scenes = exam(split, n, seed)
    return Exam([caption(each) for each in scenes], [each.facts for each in scenes], _judged, SKILLS, FACTS)


def score(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Judges a picture of each scene's caption; right is one that breaks no fact. Returns what `sum_up` does."""
    pairs = zip(scenes, pictures, strict=True)
    return sum_up([_judged(each.facts, caption(each), picture) for each, picture in pairs], SKILLS, FACTS)


def _judged(facts: Facts, prompt: str, picture: Image.Image) -> Judged:
    seen = see(picture)
    shown = [f"{found.size} {found.colour} {found.shape}" for found in seen]
    return Judged(facts["skill"], prompt, check(facts, seen), shown)


def evaluate_shapes(
    pipe: Any,
    split: str = "heldout",
    n: int = 300,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Draws the captions of the exam and judges the pictures; one that is not 64x64 is resized to that.

    pipe: a TextToImage. seed: picture i has seed + i, so the batch size changes nothing. steps, guidance_scale: None
    takes the model's. progress: called with (done, total) after each batch.
    Returns what `score` does, with split and settings, and the pictures. Raises GazeError.
    """
    scenes = exam(split, n)
    prompts = [caption(each) for each in scenes]
    pictures, settings = draw_all(pipe, prompts, seed, steps, guidance_scale, batch, progress)
    return {"split": split, **score(scenes, pictures), "settings": settings}, pictures
