"""Placing orders, and looking at them: the types of the API and the SQL behind them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from orderbus import Tx
from services.orders_api.problem import Problem
from services.orders_api.service import bus
from services.shared.events import Line, OrderPlaced

MOST_LINES = 100
MOST_LISTED = 200


class NewLine(Line, frozen=True, forbid_unknown_fields=True):
    """So many pieces of an article, at a price in cents each."""

    # No control characters: PostgreSQL's jsonb holds no U+0000, and one such order would fail all that commit beside it.
    sku: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
    quantity: Annotated[int, Meta(ge=1, le=1_000)]
    unit_cents: Annotated[int, Meta(ge=0, le=10_000_000)]


class NewOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /orders. The total is the server's to compute."""

    customer_id: UUID
    lines: Annotated[tuple[NewLine, ...], Meta(min_length=1, max_length=MOST_LINES)]


class PlacedOrder(msgspec.Struct, frozen=True):
    """The answer to POST /orders: accepted, and on its way. A repetition under the same key has the same one."""

    order_id: UUID
    status: Literal["pending"]
    total_cents: int
    placed_at: datetime


class Step(msgspec.Struct, frozen=True):
    """One entry of an order's timeline."""

    what: Literal["placed", "payment", "stock", "finished"]
    outcome: str
    at: datetime


class Order(msgspec.Struct, frozen=True):
    """An order and its timeline of events, oldest first."""

    order_id: UUID
    customer_id: UUID
    status: Literal["pending", "confirmed", "cancelled"]
    reason: str | None
    total_cents: int
    lines: tuple[Line, ...]
    timeline: tuple[Step, ...]


class Listed(msgspec.Struct, frozen=True):
    """An order in a list."""

    order_id: UUID
    status: Literal["pending", "confirmed", "cancelled"]
    total_cents: int
    placed_at: datetime


class OrderList(msgspec.Struct, frozen=True):
    """A page of a customer's orders, newest first; `next` is the `after` of the next page, null on the last."""

    orders: tuple[Listed, ...]
    next: UUID | None


_decode_lines = msgspec.json.Decoder(tuple[Line, ...]).decode
_encode = msgspec.json.Encoder().encode


async def place(order_id: UUID, order: NewOrder, key: tuple[str, str] | None) -> PlacedOrder:
    """Store the order, its idempotency key (key, fingerprint) and its event in one transaction, shared with its neighbours.

    Raises psycopg's UniqueViolation for a key that exists, UnavailableError when the database is away.
    """
    total_cents = sum(line.quantity * line.unit_cents for line in order.lines)
    placed_at = datetime.now(UTC)
    row = (order_id, order.customer_id, total_cents, _encode(order.lines).decode(), placed_at)
    event = OrderPlaced(order_id=order_id, customer_id=order.customer_id, total_cents=total_cents, lines=order.lines)

    def work(tx: Tx) -> None:
        if key is None:
            tx.defer_row(_INSERT, row)
        else:
            tx.defer_row(_INSERT_WITH_KEY, (*row, *key))
        tx.emit(event)

    await bus.group_commit(work)
    return PlacedOrder(order_id, "pending", total_cents, placed_at)


async def placed_under(key: str) -> tuple[str, PlacedOrder] | None:
    """The fingerprint and the answer that are stored under an idempotency key."""
    async with bus.transaction() as tx:
        row = await tx.fetch_one(_SELECT_KEY, (key,))
    return None if row is None else (row[0], PlacedOrder(row[1], "pending", row[2], _utc(row[3])))


async def get(order_id: UUID) -> Order:
    """Raises Problem 404."""
    async with bus.transaction() as tx:
        row = await tx.fetch_one(_SELECT, (order_id,))
    if row is None:
        raise Problem(404, f"there is no order {order_id}")
    customer_id, status, reason, total, lines, placed_at, payment, payment_at, stock, stock_at, finished_at = row
    answers = []
    if payment_at is not None:
        answers.append(Step("payment", payment, _utc(payment_at)))
    if stock_at is not None:
        answers.append(Step("stock", stock, _utc(stock_at)))
    # Placed by this process's clock, the rest by the database's: the order of the steps does not hang on their agreeing.
    steps = [Step("placed", "accepted", _utc(placed_at)), *sorted(answers, key=lambda step: step.at)]
    if finished_at is not None:
        steps.append(Step("finished", status, _utc(finished_at)))
    return Order(order_id, customer_id, status, reason, total, _decode_lines(lines), tuple(steps))


async def of_customer(customer_id: UUID, limit: int, after: UUID | None) -> OrderList:
    """A page by keyset: as fast at the end of a long list as at its beginning. After an order that there isn't, it is empty."""
    async with bus.transaction() as tx:
        if after is None:
            rows = await tx.fetch_all(_LIST, (customer_id, limit + 1))
        else:
            rows = await tx.fetch_all(_LIST_AFTER, (customer_id, after, after, limit + 1))
    orders = tuple(Listed(order_id, status, total_cents, _utc(at)) for order_id, status, total_cents, at in rows[:limit])
    return OrderList(orders, orders[-1].order_id if len(rows) > limit else None)


_INSERT = """\
insert into orders (order_id, customer_id, total_cents, lines, placed_at)
select order_id, customer_id, total_cents, lines::jsonb, placed_at
from unnest(%s::uuid[], %s::uuid[], %s::bigint[], %s::text[], %s::timestamptz[])
    as placed (order_id, customer_id, total_cents, lines, placed_at)"""

# One statement, for each costs the same whatever it does.
_INSERT_WITH_KEY = """\
with placed as materialized (
    select * from unnest(%s::uuid[], %s::uuid[], %s::bigint[], %s::text[], %s::timestamptz[], %s::text[], %s::text[])
        as placed (order_id, customer_id, total_cents, lines, placed_at, key, fingerprint)
), stored as (
    insert into orders (order_id, customer_id, total_cents, lines, placed_at)
    select order_id, customer_id, total_cents, lines::jsonb, placed_at from placed
)
insert into idempotency_key (key, fingerprint, order_id) select key, fingerprint, order_id from placed"""

_SELECT_KEY = """\
select fingerprint, order_id, total_cents, placed_at from idempotency_key join orders using (order_id) where key = %s"""

_SELECT = """\
select customer_id, status, reason, total_cents, lines::text, placed_at, payment, payment_at, stock, stock_at, finished_at
from orders where order_id = %s"""

_LIST = """\
select order_id, status, total_cents, placed_at from orders
where customer_id = %s order by placed_at desc, order_id desc limit %s"""

_LIST_AFTER = """\
select order_id, status, total_cents, placed_at from orders
where customer_id = %s and (placed_at, order_id) < ((select placed_at from orders where order_id = %s), %s)
order by placed_at desc, order_id desc limit %s"""


def _utc(at: datetime) -> datetime:
    return at.astimezone(UTC)
