"""What is told of judged pictures: as JSON, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .frame import Case


def report_of(cases: Sequence[Case], summary: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values: the summary (score, low, high, n, ...), settings (of the pictures and the judge) and pictures
    (prompt, score, what was said, and seed or file of each)."""
    return {**summary, "settings": dict(settings), "pictures": [case.row() for case in cases]}


def table(name: str, report: Mapping[str, Any]) -> str:
    """A report in a few lines of text."""
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    return "\n".join([*score_lines("", {name: report}, ".4f"), "", settings])


def score_lines(head: str, rows: Mapping[str, Mapping[str, Any]], form: str = ".1%") -> list[str]:
    """A head and one line for each row: its name, score, 95 % interval and n."""
    lines = [f"{head:<16}{'score':>9}{'95 % interval':>23}{'n':>7}"]
    for name, part in rows.items():
        interval = f"{part['low']:{form}} to {part['high']:{form}}"
        lines.append(f"{name:<16}{part['score']:>9{form}}{interval:>23}{part['n']:>7}")
    return lines
