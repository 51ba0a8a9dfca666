"""How often does a model draw what a caption of the shapes world says? An exact score, skill by skill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from diffusion.errors import GazeError

from ..evaluation import in_batches, in_common, wilson
from ..png import save_png
from ..sheet import grid, scale_of
from .captions import caption
from .judge import FACTS, check, see
from .world import SIDE, SKILLS, WHITE, Scene, scene

EXAM = -1  # the seed of its scenes, which no training data has
WORST, COLUMNS = 40, 8  # pictures of a sheet


def exam(split: str = "heldout", n: int = 300, seed: int = EXAM) -> list[Scene]:
    """The scenes whose captions are asked for, always the same, the skills in turn. GazeError: n < 6, no such split."""
    if n < len(SKILLS):
        raise GazeError(f"{n} prompts are too few for {len(SKILLS)} skills", "-n 300, which is 50 of each")
    return [scene(seed, index, split) for index in range(n)]


def score(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Judges a picture of each scene's caption; right is one that breaks no fact.

    Returns score (the mean of the skills' scores), low, high (the Wilson 95 % interval of such a share of n pictures),
    n, right, skills (the same of each), broken (how many pictures break each fact) and misses (index, prompt, skill,
    broken facts and what is seen). The interval is that of the mean where n divides by six, if anything too wide,
    because the skills' shares are fixed; of other trainings of the same model it says nothing.
    """
    judged, misses = [], []
    for index, (each, picture) in enumerate(zip(scenes, pictures, strict=True)):
        seen = see(picture)
        broken = check(each.facts, seen)
        judged.append((each.facts["skill"], not broken))
        if broken:
            shown = [f"{found.size} {found.colour} {found.shape}" for found in seen]
            misses.append(
                {"index": index, "prompt": caption(each), "skill": judged[-1][0], "broken": broken, "seen": shown}
            )
    rights = {skill: [right for of, right in judged if of == skill] for skill in SKILLS}
    skills = {skill: _share(fmean(right), len(right)) for skill, right in rights.items()}
    counts = Counter(fact for miss in misses for fact in miss["broken"])
    return {
        **_share(fmean(skill["score"] for skill in skills.values()), len(judged)),
        "right": len(judged) - len(misses),
        "skills": skills,
        "broken": {fact: counts[fact] for fact in FACTS},
        "misses": misses,
    }


def _share(share: float, n: int) -> dict[str, Any]:
    low, high = wilson(share * n, n)
    return {"score": share, "low": low, "high": high, "n": n}


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
    pictures: list[Image.Image] = []
    settings: dict[str, Any] = {}
    prompts = [caption(each) for each in scenes]
    for result in in_batches(pipe, prompts, seed, steps, guidance_scale, batch, progress):
        settings = in_common(result)
        pictures += result.images
    return {"split": split, **score(scenes, pictures), "settings": {"seed": seed, **settings}}, pictures


def save_worst(report: dict[str, Any], pictures: Sequence[Image.Image], path: Path) -> None:
    """A sheet of the pictures that break most facts, with their captions and those facts. Raises GazeError."""
    worst = sorted(report["misses"], key=lambda miss: -len(miss["broken"]))[:WORST]
    images = [pictures[miss["index"]] for miss in worst] or [Image.new("RGB", (SIDE, SIDE), WHITE)]
    labels = [f"{miss['prompt']}: {', '.join(miss['broken'])}" for miss in worst] or ["no picture breaks a fact"]
    save_png(grid(images, COLUMNS, labels, scale_of(images)), path, {"misses": worst})


def table(report: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    rows = [*report["skills"].items(), ("mean", report)]
    lines = [f"{'skill':<16}{'score':>7}{'95 % interval':>19}{'n':>7}"]
    for name, part in rows:
        interval = f"{part['low']:.1%} to {part['high']:.1%}"
        lines.append(f"{name:<16}{part['score']:>7.1%}{interval:>19}{part['n']:>7}")
    broken = ", ".join(f"{fact} {count}" for fact, count in report["broken"].items() if count)
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    return "\n".join([*lines, "", f"{report['split']} combinations; pictures that break: {broken or 'none'}", settings])
