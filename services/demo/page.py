"""build/demo.html: the run's curves on one page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.demo.curves import CHARTS, Chart, is_worth_drawing
from services.demo.figures import Figures, lines

WIDTH, PLOT_HEIGHT, LEGEND_ROW, BELOW, RIGHT = 860, 184, 18, 24, 24
CHARACTER = 6.8
"""The width of a wide one, in the size of the charts' text."""
COLOURS = ("#1f6feb", "#2da44e", "#bf8700", "#e5534b", "#8957e5", "#1b9aaa", "#db61a2", "#848d97")
MOST_STEPS = 6
"""Of a y axis."""

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--paper:#fff;--line:#d1d9e0;--dim:#59636e;--box:#f6f8fa;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#30363d;--dim:#9198a1;--box:#161b22;--good:#3fb950;--bad:#ff7b72}}
body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid var(--line)}
td:nth-child(n+2){text-align:right;font-variant-numeric:tabular-nums}.reached{color:var(--good)}.missed{color:var(--bad);font-weight:600}
h2+p{margin:-.6rem 0 .4rem;font-size:.85rem;color:var(--dim)}
svg line{stroke:var(--line)}svg text{font-size:11px;fill:var(--dim)}pre{background:var(--box);padding:.8rem;overflow:auto}"""


def write_page(
    path: Path,
    figures: Figures,
    rate: float,
    seconds: Sequence[int],
    series: Mapping[str, Mapping[str, Sequence[float | None]]],
    timeline: str,
) -> None:
    """`series` has the curves by their chart's title: name → a value for each of `seconds` (None where there is none)."""
    rows = "".join(
        f"<tr><td>{html.escape(line.label)}</td><td>{html.escape(line.value)}</td><td>{html.escape(line.target)}</td>"
        f'<td class="{"" if line.reached is None else "reached" if line.reached else "missed"}">'
        f"{'' if line.reached is None else 'reached' if line.reached else 'missed'}</td></tr>"
        for line in lines(figures, rate)
    )
    title = f"Event Stream Orders: {figures.mode}, {rate:.0f} orders/s asked for"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table><tr><th>figure</th><th>measured</th><th>target</th><th></th></tr>{rows}</table>{charts(seconds, series)}"
        f"<h2>An order's timeline</h2><pre>{html.escape(timeline)}</pre></html>\n",
        encoding="utf-8",
    )


def charts(seconds: Sequence[int], series: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """A chart for each that has something to show; the others are named at the end, with what there was not."""
    drawn, left_out = "", ""
    for chart in CHARTS:
        curves = series.get(chart.title, {})
        if is_worth_drawing(curves):
            note = f"<p>{html.escape(chart.note)}</p>" if chart.note else ""
            drawn += f"<h2>{html.escape(chart.title)}</h2>{note}{_drawn(chart, seconds, curves)}"
        else:
            left_out += f"<li>{html.escape(chart.title)}: {html.escape(chart.absent)}</li>"
    return drawn + (f"<h2>Without a curve</h2><ul>{left_out}</ul>" if left_out else "")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, the first at most `low` and the last at least `high`.

    >>> ticks(0, 2210), ticks(0, 0.2)
    ([0.0, 500.0, 1000.0, 1500.0, 2000.0, 2500.0], [0.0, 0.05, 0.1, 0.15, 0.2])
    """
    if low == high:
        return [low, low + 1]
    unit = 10.0 ** math.floor(math.log10((high - low) / MOST_STEPS))
    for step in (unit, 2 * unit, 5 * unit, 10 * unit):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= MOST_STEPS:
            break
    return [round(n * step, 9) for n in range(first, last + 1)]


def _drawn(chart: Chart, seconds: Sequence[int], curves: Mapping[str, Sequence[float | None]]) -> str:
    values = [value for of_one in curves.values() for value in of_one if value is not None]
    marks = ticks(0 if chart.from_zero else min(values), max(values))
    labels = _labels(marks)
    left = 12 + CHARACTER * max(map(len, labels))
    legend, rows = _legend(curves, left)
    top = LEGEND_ROW * rows + 10
    bottom = top + PLOT_HEIGHT

    def x(n: int) -> float:
        return left + n * (WIDTH - left - RIGHT) / max(len(seconds) - 1, 1)

    def y(value: float) -> float:
        return bottom - (value - marks[0]) * PLOT_HEIGHT / (marks[-1] - marks[0])

    title = html.escape(f"{chart.title}: {', '.join(curves)}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + BELOW}" role="img" aria-label="{title}">', legend]
    for mark, label in zip(marks, labels, strict=True):
        parts.append(f'<line x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y(mark) + 4:.1f}" text-anchor="end">{label}</text>')
    for n in range(0, len(seconds), max(math.ceil(len(seconds) / 12), 1)):
        text = f"{seconds[n] - seconds[0]} s"
        parts.append(f'<text x="{x(n):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    for number, of_one in enumerate(curves.values()):
        points = [(x(n), y(value)) for n, value in enumerate(of_one) if value is not None]
        parts.append(_line(points, number))
    return "".join(parts) + "</svg>"


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    """A curve; of one point a dot, which a line would not show."""
    colour = COLOURS[number % len(COLOURS)]
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>'
    dashes = ' stroke-dasharray="6 4"' if number >= len(COLOURS) else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"{dashes}/>'


def _legend(names: Mapping[str, object], left: float) -> tuple[str, int]:
    """Names beside their colours, in as many rows as they need; and how many that are."""
    parts, row, at = [], 0, left
    for number, name in enumerate(names):
        width = 18 + CHARACTER * len(name) + 14
        if at > left and at + width > WIDTH - RIGHT:
            row, at = row + 1, left
        colour, y = COLOURS[number % len(COLOURS)], row * LEGEND_ROW
        parts.append(f'<rect x="{at:.1f}" y="{y + 4}" width="12" height="8" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{at + 18:.1f}" y="{y + 12}">{html.escape(name)}</text>')
        at += width
    return "".join(parts), row + 1


def _labels(marks: Sequence[float]) -> list[str]:
    """With as many decimals as tell them apart.

    >>> _labels([0, 0.5, 1]), _labels([0, 1_000_000])
    (['0.0', '0.5', '1.0'], ['0', '1,000,000'])
    """
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 0.000001))
    return [f"{mark:,.{decimals}f}" for mark in marks]
