"""The page of a report: the score, what it belongs to, and the worst pictures with what the judge says of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from diffusion.errors import GazeError
from diffusion.files import replacing_file

from ..page import page, png_uri
from .frame import Case

LARGEST = 384  # pixels of a side; a larger picture is shown smaller

STYLE = """
table { border-collapse: collapse; margin-top: 18px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; }
.cases { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); }
.cases figure { padding: 12px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); }
.cases img { display: block; width: 100%; border-radius: 4px; }
.small { image-rendering: pixelated; }
figcaption { margin-top: 8px; overflow-wrap: anywhere; }
figcaption b { display: block; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 6px 0 0; font-size: 13px; }
dt { color: var(--dim); }
dd { margin: 0; }
"""

BODY = Template("""<header>
<h1>$title</h1>
<div class="dim">$about</div>
</header>
<main>
$scores
<h2>The worst $count of $n</h2>
<div class="cases">
$cases
</div>
<h2>Settings</h2>
$settings
</main>
""")


def save_page(title: str, report: Mapping[str, Any], worst: Sequence[Case], file: Path) -> None:
    """Writes the page. report: score, low, high, n, settings, and skills where there are some. worst: the cases, the
    worst first. Raises GazeError when the file cannot be written."""
    text = render(title, report, worst)
    try:
        with replacing_file(file) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise GazeError(f"{file} cannot be written: {error.strerror or error}", "another file with --page") from error


def render(title: str, report: Mapping[str, Any], worst: Sequence[Case]) -> str:
    """The page of `save_page`."""
    rows = [[name, *_numbers(part)] for name, part in {**report.get("skills", {}), "all": report}.items()]
    body = BODY.substitute(
        title=escape(title),
        about=f"{_number(report['score'])} (95&#8239;% interval {_number(report['low'])} to {_number(report['high'])})",
        scores=_table([["", "score", "low", "high", "n"], *rows]),
        count=len(worst),
        n=report["n"],
        cases="\n".join(map(_figure, worst)),
        settings=_table([["setting", "value"], *([key, _said(value)] for key, value in report["settings"].items())]),
    )
    return page(escape(title), STYLE, body, "")


def _figure(case: Case) -> str:
    row = case.row()
    source = "file" if "file" in row else "seed"
    said = {"score": _number(row["score"]), source: row[source], **row["said"]}
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_said(value))}</dd>" for key, value in said.items())
    picture = case.image.copy() if case.image is not None else Image.new("RGB", (1, 1))
    picture.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    small = ' class="small"' if max(picture.size) <= LARGEST // 2 else ""
    image = f'<img{small} alt="{escape(case.asked.text)}" src="{png_uri(content.getvalue())}">'
    return f"<figure>{image}<figcaption><b>{escape(row['prompt'])}</b><dl>{lines}</dl></figcaption></figure>"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *lines = rows
    cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines]
    names = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    return f"<table><tr>{names}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _numbers(part: Mapping[str, Any]) -> list[str]:
    return [_number(part["score"]), _number(part["low"]), _number(part["high"]), str(part["n"])]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _said(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number(value) if isinstance(value, float) else str(value)
