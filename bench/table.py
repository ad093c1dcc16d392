"""Markdown tables, made from the results only."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import OURS, Result, ratio, tables_of

HEAD = (
    "| {unit}s | per second | min..max | orderbus is | client CPU | server CPU | p50 | p99 | peak memory | lost, doubled, left |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def markdown(results: Sequence[Result]) -> str:
    """A table for each workload and variant. The ratios are to orderbus's row, and left out where there is none."""
    parts = []
    for (workload, variant), rows in tables_of(results).items():
        ours = next((one for one in rows if one.peer == OURS), None)
        first = rows[0]
        lines = [f"**{workload}, {variant}** ({first.rounds} rounds, {first.machine})", "", HEAD.format(unit=first.unit)]
        lines += [_row(one, ours) for one in rows]
        lines += [line for one in rows if (line := _more(one))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(one: Result, ours: Result | None) -> str:
    versions = " ".join(f"{name} {version}" for name, version in one.versions.items() if name not in ("msgspec", "psycopg"))
    cells = [
        f"{one.peer} ({versions})" if one is not ours else f"**{one.peer}**",
        f"{one.messages_per_s:,.0f}",
        f"{one.messages_per_s_min:,.0f}..{one.messages_per_s_max:,.0f}",
        "" if ours is None or one is ours else f"{ratio(ours, one):.2f}×",
        f"{one.client_cpu_us:,.1f} µs",
        f"{one.server_cpu_us:,.1f} µs",
        _ms(one.p50_ms),
        _ms(one.p99_ms),
        f"{one.peak_rss_mib:,.0f} MiB",
        f"{one.lost}, {one.doubled}, {one.left}",
    ]
    return "| " + " | ".join(cells) + " |"


def _ms(latency: float | None) -> str:
    return "" if latency is None else f"{latency:,.{1 if latency >= 10 else 2}f} ms"


def _more(one: Result) -> str:
    told = ", ".join(f"{name} {value:g}" for name, value in one.more.items())
    return f"\n{one.peer}: {told}" if told else ""
