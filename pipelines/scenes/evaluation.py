"""How often does a model draw what a caption of a scene of emoji says? An exact score, skill by skill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..facts import Facts
from ..skills import EXAM, Exam, Judged, enough
from .captions import caption, speaks
from .judge import FACTS, check, see, templates
from .things import read_things
from .world import SKILLS, Scene, scene


def exam(kinds: Sequence[str], split: str = "heldout", n: int = 300, seed: int = EXAM) -> list[Scene]:
    """The scenes whose captions are asked for, the same in each language and for the same kinds, the skills in turn.
    GazeError: n < 6, no such split."""
    return [scene(kinds, seed, index, split) for index in range(enough(n, SKILLS))]


def ask(data: str | Path, split: str = "heldout", n: int = 300, language: str = "en", seed: int = EXAM) -> Exam:
    """Its captions, and the judge of their pictures, which may be of any size and are resized to 64x64.

    data: a folder of scenes, whose glyphs are matched. Raises GazeError as `exam` does, for a language that scenes have
    no captions in, and where the folder has no glyphs.
    """
    speaks(language)
    things = {thing.name: thing for thing in read_things(data)}
    scenes = exam([*things], split, n, seed)
    known = templates({name: thing.glyph for name, thing in things.items()})

    def judged(facts: Facts, prompt: str, picture: Image.Image) -> Judged:
        shown = see(picture, known)
        seen = [*(found.kind for found in shown.objects), f"{shown.background} background"]
        return Judged(facts["skill"], prompt, check(facts, shown), seen)

    prompts = [caption(each, things, language) for each in scenes]
    return Exam(prompts, [each.facts for each in scenes], judged, SKILLS, FACTS)
