"""How often does a model draw what a caption of a scene of emoji says? An exact score, skill by skill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.prompts import escape

from ..skills import EXAM, Judged, draw_all, enough, sum_up
from .captions import caption, speaks
from .judge import FACTS, check, see, templates
from .things import Thing, read_things
from .world import SKILLS, Scene, scene


def exam(kinds: Sequence[str], split: str = "heldout", n: int = 300) -> list[Scene]:
    """The scenes whose captions are asked for, the same in each language and for the same kinds, the skills in turn.
    GazeError: n < 6, no such split."""
    return [scene(kinds, EXAM, index, split) for index in range(enough(n, SKILLS))]


def score(
    scenes: Sequence[Scene], prompts: Sequence[str], pictures: Sequence[Image.Image], things: Mapping[str, Thing]
) -> dict[str, Any]:
    """Judges a picture of each scene's caption; right is one that breaks no fact. Returns what `sum_up` does."""
    known = templates({name: thing.glyph for name, thing in things.items()})
    judged = []
    for each, prompt, picture in zip(scenes, prompts, pictures, strict=True):
        shown = see(picture, known)
        seen = [found.kind for found in shown.objects] + [f"{shown.background} background"]
        judged.append(Judged(each.facts["skill"], prompt, check(each.facts, shown), seen))
    return sum_up(judged, SKILLS, FACTS)


def evaluate_scenes(
    pipe: Any,
    data: str | Path,
    split: str = "heldout",
    n: int = 300,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
    language: str = "en",
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Draws the captions of the exam and judges the pictures; one that is not 64x64 is resized to that.

    pipe: a TextToImage. data: a folder of scenes, whose glyphs are matched. seed: picture i has seed + i, so the batch
    size changes nothing, and another language begins from the same noise. steps, guidance_scale: None takes the
    model's. progress: called with (done, total) after each batch. language: of the captions, "en" or "fr".
    Returns what `score` does, with split, language and settings, and the pictures. Raises GazeError.
    """
    speaks(language)
    things = {thing.name: thing for thing in read_things(data)}
    scenes = exam([*things], split, n)
    prompts = [caption(each, things, language) for each in scenes]
    pictures, settings = draw_all(pipe, [*map(escape, prompts)], seed, steps, guidance_scale, batch, progress)
    found = score(scenes, prompts, pictures, things)
    return {"split": split, "language": language, **found, "settings": settings}, pictures
