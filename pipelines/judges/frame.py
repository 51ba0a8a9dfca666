"""Pictures in, verdicts out: each process draws or opens its part of the pictures and judges it at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image

from diffusion.errors import GazeError

from ..batch import draw_part, packed, unpacked
from ..evaluation import OF_ONE_PICTURE
from ..images import open_picture
from ..processes import Processes, own_device
from .pictures import Asked
from .verdict import Judge, Verdict

WORST = 40  # pictures that are kept and shown


class Shown(NamedTuple):
    """A picture to be judged. number: its place among those asked for. settings: what it was drawn with; empty where it
    was finished."""

    number: int
    asked: Asked
    settings: Mapping[str, Any]
    image: Image.Image


@dataclass(frozen=True)
class Case:
    """A picture that was judged. image: PIL's, of the worst, else None."""

    number: int
    asked: Asked
    settings: Mapping[str, Any]
    image: Image.Image | None
    verdict: Verdict

    def row(self) -> dict[str, Any]:
        """What a report says of it."""
        source = {"seed": self.settings["seed"]} if self.asked.file is None else {"file": self.asked.file}
        return {"prompt": self.asked.prompt, "score": self.verdict.score, **source, "said": self.verdict.said}


def by_score(verdict: Verdict) -> float:
    """The usual order of cases, from the worst to the best."""
    return verdict.score


def judged(
    processes: Processes,
    asked: Sequence[Asked],
    settings: Mapping[str, Any],
    judge: Judge,
    batch_size: int = 8,
    advance: Callable[..., None] = lambda fraction, doing="": None,
    order: Callable[[Verdict], float] = by_score,
) -> list[Case] | None:
    """The verdicts on all pictures, in their order, with the pixels of the worst 40; None to all processes but the
    first.

    asked: at least one; all finished or none. settings: of the pictures to be drawn, as inside a PNG; picture i has
    seed + i. batch_size: of pictures drawn, and judged, at once on a GPU; on a CPU it is one, so that a verdict does
    not depend on what is judged beside. advance: is told the fraction done. order: of verdicts, the worst first.
    Raises GazeError for settings that cannot be met, a picture that cannot be read and a score that is no number.
    """
    mine: list[Case] = []
    kept: list[int] = []  # places of those whose pixels are
    for batch in _batches(_pictures(processes, asked, settings, batch_size, advance), batch_size):
        verdicts = judge([shown.asked.text for shown in batch], [shown.image for shown in batch])
        for shown, verdict in zip(batch, verdicts, strict=True):
            if not math.isfinite(verdict.score):
                prompt = shown.asked.prompt
                raise GazeError(f"the judge says {verdict.score} of the picture of {prompt!r:.200}", "another judge")
            kept.append(len(mine))
            mine.append(Case(*shown, verdict))
        if len(kept) >= 2 * WORST:  # not each time, for it takes a sort
            kept = _keep_worst(mine, kept, order)
    _keep_worst(mine, kept, order)

    def unpack(data: bytes) -> Case:
        row, image = unpacked(data)
        return Case(row["number"], asked[row["number"]], row["settings"], image, Verdict(*row["verdict"]))

    return processes.collect(len(asked), mine, _packed, unpack)


def worst_of(cases: Sequence[Case], order: Callable[[Verdict], float] = by_score) -> list[Case]:
    """The 40 worst, the worst first."""
    return sorted(cases, key=lambda case: order(case.verdict))[:WORST]


def in_common(cases: Sequence[Case]) -> dict[str, Any]:
    """The settings that all pictures have in common; of finished ones there are none."""
    settings = cases[0].settings
    shared = {key: value for key, value in settings.items() if key not in OF_ONE_PICTURE}
    return {"seed": settings["seed"], **shared} if settings else {}


def _pictures(
    processes: Processes,
    asked: Sequence[Asked],
    settings: Mapping[str, Any],
    batch_size: int,
    advance: Callable[..., None],
) -> Iterator[Shown]:
    """This process's part."""
    part = processes.part(len(asked))
    if asked[0].file is None:
        first = settings.get("seed", 0)
        wanted = [{**settings, "prompt": each.prompt, "seed": first + number} for number, each in enumerate(asked)]
        for number, picture in zip(part, draw_part(processes, wanted, batch_size, advance), strict=True):
            yield Shown(number, asked[number], picture.settings, picture.image)
        return
    for number in part:
        advance((number - part.start) / len(part), f"{number - part.start + 1}/{len(part)}")
        yield Shown(number, asked[number], {}, open_picture(str(asked[number].file)))


def _batches(pictures: Iterator[Shown], batch_size: int) -> Iterator[list[Shown]]:
    at_once = 1 if own_device().type == "cpu" else batch_size
    while batch := [*islice(pictures, at_once)]:
        yield batch


def _keep_worst(cases: list[Case], kept: list[int], order: Callable[[Verdict], float]) -> list[int]:
    """Takes the pixels from all of the kept but the worst. Returns the places of those."""
    ranked = sorted(kept, key=lambda place: (order(cases[place].verdict), place))
    for place in ranked[WORST:]:
        cases[place] = replace(cases[place], image=None)
    return ranked[:WORST]


def _packed(case: Case) -> bytes:
    row = {"number": case.number, "settings": dict(case.settings), "verdict": case.verdict}
    return packed(row, case.image)
