"""What is in the outbox, as data for programs, and as text for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orderbus._core.outbox_rows import HeldRow, OutboxStats
from orderbus.cli.letters import utc_time
from orderbus.cli.output import plain


def row_data(row: HeldRow) -> dict[str, Any]:
    return {
        "event": "outbox-row",
        "id": row.event_id,
        "state": row.state,
        "topic": row.topic,
        "key": row.key,
        "bucket": row.bucket,
        "size_bytes": row.size_bytes,
        "created_at": utc_time(row.created_at_s),
        "due_at": utc_time(row.due_at_s),
        "reason": row.reason,
        "attempts": row.attempts,
        "first_failed_at": utc_time(row.first_failed_at_s),
        "last_failed_at": utc_time(row.last_failed_at_s),
        "next_try_at": utc_time(row.next_try_at_s),
        "waits_for": row.waits_for,
    }


def rows_table(rows: Sequence[HeldRow]) -> RenderableType:
    """Two lines for each, cut to the terminal's width; the event's id is always whole, to be copied."""
    lines: list[RenderableType] = []
    now_s = time.time()
    for row in rows:
        first = Text(no_wrap=True, overflow="ellipsis")
        first.append(f"{row.event_id}", style="bold").append(f"  {row.state:<9}  {plain(row.topic)}")
        lines += [first, Text(f"    {plain(_why(row, now_s))}", style="dim", no_wrap=True, overflow="ellipsis")]
    return Group(*lines)


def stats_tables(stats: OutboxStats) -> RenderableType:
    if stats.held:
        held: RenderableType = _table("state", "topic", "events", "bytes", "oldest", "overdue")
        assert isinstance(held, Table)
        for one in stats.held:
            held.add_row(one.state, plain(one.topic), str(one.count), str(one.size_bytes), age(one.oldest_s), age(one.overdue_s))
    else:
        held = Text("nothing waits in the outbox")
    parts: list[RenderableType] = [held]
    if stats.stuck:
        stuck = _table("stuck for", "events", "since", "most tries", "next try in")
        for why in stats.stuck:
            stuck.add_row(plain(why.reason), str(why.count), age(why.since_s), str(why.most_attempts), _next(why.next_try_in_s))
        parts += ["", stuck]
    holders = _table("relay", "buckets", "events in them", "lease ends in", "last seen")
    for holder in stats.holders:
        name = "nobody: these wait" if holder.owner is None else plain(holder.owner)
        holders.add_row(name, str(holder.buckets), str(holder.waiting), age(holder.lease_left_s), age(holder.seen_s))
    return Group(*parts, "", holders)


def age(seconds: float | None) -> str:
    """A length of time for a person: `3.2 s`, `14.0 min`, `2.5 h`, `3.0 d`."""
    if seconds is None:
        return "-"
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.1f} {unit}"
    return f"{seconds:.1f} s"


def tries(count: int) -> str:
    return "1 try" if count == 1 else f"{count} tries"


def _next(in_s: float | None) -> str:
    return "due" if in_s is not None and in_s <= 0 else age(in_s)


def _why(row: HeldRow, now_s: float) -> str:
    parts = [f"{age(now_s - row.created_at_s)} old"]
    if row.key is not None:
        parts.append(f"key {row.key}")
    if row.due_at_s is not None:
        parts.append(
            f"due in {age(row.due_at_s - now_s)}" if row.due_at_s > now_s else f"overdue for {age(now_s - row.due_at_s)}"
        )
    if row.waits_for is not None:
        parts.append(f"behind {row.waits_for}")
    elif row.state == "stuck":
        parts.append(f"{row.reason}, {tries(row.attempts)}")
        if row.next_try_at_s is not None:
            parts.append(f"next in {age(row.next_try_at_s - now_s)}" if row.next_try_at_s > now_s else "next try is due")
    return ", ".join(parts)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
