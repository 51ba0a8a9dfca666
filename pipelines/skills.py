"""Scores of a drawn world, skill by skill: how often does a picture break no fact of its caption?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any, NamedTuple

from PIL import Image

from diffusion.errors import GazeError

from .evaluation import in_batches, in_common
from .facts import Facts
from .images import WHITE
from .judges.interval import of_share
from .judges.report import score_lines
from .judges.verdict import Verdict
from .png import save_png
from .sheet import grid, scale_of

EXAM = -1  # the seed of its scenes, which no training data has
WORST, COLUMNS = 40, 8  # pictures of a sheet
NO_MISS = Image.new("RGB", (64, 64), WHITE)


class Judged(NamedTuple):
    """A picture of an exam. broken: facts of the prompt that it breaks; seen: what it shows instead, in words."""

    skill: str
    prompt: str
    broken: list[str]
    seen: list[str]


def verdict_of(judged: Judged) -> Verdict:
    """As a judge gives it; `judged_as` is the way back."""
    return Verdict(float(not judged.broken), {"skill": judged.skill, "broken": judged.broken, "seen": judged.seen})


def judged_as(prompt: str, verdict: Verdict) -> Judged:
    """What `verdict_of` was given."""
    return Judged(prompt=prompt, **verdict.said)


def by_facts(verdict: Verdict) -> float:
    """The order of an exam's pictures: what breaks most facts comes first."""
    return -len(verdict.said["broken"])


def enough(n: int, skills: Sequence[str]) -> int:
    """n. Raises GazeError where a skill would have no prompt."""
    if n < len(skills):
        raise GazeError(f"{n} prompts are too few for {len(skills)} skills", "-n 300, which is 50 of each")
    return n


def sum_up(judged: Sequence[Judged], skills: Sequence[str], facts: Sequence[str]) -> dict[str, Any]:
    """Returns score (the mean of the skills' scores), low, high (the Wilson 95 % interval of such a share of n
    pictures), n, right, skills (the same of each), broken (how many pictures break each fact) and misses (index,
    prompt, skill, broken facts and what is seen).

    The interval is that of a share of as many pictures as give the mean's variance where all skills are equally hard:
    all of them where each skill has as many. If anything it is too wide then, because the skills' shares are fixed; of
    other trainings of the same model it says nothing. GazeError: a skill has no picture.
    """
    without = [skill for skill in skills if all(each.skill != skill for each in judged)]
    if without:
        raise GazeError(f"there is no picture of the skill {without[0]!r}", "pictures of all of the exam's prompts")
    misses = [{"index": index, **each._asdict()} for index, each in enumerate(judged) if each.broken]
    rights = {skill: [not each.broken for each in judged if each.skill == skill] for skill in skills}
    shares = {skill: of_share(fmean(right), len(right)) for skill, right in rights.items()}
    worth = round(len(skills) * harmonic_mean([share["n"] for share in shares.values()]), 6)
    counts = Counter(fact for each in judged for fact in each.broken)
    return {
        **of_share(fmean(share["score"] for share in shares.values()), worth),
        "n": len(judged),
        "right": len(judged) - len(misses),
        "skills": shares,
        "broken": {fact: counts[fact] for fact in facts},
        "misses": misses,
    }


@dataclass(frozen=True)
class Exam:
    """The prompts of a world and the facts that each says. judged: looks at a picture of a prompt."""

    prompts: Sequence[str]
    facts: Sequence[Facts]
    judged: Callable[[Facts, str, Image.Image], Judged]
    skills: Sequence[str]
    kinds_of_facts: Sequence[str]

    def judge(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Verdict]:
        """A Judge of pictures of its prompts; of another it raises GazeError."""
        facts = dict(zip(self.prompts, self.facts, strict=True))
        for prompt in prompts:
            if prompt not in facts:
                raise GazeError(
                    f"a picture has the prompt {prompt!r:.200}, which is none of the exam's {len(self.prompts)}",
                    "the split that the pictures were made for, and -n where there are more of them",
                )
        pairs = zip(prompts, images, strict=True)
        return [verdict_of(self.judged(facts[prompt], prompt, image)) for prompt, image in pairs]

    def summary(self, judged: Sequence[tuple[str, Verdict]]) -> dict[str, Any]:
        """What `sum_up` returns, of prompt and verdict of each picture."""
        return sum_up([judged_as(prompt, verdict) for prompt, verdict in judged], self.skills, self.kinds_of_facts)


def draw_all(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Image.Image], dict[str, Any]]:
    """A picture of each prompt, and the settings that they have in common. The arguments are those of `in_batches`."""
    pictures: list[Image.Image] = []
    settings: dict[str, Any] = {}
    for result in in_batches(pipe, prompts, seed, steps, guidance_scale, batch, progress):
        settings = in_common(result)
        pictures += result.images
    return pictures, {"seed": seed, **settings}


def save_worst(report: dict[str, Any], pictures: Sequence[Image.Image | None], path: Path) -> None:
    """A sheet of the 40 pictures that break most facts, with their captions and those facts; no others are looked at.
    Raises GazeError."""
    worst = sorted(report["misses"], key=lambda miss: -len(miss["broken"]))[:WORST]
    images = [image for miss in worst if (image := pictures[miss["index"]]) is not None] or [NO_MISS]
    labels = [f"{miss['prompt']}: {', '.join(miss['broken'])}" for miss in worst] or ["no picture breaks a fact"]
    save_png(grid(images, COLUMNS, labels, scale_of(images)), path, {"misses": worst})


def table(report: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    broken = ", ".join(f"{fact} {count}" for fact, count in report["broken"].items() if count)
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    about = f"{report['split']} combinations; pictures that break: {broken or 'none'}"
    return "\n".join([*score_lines("skill", {**report["skills"], "mean": report}), "", about, settings])
