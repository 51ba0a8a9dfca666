"""`python -m train report RUN`: one page of a run, RUN/report.html, that needs neither network nor server.

Curves, grids of samples over time, the resolved recipe, the environment and, where one was made, the plan. It reads
only what the run has written, so it may be made while the run goes on. Everything from files is escaped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from diffusion.errors import GazeError
from diffusion.files import replacing_file
from pipelines.page import page, png_uri

from .charts import Points, chart, short, smooth
from .page import BODY, SCRIPT, STYLE

MOST_GRIDS = 60  # on the page, evenly over the run
CHARTS = {  # in this order, then what else was logged; a name also holds the names that follow it with a slash
    "loss": ("Loss", "of the pictures of each interval"),
    "held_out_loss": ("Held-out loss", "of pictures never trained on, averaged weights; by noise level, sigma"),
    "shapes": (
        "Shapes",
        "share of pictures that show what is asked for, averaged weights; mean of the skills, and each",
    ),
    "retrieval": ("Retrieval", "share of pictures that are nearest to the true one, averaged weights"),
    "attention_entropy": ("Entropy of the words' maps", "nats, mean over the words of held-out captions"),
    "attention_spread": ("Spread of the words' maps", "their entropy as a share of a uniform map's"),
    "attention_overlap": ("Overlap of words", "of two side by side, as red and circle, and of all others"),
    "attention_share": ("What attention goes to", "shares of words and of special tokens"),
    "gradient_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
    "pictures_per_second": ("Pictures per second", "without validation and checkpoints"),
    "mfu": ("MFU", "share of the device's peak arithmetic"),
    "time": ("Time of a step", "shares"),
    "peak_memory_gb": ("Peak memory", "GB, of the first process"),
    "ema_distance": ("EMA distance", "of the averaged weights from the weights, relative"),
    "captions_dropped": ("Captions dropped", "share"),
}
NOISY = ("loss", "gradient_norm", "pictures_per_second")
TILES = ("shapes", "retrieval", "loss", "held_out_loss", "pictures_per_second", "mfu", "peak_memory_gb", "time/data")
SHARES = ("shapes", "retrieval", "mfu", "time/data")

Row = dict[str, Any]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train report", description="Writes RUN/report.html.")
    parser.add_argument("run", type=Path, help="the folder of a run, finished or not")
    print(write_report(parser.parse_args(words).run))
    return 0


def write_report(run: Path) -> Path:
    """Writes RUN/report.html and returns its path. Raises GazeError when RUN holds no metrics."""
    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        raise GazeError(f"{str(run)!r} holds no metrics.jsonl with figures",
                        "the folder of a run, its `out`, after the first log_every pictures")  # fmt: skip
    page = run / "report.html"
    with replacing_file(page) as aside:
        aside.write_text(render(run, rows), encoding="utf-8")
    return page


def read_rows(path: Path) -> list[Row]:
    """The JSON objects of a file, one a line, that say how many pictures were seen; a line cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_number(row.get("pictures")):
            rows.append(row)
    return rows


def render(run: Path, rows: list[Row]) -> str:
    """The page."""
    recipe_text = _read(run / "recipe.yaml")
    recipe = _parse(recipe_text)
    starts = read_rows(run / "environment.jsonl")
    curves = read_curves(rows)
    seen, pictures = rows[-1]["pictures"], recipe.get("pictures")
    total = pictures if _is_number(pictures) and pictures > 0 else seen
    share = min(seen / total, 1.0) if total else 1.0
    title = escape(run.resolve().name)
    body = BODY.substitute(
        title=title,
        phase=escape(str(recipe.get("phase", ""))),
        progress=escape(f"{seen:,} of {total:,} pictures ({share:.0%}){_left(curves, seen, total)}"),
        percent=f"{share:.1%}",
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tiles="".join(_tile(name, curves[name]) for name in TILES if name in curves),
        charts="".join(_charts(curves, [start["pictures"] for start in starts if start["pictures"]])),
        best=_best(_parse(_read(run / "best" / "score.json"))),
        samples=_samples(run / "samples", recipe),
        plan=_plan(_parse(_read(run / "plan.json")), curves, starts),  # JSON is YAML too
        environment=_environment(starts),
        recipe=escape(recipe_text),
    )
    return page(title, STYLE, body, SCRIPT)


def read_curves(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """(pictures, value) of each figure, by name; values that are no finite numbers are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "pictures" and _is_number(value):
                curves.setdefault(name, []).append((row["pictures"], value))
    return curves


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse(text: str) -> Row:
    try:
        recipe = yaml.safe_load(text)
    except Exception:  # PyYAML has its own errors for syntax, but any for a value such as 2001-99-99
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _left(curves: dict[str, list[tuple[float, float]]], seen: float, total: float) -> str:
    if "pictures_per_second" not in curves or seen >= total:
        return ""
    hours = (total - seen) / max(curves["pictures_per_second"][-1][1], 1e-9) / 3600
    return f", about {hours:.1f} hours left" if hours >= 1 else f", about {60 * hours:.0f} minutes left"


def _charts(curves: dict[str, list[tuple[float, float]]], resumes: list[float]) -> list[str]:
    groups: dict[str, dict[str, Points]] = {name: {} for name in CHARTS}
    for name, points in curves.items():
        group, _, part = name.partition("/")
        if group != "seconds":
            groups.setdefault(group, {})[part.replace("_", " ") or "mean"] = points
    charts = []
    for group, parts in groups.items():
        title, note = CHARTS.get(group, (group.replace("_", " "), ""))
        if parts:
            charts.append(chart(title, note, parts, resumes, group == "held_out_loss", group in NOISY))
    return charts


def _tile(name: str, points: Points) -> str:
    """The latest value, of a noisy curve the latest mean."""
    title = "Waiting for data" if name == "time/data" else CHARTS[name][0]
    value = (smooth(points) if name in NOISY else points)[-1][1]
    text = f"{value:.1%}" if name in SHARES else short(value)
    unit = " GB" if name == "peak_memory_gb" else ""
    return f"<div><small>{escape(title)}</small><b>{text}{unit}</b></div>"


def _best(found: Row) -> str:
    """A line on what out/best holds; "" where there is none."""
    score, low, high, seen = (found.get(key) for key in ("score", "low", "high", "pictures"))
    if not (_is_number(score) and _is_number(low) and _is_number(high) and _is_number(seen)):
        return ""
    text = f"{found.get('by')} {score:.1%} (95 % interval {low:.1%} to {high:.1%}) after {seen:,} pictures"
    return f"<p>Best so far, in best/: {escape(text)}</p>"


def _samples(folder: Path, recipe: Row) -> str:
    grids = sorted(folder.glob("[0-9]*.png"))
    if not grids:
        return ""
    last = len(grids) - 1
    chosen = sorted({round(place * last / (MOST_GRIDS - 1)) for place in range(MOST_GRIDS)})
    figures = []
    for number in chosen:
        shown = "" if number == last else " hidden"
        content = png_uri(grids[number].read_bytes())
        stem = grids[number].stem
        name = escape(f"{int(stem):,} pictures" if stem.isdecimal() else stem)
        image = f'<img alt="samples after {name}" src="{content}">'
        figures.append(f"<figure{shown}>{image}<figcaption>after {name}</figcaption></figure>")
    slider = (f'<input type="range" min="0" max="{len(chosen) - 1}" value="{len(chosen) - 1}" '
              'aria-label="samples over time">') if len(chosen) > 1 else ""  # fmt: skip
    validation = recipe.get("validation")
    prompts = validation.get("prompts") if isinstance(validation, dict) else None
    listed = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in prompts or ()) if isinstance(prompts, list) else ""
    prompts_text = f"<details><summary>Prompts</summary><ol>{listed}</ol></details>" if listed else ""
    return f'<section id="samples"><h2>Samples</h2>{slider}{"".join(figures)}{prompts_text}</section>'


def _plan(plan: Row, curves: dict[str, list[tuple[float, float]]], starts: list[Row]) -> str:
    """What plan.json foretold beside what was measured; "" where nothing can be compared, as with a plan for another
    number of devices. On a CPU the memory measured is that of the whole process, libraries too, and no figure of it."""
    last = starts[-1] if starts else {}
    if plan.get("count", last.get("processes")) != last.get("processes"):
        return ""
    memory = plan.get("memory")
    peak = memory.get("peak") if isinstance(memory, dict) else None
    planned = {"pictures_per_second": plan.get("pictures_per_second"), "mfu": plan.get("mfu")}
    if " cpu with " not in _text(last.get("devices", "")):  # as environment.py describes one
        planned |= {"peak_memory_gb": peak / 1e9 if _is_number(peak) else None}
    rows = []
    for name, value in planned.items():
        if name in curves and _is_number(value) and value:
            measured = statistics.median(point[1] for point in curves[name])
            rows.append([CHARTS[name][0], short(value), short(measured), f"{measured / value - 1:+.0%}"])
    heads = ["", "planned", "measured (median)", "measured against planned"]
    return f"<section><h2>Plan</h2>{_table(heads, rows)}</section>" if rows else ""


def _environment(starts: list[Row]) -> str:
    if not starts:
        return ""
    names = list(dict.fromkeys(name for start in starts for name in start))
    cells = [[_text(start.get(name, "")) for name in names] for start in starts]
    heads = ["from picture" if name == "pictures" else name for name in names]
    return f"<section><h2>Starts</h2>{_table(heads, cells)}</section>"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
