"""Placing orders, and looking at them: the types of the API and the SQL behind them."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from orderbus import Tx
from services.orders_api.problem import Mistake, Problem
from services.orders_api.service import bus
from services.shared.events import Line, OrderPlaced

MOST_LINES = 100
MOST_LISTED = 200


class NewLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many pieces of an article, at a price in cents each."""

    sku: Annotated[str, Meta(min_length=1, max_length=64)]
    quantity: Annotated[int, Meta(ge=1, le=1_000)]
    unit_cents: Annotated[int, Meta(ge=0, le=10_000_000)]


class NewOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /orders. The total is the server's to compute."""

    customer_id: UUID
    lines: Annotated[tuple[NewLine, ...], Meta(min_length=1, max_length=MOST_LINES)]


class PlacedOrder(msgspec.Struct, frozen=True):
    """The answer to POST /orders: accepted, and on its way."""

    order_id: UUID
    status: Literal["pending"]
    total_cents: int


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
    lines: tuple[NewLine, ...]
    timeline: tuple[Step, ...]


class Listed(msgspec.Struct, frozen=True):
    """An order in a list."""

    order_id: UUID
    status: Literal["pending", "confirmed", "cancelled"]
    total_cents: int
    placed_at: datetime


class OrderList(msgspec.Struct, frozen=True):
    """A page of a customer's orders, newest first; `next` is the `after` of the next page."""

    orders: tuple[Listed, ...]
    next: str | None


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """Where a page ends."""

    placed_at: datetime
    order_id: UUID


_decode_order = msgspec.json.Decoder(NewOrder).decode
_decode_lines = msgspec.json.Decoder(tuple[NewLine, ...]).decode
_decode_cursor = msgspec.json.Decoder(Cursor).decode
_encode = msgspec.json.Encoder().encode


def read_order(body: bytes) -> NewOrder:
    """Raises Problem: 400 for what is no JSON, 422 naming every wrong field."""
    try:
        return _decode_order(body)
    except msgspec.ValidationError as error:
        raise Problem(422, "the order is not valid; see errors", errors=_mistakes(body, error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from None


async def place(order_id: UUID, order: NewOrder, key: tuple[str, str] | None) -> PlacedOrder:
    """Store the order, its idempotency key (key, fingerprint) and its event in one transaction, shared with its neighbours.

    Raises psycopg's UniqueViolation for a key that exists, UnavailableError when the database is away.
    """
    total_cents = sum(line.quantity * line.unit_cents for line in order.lines)
    lines = tuple(Line(sku=line.sku, quantity=line.quantity, unit_cents=line.unit_cents) for line in order.lines)
    event = OrderPlaced(order_id=order_id, customer_id=order.customer_id, total_cents=total_cents, lines=lines)

    def work(tx: Tx) -> None:
        if key is not None:
            tx.defer(_INSERT_KEY, (*key, order_id))
        tx.defer(_INSERT, (order_id, order.customer_id, total_cents, _encode(lines).decode()))
        tx.emit(event)

    await bus.group_commit(work)
    return PlacedOrder(order_id, "pending", total_cents)


async def placed_under(key: str) -> tuple[str, PlacedOrder] | None:
    """The fingerprint and the answer that are stored under an idempotency key."""
    async with bus.transaction() as tx:
        row = await tx.fetch_one(_SELECT_KEY, (key,))
    return None if row is None else (row[0], PlacedOrder(row[1], "pending", row[2]))


async def get(order_id: UUID) -> Order:
    """Raises Problem 404."""
    async with bus.transaction() as tx:
        row = await tx.fetch_one(_SELECT, (order_id,))
    if row is None:
        raise Problem(404, f"there is no order {order_id}")
    customer_id, status, reason, total, lines, placed_at, payment, payment_at, stock, stock_at, finished_at = row
    steps = [Step("placed", "accepted", placed_at)]
    if payment_at is not None:
        steps.append(Step("payment", payment, payment_at))
    if stock_at is not None:
        steps.append(Step("stock", stock, stock_at))
    steps.sort(key=lambda step: step.at)
    if finished_at is not None:
        steps.append(Step("finished", status, finished_at))
    return Order(order_id, customer_id, status, reason, total, _decode_lines(lines), tuple(steps))


async def of_customer(customer_id: UUID, limit: int, after: str | None) -> OrderList:
    """A page by keyset: as fast at the end of a long list as at its beginning. Raises Problem 400 for a foreign `after`."""
    cursor = None if after is None else _read_cursor(after)
    async with bus.transaction() as tx:
        if cursor is None:
            rows = await tx.fetch_all(_LIST, (customer_id, limit + 1))
        else:
            rows = await tx.fetch_all(_LIST_AFTER, (customer_id, cursor.placed_at, cursor.order_id, limit + 1))
    orders = tuple(Listed(*row) for row in rows[:limit])
    more = len(rows) > limit
    return OrderList(orders, _write_cursor(orders[-1]) if more else None)


_INSERT = "insert into orders (order_id, customer_id, total_cents, lines) values (%s, %s, %s, %s)"
_INSERT_KEY = "insert into idempotency_key (key, fingerprint, order_id) values (%s, %s, %s)"
_SELECT_KEY = """\
select fingerprint, order_id, total_cents from idempotency_key join orders using (order_id) where key = %s"""
_SELECT = """\
select customer_id, status, reason, total_cents, lines::text, placed_at, payment, payment_at, stock, stock_at, finished_at
from orders where order_id = %s"""
_LIST = """\
select order_id, status, total_cents, placed_at from orders
where customer_id = %s order by placed_at desc, order_id desc limit %s"""
_LIST_AFTER = """\
select order_id, status, total_cents, placed_at from orders
where customer_id = %s and (placed_at, order_id) < (%s, %s) order by placed_at desc, order_id desc limit %s"""


def _write_cursor(last: Listed) -> str:
    return base64.urlsafe_b64encode(_encode(Cursor(last.placed_at, last.order_id))).decode().rstrip("=")


def _read_cursor(text: str) -> Cursor:
    try:
        return _decode_cursor(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        raise Problem(400, "`after` is not a cursor of this API; take it from `next` of the page before") from None


def _mistakes(body: bytes, first: msgspec.ValidationError) -> list[Mistake]:
    """Every wrong field. msgspec stops at the first, so each field is tried on its own."""
    found: list[Mistake] = []
    document = msgspec.json.decode(body)
    if isinstance(document, dict):
        found += _of_object(document, NewOrder, "")
        lines = document.get("lines")
        if isinstance(lines, list):
            for n, line in enumerate(lines[:MOST_LINES]):
                if isinstance(line, dict):
                    found += _of_object(line, NewLine, f"/lines/{n}")
                else:
                    found.append(Mistake(f"/lines/{n}", f"must be an object, not {type(line).__name__}"))
    if not found:
        found.append(Mistake("", str(first)))
    return found[:100]


def _of_object(document: dict[str, Any], kind: type[msgspec.Struct], place: str) -> list[Mistake]:
    found = []
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in document.keys() - known.keys():
        found.append(Mistake(f"{place}/{_escaped(name)}", f"there is no such field; there are {', '.join(known)}"))
    for name, field in known.items():
        if name not in document:
            found.append(Mistake(f"{place}/{name}", "is missing"))
            continue
        try:
            msgspec.convert(document[name], field.type)
        except msgspec.ValidationError as error:
            detail = str(error)
            if name != "lines" or "$" not in detail:  # mistakes inside lines are named one by one
                found.append(Mistake(f"{place}/{name}", detail))
    return sorted(found, key=lambda mistake: mistake.pointer)


def _escaped(name: str) -> str:
    return name[:80].replace("~", "~0").replace("/", "~1")
