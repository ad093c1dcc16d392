"""build/demo.html: the run's curves on one page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.demo.figures import Figures, lines

WIDTH, HEIGHT, MARGIN = 860, 240, 48
COLOURS = ("#1f6feb", "#2da44e", "#bf8700", "#cf222e")

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--paper:#fff;--line:#d1d9e0;--dim:#59636e;--box:#f6f8fa;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#30363d;--dim:#9198a1;--box:#161b22;--good:#3fb950;--bad:#ff7b72}}
body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid var(--line)}
td:nth-child(n+2){text-align:right;font-variant-numeric:tabular-nums}.reached{color:var(--good)}.missed{color:var(--bad);font-weight:600}
svg line{stroke:var(--line)}svg text{font-size:11px;fill:var(--dim)}pre{background:var(--box);padding:.8rem;overflow:auto}"""


def write_page(
    path: Path,
    figures: Figures,
    rate: float,
    seconds: Sequence[int],
    series: Mapping[str, Mapping[str, Sequence[float | None]]],
    timeline: str,
) -> None:
    """One chart for each entry of `series`: its title, then name → a value for each of `seconds` (None where there is none)."""
    rows = "".join(
        f"<tr><td>{html.escape(line.label)}</td><td>{html.escape(line.value)}</td><td>{html.escape(line.target)}</td>"
        f'<td class="{"" if line.reached is None else "reached" if line.reached else "missed"}">'
        f"{'' if line.reached is None else 'reached' if line.reached else 'missed'}</td></tr>"
        for line in lines(figures, rate)
    )
    charts = "".join(f"<h2>{html.escape(title)}</h2>{_chart(seconds, curves)}" for title, curves in series.items())
    title = f"Event Stream Orders: {figures.mode}, {rate:.0f} orders/s asked for"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table><tr><th>figure</th><th>measured</th><th>target</th><th></th></tr>{rows}</table>{charts}"
        f"<h2>An order's timeline</h2><pre>{html.escape(timeline)}</pre></html>\n",
        encoding="utf-8",
    )


def _chart(seconds: Sequence[int], curves: Mapping[str, Sequence[float | None]]) -> str:
    top = max((value for values in curves.values() for value in values if value is not None), default=1.0) or 1.0
    span = max(len(seconds) - 1, 1)

    def at(n: int, value: float) -> str:
        return f"{MARGIN + n * (WIDTH - 2 * MARGIN) / span:.1f},{HEIGHT - MARGIN / 2 - value * (HEIGHT - MARGIN) / top:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(", ".join(curves))}">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = HEIGHT - MARGIN / 2 - share * (HEIGHT - MARGIN)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:.0f}</text>')
    for n in range(0, len(seconds), max(len(seconds) // 10, 1)):
        parts.append(
            f'<text x="{at(n, 0).split(",")[0]}" y="{HEIGHT - 6}" text-anchor="middle">{seconds[n] - seconds[0]} s</text>'
        )
    for number, (name, values) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(at(n, value) for n, value in enumerate(values) if value is not None)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 8 + number * 170}" y="14" style="fill:{colour}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"
