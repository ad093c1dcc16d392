"""An SVG of bars, made from the results only: it needs no library, and any browser shows it, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.results import OURS, Result, tables_of

WIDTH, LABEL, BAR, GAP, HEAD = 860, 190, 16, 6, 34
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 } .head { font-weight: 600; font-size: 14px } .bar { fill: #8c959f }
.ours { fill: #0969da } .range { stroke: #1f2328; stroke-width: 1 } .paper { fill: #ffffff }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #6e7681 } .ours { fill: #2f81f7 } .range { stroke: #e6edf3 }
.paper { fill: #0d1117 } }"""


def svg(results: Sequence[Result]) -> str:
    """A group of bars for each workload and variant; the thin line is the range of the rounds."""
    shapes: list[str] = []
    y = 10
    for (workload, variant), rows in tables_of(results).items():
        longest = max(one.messages_per_s_max for one in rows)
        shapes.append(
            f'<text class="head" x="10" y="{y + 16}">{escape(f"{workload}, {variant}: {rows[0].unit}s a second")}</text>'
        )
        y += HEAD
        for one in rows:
            shapes += _bar(one, y, (WIDTH - LABEL - 110) / longest, is_ours=one.peer == OURS)
            y += BAR + GAP
        y += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">'
        f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{y}"/>{"".join(shapes)}</svg>\n'
    )


def _bar(one: Result, y: int, per_unit: float, *, is_ours: bool) -> list[str]:
    middle = y + BAR / 2
    low, high = LABEL + one.messages_per_s_min * per_unit, LABEL + one.messages_per_s_max * per_unit
    return [
        f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(one.peer)}</text>',
        f'<rect class="{"ours" if is_ours else "bar"}" x="{LABEL}" y="{y}" width="{one.messages_per_s * per_unit:.1f}" height="{BAR}"/>',
        f'<line class="range" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
        f'<text x="{high + 8:.1f}" y="{y + 12}">{one.messages_per_s:,.0f}</text>',
    ]
