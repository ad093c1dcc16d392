"""The count at the end: from the database and the ids that the load was promised, never from what a service says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg


class Audit(msgspec.Struct, frozen=True):
    """What became of the orders: of the run's in the first three, of all that there are in the others, which must be 0."""

    orders: int
    completed: int
    confirmed: int
    lost: int
    """Accepted orders that are not in the database, or never came to an end; and finished ones without an effect they need."""
    doubled: int
    """Effects applied more than once: payments, reservations, orders under one Idempotency-Key."""
    ghosts: int
    """Effects for an order that does not exist."""
    oversold: int
    """Articles whose stock does not match what is reserved, or fell below nothing."""
    money_off: int
    """Confirmed orders not paid exactly, cancelled ones whose money or stock was kept."""


OUTBOXES = ("orderbus.outbox", "orderbus.stuck")
"""The tables in which events wait until they are sent."""

_FINISHED = """
select count(*), count(finished_at), count(*) filter (where status = 'confirmed') from orders where placed_at >= %s"""

_LOST = {
    "accepted but not stored, or not finished": """
        select count(*) from accepted left join orders using (order_id) where orders.finished_at is null""",
    "finished without a decision on payment": """
        select count(*) from orders left join payment using (order_id) where status = 'confirmed' and payment.order_id is null""",
    "finished without a decision on stock": """
        select count(*) from orders left join reservation using (order_id) where status = 'confirmed' and reservation.order_id is null""",
}

_DOUBLED = {
    "payments": "select coalesce(sum(greatest(times - 1, 0) + greatest(reversals - 1, 0)), 0) from payment",
    "reservations": "select coalesce(sum(greatest(times - 1, 0) + greatest(reversals - 1, 0)), 0) from reservation",
    "orders under one key": """
        select coalesce(sum(n - 1), 0) from (select count(*) as n from idempotency_key group by order_id) keys where n > 1""",
}

_GHOSTS = {
    "payments": "select count(*) from payment left join orders using (order_id) where orders.order_id is null",
    "reservations": "select count(*) from reservation left join orders using (order_id) where orders.order_id is null",
}

_OVERSOLD = """
with held as (
    select piece.key as sku, sum(piece.value::bigint) as pieces
    from reservation, jsonb_each_text(reservation.pieces) as piece where state = 'held' group by 1
)
select count(*) from stock left join held using (sku) where available < 0 or initial - available <> coalesce(pieces, 0)"""

_MONEY = """
select count(*) from orders left join payment using (order_id) left join reservation using (order_id)
where (status = 'confirmed' and (payment.state is distinct from 'authorized' or payment.amount_cents <> total_cents
           or reservation.state is distinct from 'held'))
   or (status = 'cancelled' and (payment.state = 'authorized' or reservation.state = 'held'))"""

_E2E = """
select coalesce(percentile_cont(0.5) within group (order by ms), 0), coalesce(percentile_cont(0.99) within group (order by ms), 0)
from (select extract(epoch from finished_at - placed_at) * 1000 as ms from orders
      where finished_at is not null and placed_at >= %s) spans"""


def audit(connection: psycopg.Connection[Any], accepted: Sequence[str], since: datetime) -> Audit:
    """Count. `accepted` are the order ids that the API answered with, `since` is when the run began."""
    connection.execute("create temporary table if not exists accepted (order_id uuid primary key) on commit preserve rows")
    connection.execute("truncate accepted")
    with connection.cursor().copy("copy accepted from stdin") as copy:
        for order_id in set(accepted):
            copy.write_row((order_id,))
    orders, completed, confirmed = _row(connection, _FINISHED, since)
    return Audit(
        orders=orders,
        completed=completed,
        confirmed=confirmed,
        lost=_total(connection, _LOST),
        doubled=_total(connection, _DOUBLED),
        ghosts=_total(connection, _GHOSTS),
        oversold=_row(connection, _OVERSOLD)[0],
        money_off=_row(connection, _MONEY)[0],
    )


def unsettled(connection: psycopg.Connection[Any], outboxes: Sequence[str] = OUTBOXES) -> int:
    """Orders that are not finished, events in these tables that are not yet sent, and compensations still to come."""
    counted = [
        "select count(*) from orders where status = 'pending'",
        *(f"select count(*) from {name}" for name in outboxes),  # noqa: S608 - of constants alone
        _MONEY,
    ]
    return sum(int(number) for number in _row(connection, "select " + ", ".join(f"({query})" for query in counted)))


def end_to_end_ms(connection: psycopg.Connection[Any], since: datetime) -> tuple[float, float]:
    """The median and the 99th percentile from an order's acceptance to its end, in milliseconds."""
    p50, p99 = _row(connection, _E2E, since)
    return float(p50), float(p99)


def _total(connection: psycopg.Connection[Any], queries: dict[str, str]) -> int:
    return sum(int(_row(connection, query)[0]) for query in queries.values())


def _row(connection: psycopg.Connection[Any], query: str, *parameters: object) -> tuple[Any, ...]:
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return tuple(row)
