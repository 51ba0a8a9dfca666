"""Curves as inline SVG: one figure per chart, readable without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain

WIDTH, HEIGHT = 560, 200  # of the area of the curves
LEFT, TOP, RIGHT, BOTTOM = 62, 8, 14, 26
MOST = 700  # points of a drawn curve
SMOOTHED_FROM = 60  # points
LOGARITHMIC_FROM = 30.0  # ratio of the largest value to the smallest
COLOURS = ("#2f7fd0", "#d9730d", "#2b9a66", "#b0479b", "#8a6d00", "#c0392b", "#5b6ee1", "#3d8b8b")

Points = Sequence[tuple[float, float]]


def chart(
    title: str,
    note: str,
    curves: Mapping[str, Points],
    marks: Sequence[float] = (),
    ordered: bool = False,
    noisy: bool = False,
) -> str:
    """A figure of curves by name over pictures seen, values finite.

    marks: places on the x axis, as dashed lines. ordered: the curves have an order, which their colours then show, all
    but the one called "mean". noisy: curves of many points are drawn pale, with their running means.
    The y axis is logarithmic where values are positive and spread far.
    """
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) >= LOGARITHMIC_FROM
    scale = math.log10 if logarithmic else float
    low, high = _spread(scale(min(ys)), scale(max(ys)))
    start, end = _spread(min(xs), max(xs), margin=0)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - start) / (end - start) * WIDTH, (high - scale(y)) / (high - low) * HEIGHT

    colours = [_colour(name, number, len(curves), ordered) for number, name in enumerate(curves)]
    view = f"{-LEFT} {-TOP} {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}"
    data = f'data-x="{start!r} {end!r}" data-y="{low!r} {high!r}"'
    data += f' data-log="{int(logarithmic)}" data-size="{WIDTH} {HEIGHT}"'
    parts = [f'<svg viewBox="{view}" role="img" aria-label="{escape(title)}" {data}>']
    for value in _ticks_log(low, high) if logarithmic else _ticks(low, high):
        _, y = place(start, value)
        parts.append(f'<line class="rule" x1="0" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>'
                     f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')  # fmt: skip
    for value in _ticks(start, end):
        x, _ = place(value, ys[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 18}" text-anchor="middle">{short(value)}</text>')
    for mark in marks:
        x, _ = place(mark, ys[0])
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{HEIGHT}"/>')
    for (name, points), colour in zip(curves.items(), colours, strict=True):
        raw = ""
        if noisy and len(points) >= SMOOTHED_FROM:
            parts.append(_curve(name, [place(*point) for point in thin(points)], colour, "raw"))
            points, raw = smooth(points), ", running mean"
        parts.append(_curve(name + raw, [place(*point) for point in thin(points)], colour, "curve"))
    parts.append(f'<line class="cursor" x1="0" y1="0" x2="0" y2="{HEIGHT}" visibility="hidden"/></svg>')
    keys = [f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
            for name, colour in zip(curves, colours, strict=True)]  # fmt: skip
    legend = f'<div class="legend">{"".join(keys)}</div>' if len(curves) > 1 else ""
    head = f"<figcaption><b>{escape(title)}</b> <small>{escape(note)}</small><output></output></figcaption>"
    return f'<figure class="chart">{head}{"".join(parts)}{legend}</figure>'


def smooth(points: Points) -> list[tuple[float, float]]:
    """The mean of each value and those before it, over a thirtieth of the curve."""
    window = max(len(points) // 30, 2)
    means, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - window][1] if index >= window else 0.0)
        means.append((x, total / min(index + 1, window)))
    return means


def thin(points: Points) -> Points:
    """At most about MOST points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST:
        return points
    step = -(-2 * len(points) // MOST)
    stretches = (points[start : start + step] for start in range(0, len(points), step))
    ends = ({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1]), stretch[-1]}
            for stretch in stretches)  # fmt: skip
    return list(chain.from_iterable(sorted(stretch) for stretch in ends))


def short(value: float) -> str:
    """A number in a few letters: 0.25, 12k, 3.5M, 2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _curve(name: str, places: Points, colour: str, kind: str) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    dot = f'<circle cx="{places[0][0]:.2f}" cy="{places[0][1]:.2f}" r="3" fill="{colour}"/>' if len(places) == 1 else ""
    return f'{dot}<polyline class="{kind}" data-name="{escape(name)}" points="{points}" style="stroke:{colour}"/>'


def _colour(name: str, number: int, count: int, ordered: bool) -> str:
    """Of curve `number` of `count`. Shades go from blue to red, alike in lightness, for light pages and dark ones."""
    if not ordered:
        return COLOURS[number % len(COLOURS)]
    return "var(--text)" if name == "mean" else f"hsl({220 - 215 * number / max(count - 1, 1):.0f} 65% 52%)"


def _spread(low: float, high: float, margin: float = 0.05) -> tuple[float, float]:
    """The ends of an axis; never one point."""
    if low == high:
        return low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _ticks_log(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where these are few. low, high: logarithms to base 10."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    values = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]
