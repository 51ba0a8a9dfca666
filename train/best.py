"""Has the judges score the averaged weights while a run goes on, and keeps the best so far in out/best.

out/best is a model's folder with score.json in it: one rename puts both in their place, so that neither is ever there
without the other. What is best stands there alone: no checkpoint holds it, and a run that goes on, also from an earlier
checkpoint than the best, keeps it until weights score as much.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError
from diffusion.files import read_json, replacing, write_json
from pipelines.evaluation import wilson

from .config import Recipe
from .ema import EMA
from .judges import Figure, Judge, scores
from .memory import is_lack_of_memory
from .metrics import Metrics
from .processes import Processes
from .sharding import gathered
from .validation import Watched, averaged, shared

FOLDER, FILE = "best", "score.json"
OF_THE_KIND = ("by", "settings", "identity")  # scores that differ in one of them do not compare


def judge(
    recipe: Recipe,
    phase: Watched,
    identity: str,
    ema: EMA,
    processes: Processes,
    metrics: Metrics,
    seen: int,
    stopping: Callable[[], bool],
) -> bool:
    """Logs the figures of each judge and keeps the weights in out/best where the one that counts is not below what is
    there. See `validation.validate`; here `stopping` is asked before each batch of pictures. identity: of the run.

    A batch has the same pictures however many processes share them, so the figures are a function of the weights.
    """
    asked = recipe.validation.judging
    figures: dict[str, Figure] = {}
    with averaged(phase, ema, processes):
        for name, each in phase.judges.items():
            numbers = range(len(each.skills))
            batches = [numbers[start : start + asked.batch] for start in numbers[:: asked.batch]]
            marked = shared(len(batches), lambda i: _marks(each, batches[i]), processes, stopping)  # noqa: B023
            failed = [marks for marks in marked or () if isinstance(marks, str)]
            if failed and processes.first:
                warnings.warn(f"the judge {name} fails and is left out: {failed[0]}; the run goes on", stacklevel=2)
            if marked is not None and not failed:
                figures |= scores(name, each.skills, [mark for marks in marked for mark in marks])
        if stopping():
            return False
        if figures:
            metrics.log(seen, **{name: figure.score for name, figure in figures.items()})
        with gathered(phase.module):  # again: FSDP2 has taken apart what has drawn
            if (by := asked.best or recipe.validation.judges[0]) in figures and processes.first:
                low, high = wilson(figures[by].score * figures[by].n, figures[by].n)
                others = {name: figure.score for name, figure in figures.items()}
                settings = asked.model_dump(mode="json", exclude={"every", "best"})
                found = {"by": by, **figures[by]._asdict(), "low": low, "high": high, "pictures": seen,
                         "figures": others, "settings": settings, "identity": identity}  # fmt: skip
                keep(recipe.out / FOLDER, phase.export, found)
    return True


def _marks(judge: Judge, numbers: Sequence[int]) -> list[float] | str:
    """The marks, or what went wrong: whatever a judge stumbles over is no reason to lose a run."""
    try:
        return judge.marks(numbers)
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"


def keep(folder: Path, export: Callable[[Path], None], found: dict[str, Any]) -> None:
    """Writes the folder anew, unless it holds a model of a higher score of this kind. What the system refuses, or a
    stranger has put there since the run began, is a warning, and the folder stays as it was."""
    try:
        before = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        comparable = all(before.get(key) == found[key] for key in OF_THE_KIND)
        if comparable and before["score"] > found["score"]:
            return
        with replacing(folder, (FILE,), "a model that a run kept") as aside:
            export(aside)
            write_json(aside / FILE, found)
    except (OSError, GazeError) as error:
        problem = error.problem if isinstance(error, GazeError) else error
        warnings.warn(f"{folder} cannot be written: {problem}; the run goes on, and the best before it stays",
                      stacklevel=2)  # fmt: skip


def check_kept(out: Path) -> None:
    """Raises GazeError where out/best is something that a run would not overwrite, or cannot compare with."""
    best = out / FOLDER
    if best.exists() and not (best / FILE).is_file():
        raise GazeError(f"{best} has no {FILE}, so no run wrote it; it is not overwritten", "another name for it")
    if best.exists():
        read_json(best / FILE)


def recover(out: Path) -> None:
    """Puts out/best back where a kill came between the two renames that replace it, and removes what was half written.
    Only for the run that writes here."""
    best, some = out / FOLDER, "[0-9a-f]" * 8  # as `replacing` ends the names of what is not whole
    for gone in out.glob(f".{FOLDER}-{some}-old"):
        if not best.exists():
            os.rename(gone, best)
    for leftover in [*out.glob(f".{FOLDER}-{some}*"), *out.glob(f"..{FOLDER}-{some}-{some}*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def said(out: Path) -> str:
    """A line about what a run has kept; "" for nothing."""
    if not (out / FOLDER / FILE).is_file():
        return ""
    found = read_json(out / FOLDER / FILE)
    return (f"best: {found['by']} {found['score']:.1%} ({found['low']:.1%} to {found['high']:.1%}, n {found['n']}) "
            f"after {found['pictures']:,} pictures, in {out / FOLDER}")  # fmt: skip
