"""The charts of the report: their titles, and their curves by second, made of rows, of samples, and of log lines.

All functions take the seconds of the x axis, and give a value for each of them: None where nothing is known.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg

from services.demo.watch import Sample

Curves = dict[str, list[float | None]]
BySecond = Mapping[int, Mapping[str, float]]


class Chart(msgspec.Struct, frozen=True):
    """`absent` is said instead of it where there is nothing to draw; `note` stands under its title."""

    title: str
    absent: str
    note: str = ""
    from_zero: bool = True
    """Whether its y axis begins at 0."""


ORDERS = Chart("Orders per second", "no order was placed")
FINISHED = Chart("Orders finished per second, by status", "no order was finished")
CANCELLED = Chart("Orders cancelled per second, by reason", "no order was cancelled")
REVENUE = Chart("Revenue per second, cents", "no order was confirmed", "The totals of the orders that were confirmed.")
ANSWERS = Chart("API answers per second, by status", "the API was asked nothing")
ERRORS = Chart("API errors, % of requests", "every request was answered with 200 or 201")
LATENCY = Chart("API latency, ms", "the API was asked nothing", "Of POST /orders, as the load sees it.")
END_TO_END = Chart("End to end, ms", "no order was finished", "From the placing of an order to its end.")
HANDLED = Chart(
    "Handled per second, by consumer",
    "the inbox is empty",
    "Of the inbox. Notification has its guard in Redis, and is not among them.",
)
LAG = Chart(
    "Lag p99, ms, by consumer",
    "the inbox is empty",
    "From the event's emission to the begin of the transaction that handled it.",
)
WAITING = Chart("Waiting", "nothing waited at any second")
OUTBOX_AGE = Chart("Outbox, age of the oldest, s", "the outbox was empty at every second")
READY = Chart("Ready, by queue", "no queue held a message when it was asked")
DEAD = Chart("Dead letters, by queue", "there were none when the queues were asked")
STOCK = Chart("Stock, pieces of all articles", "nothing is on the shelves", "The axis does not begin at 0.", from_zero=False)
SCARCEST = Chart("Stock, pieces of the scarcest article", "an article was sold out all the time")
LOGGED = Chart(
    "Errors and warnings in the logs, per second", "there were none", "Of lines that are alike, 50 in 10 s are logged."
)

CHARTS = (
    ORDERS,
    FINISHED,
    CANCELLED,
    REVENUE,
    ANSWERS,
    ERRORS,
    LATENCY,
    END_TO_END,
    HANDLED,
    LAG,
    WAITING,
    OUTBOX_AGE,
    READY,
    DEAD,
    STOCK,
    SCARCEST,
    LOGGED,
)
"""In the order of the page."""


# What the database knows afterwards

_SPEED = """
select second, sum(placed)::int, sum(finished)::int, max(p50), max(p99) from (
    select extract(epoch from date_trunc('second', placed_at))::bigint as second, count(*) as placed, 0 as finished, null::float8 as p50,
        null::float8 as p99
    from orders group by 1
    union all
    select extract(epoch from date_trunc('second', finished_at))::bigint, 0, count(*),
        percentile_cont(0.5) within group (order by extract(epoch from finished_at - placed_at) * 1000),
        percentile_cont(0.99) within group (order by extract(epoch from finished_at - placed_at) * 1000)
    from orders where finished_at is not null group by 1
) seconds group by second order by second"""

_FINISHED = """
select extract(epoch from date_trunc('second', finished_at))::bigint, status, coalesce(reason, 'none'), count(*)::int,
    coalesce(sum(total_cents) filter (where status = 'confirmed'), 0)::float8
from orders where finished_at is not null group by 1, 2, 3 order by 1, 2, 3"""

# The first 48 bits of an event's id, a UUIDv7, are the milliseconds of its emission.
_HANDLED = """
select extract(epoch from date_trunc('second', handled_at))::bigint, consumer.name, count(*)::int,
    percentile_cont(0.99) within group (order by greatest(
        extract(epoch from handled_at) * 1000 - ('x' || left(replace(event_id::text, '-', ''), 12))::bit(48)::bigint, 0))::float8
from orderbus.inbox join orderbus.consumer on consumer.id = inbox.consumer group by 1, 2 order by 1, 2"""


def speed_rows(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """By second: orders placed, orders finished, end-to-end p50 and p99."""
    return connection.execute(_SPEED).fetchall()


def finished_rows(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """By second, status and reason: how many orders were finished, and the cents of the confirmed ones."""
    return connection.execute(_FINISHED).fetchall()


def handled_rows(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """By second and consumer: how many events were handled, and the 99th percentile of their lag in milliseconds."""
    return connection.execute(_HANDLED).fetchall()


# Curves


def axis(*sources: Iterable[int]) -> list[int]:
    """Every second from the first of these to the last."""
    known = [second for source in sources for second in source]
    return list(range(min(known), max(known) + 1)) if known else []


def speed(seconds: Sequence[int], rows: Iterable[Sequence[Any]], times_ms: Mapping[int, Sequence[float]]) -> dict[str, Curves]:
    """Throughput, and both latencies; of `speed_rows`, and of how long each request took."""
    by_second = {int(row[0]): row[1:] for row in rows}
    return {
        ORDERS.title: {
            "accepted": [by_second[s][0] if s in by_second else 0 for s in seconds],
            "completed": [by_second[s][1] if s in by_second else 0 for s in seconds],
        },
        LATENCY.title: {
            "p50": [percentile(times_ms[s], 0.5) if s in times_ms else None for s in seconds],
            "p99": [percentile(times_ms[s], 0.99) if s in times_ms else None for s in seconds],
        },
        END_TO_END.title: {
            "p50": [by_second[s][2] if s in by_second else None for s in seconds],
            "p99": [by_second[s][3] if s in by_second else None for s in seconds],
        },
    }


def business(seconds: Sequence[int], rows: Sequence[Sequence[Any]]) -> dict[str, Curves]:
    """What became of the orders; of `finished_rows`."""
    return {
        FINISHED.title: counted(seconds, ((row[0], row[1], row[3]) for row in rows)),
        CANCELLED.title: counted(seconds, ((row[0], row[2], row[3]) for row in rows if row[1] == "cancelled")),
        REVENUE.title: counted(seconds, ((row[0], "revenue", row[4]) for row in rows if row[1] == "confirmed")),
    }


def consumers(seconds: Sequence[int], rows: Sequence[Sequence[Any]]) -> dict[str, Curves]:
    """Of `handled_rows`."""
    lag: dict[int, dict[str, float]] = defaultdict(dict)
    for second, name, _, p99 in rows:
        lag[second][name] = p99
    return {
        HANDLED.title: counted(seconds, ((row[0], row[1], row[2]) for row in rows)),
        LAG.title: known(seconds, lag),
    }


def answers(seconds: Sequence[int], by_second: BySecond) -> dict[str, Curves]:
    """What the load was answered: second → status → how often."""
    failed = {
        second: {"failed": 100 * sum(n for status, n in found.items() if status not in ("200", "201")) / sum(found.values())}
        for second, found in by_second.items()
        if found
    }
    rows = ((second, status, n) for second, found in by_second.items() for status, n in found.items())
    return {ANSWERS.title: counted(seconds, rows), ERRORS.title: known(seconds, failed)}


def watched(seconds: Sequence[int], samples: Mapping[int, Sample], depths: BySecond) -> dict[str, Curves]:
    """What waited and what was left, as it was looked at; and the depths of the queues: second → queue → messages."""
    queues = known(seconds, depths)
    return {
        WAITING.title: {
            "orders pending": _of(seconds, samples, lambda seen: seen.placed - seen.finished),
            "rows in the outbox": _of(seconds, samples, lambda seen: seen.outbox_rows),
        },
        OUTBOX_AGE.title: {"oldest": _of(seconds, samples, lambda seen: seen.outbox_age_s)},
        READY.title: _busy({name: values for name, values in queues.items() if not name.endswith(".dlq")}),
        DEAD.title: _busy({name: values for name, values in queues.items() if name.endswith(".dlq")}),
        STOCK.title: {"all": _of(seconds, samples, lambda seen: seen.pieces)},
        SCARCEST.title: {"scarcest": _of(seconds, samples, lambda seen: seen.scarcest)},
    }


def logged(seconds: Sequence[int], outputs: Mapping[str, Iterable[bytes]]) -> dict[str, Curves]:
    """Errors and warnings among the lines that each process has written: JSON, or as people read them, with the time of day."""
    at = {time.strftime("%H:%M:%S", time.localtime(second)).encode(): second for second in seconds}
    rows = ((_second_of(line, at), name, 1) for name, lines in outputs.items() for line in lines)
    return {LOGGED.title: counted(seconds, ((second, name, n) for second, name, n in rows if second is not None))}


def counted(seconds: Sequence[int], rows: Iterable[tuple[int, str, float]]) -> Curves:
    """A curve for each name, by how often it is; 0 where it has no row."""
    found: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for second, name, value in rows:
        found[name][int(second)] += value
    in_order = sorted(found, key=lambda name: (-sum(found[name].values()), name))
    return {name: [found[name].get(second, 0) for second in seconds] for name in in_order}


def known(seconds: Sequence[int], by_second: BySecond) -> Curves:
    """A curve for each name; None where nothing is known."""
    names = dict.fromkeys(name for found in by_second.values() for name in found)
    return {name: [by_second[second].get(name) if second in by_second else None for second in seconds] for name in names}


def is_worth_drawing(curves: Mapping[str, Sequence[float | None]]) -> bool:
    """Whether anything in it is more than 0."""
    return any(value for values in curves.values() for value in values)


def percentile(values: Sequence[float], share: float) -> float:
    if not values:
        return 0.0
    if len(values) < 100:
        return sorted(values)[min(int(share * len(values)), len(values) - 1)]
    return statistics.quantiles(values, n=100, method="inclusive")[int(share * 100) - 1]


def _of(seconds: Sequence[int], samples: Mapping[int, Sample], value: Callable[[Sample], float]) -> list[float | None]:
    return [value(samples[second]) if second in samples else None for second in seconds]


def _busy(curves: Curves) -> Curves:
    return {name: values for name, values in curves.items() if any(values)}


_FOR_PEOPLE = re.compile(rb"(\d\d:\d\d:\d\d) (WARNING|ERROR|CRITICAL) ")


class _Line(msgspec.Struct):
    at: str = msgspec.field(name="@timestamp")
    level: str = msgspec.field(name="log.level")


def _second_of(line: bytes, at: Mapping[bytes, int]) -> int | None:
    """When it was logged, where it is an error or a warning."""
    if line.startswith(b"{"):
        try:
            found = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError:
            return None  # a receipt
        return int(datetime.fromisoformat(found.at).timestamp()) if found.level in ("warning", "error", "critical") else None
    for_people = _FOR_PEOPLE.match(line)
    return at.get(for_people[1]) if for_people else None
