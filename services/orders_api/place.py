"""Placing an order: its row, its key and its event in one transaction, which it shares with those that arrive beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone

import msgspec
from psycopg import errors

from orderbus import Bus, Tx, new_id
from services.orders_api.idempotency import Keys, forget_old, key_of, reused
from services.orders_api.schemas import NewOrder, PlacedOrder
from services.shared.events import OrderPlaced

bus = Bus("orders-api")
bus.every(10.0)(forget_old)

_encode = msgspec.json.Encoder().encode


async def place(bus: Bus, keys: Keys, order: NewOrder, key_headers: Sequence[str]) -> bytes:
    """Place an order once per key; the answer as JSON, which is the same for every repetition.

    Raises Problem for a key that is malformed, in progress or used for another order; UnavailableError when the database
    is away, and then it is unknown whether the order was placed: with a key, the request can be repeated.
    """
    key = key_of(key_headers)
    lines = _encode(order.lines)
    if key is None:
        return await _insert(bus, order, lines, None)
    digest = hashlib.blake2b(order.customer_id.bytes + lines, digest_size=16).hexdigest()

    async def insert_or_find() -> bytes:
        try:
            return await _insert(bus, order, lines, (key, digest))
        except errors.UniqueViolation:
            return await _find(bus, key, digest)

    return await keys.once(key, digest, insert_or_find)


async def _insert(bus: Bus, order: NewOrder, lines: bytes, key: tuple[str, str] | None) -> bytes:
    order_id = new_id()
    total_cents = sum(line.quantity * line.unit_cents for line in order.lines)
    placed_at = datetime.now(timezone.utc)
    row = (order_id, order.customer_id, total_cents, lines.decode(), placed_at)
    event = OrderPlaced(order_id=order_id, customer_id=order.customer_id, total_cents=total_cents, lines=order.lines)

    def write(tx: Tx) -> None:
        if key is None:
            tx.defer(_INSERT, row)
        else:
            tx.defer(_INSERT_WITH_KEY, (*row, *key, order_id))
        tx.emit(event)

    await bus.group_commit(write)
    return _encode(PlacedOrder(order_id, order.customer_id, "pending", total_cents, placed_at))


async def _find(bus: Bus, key: str, digest: str) -> bytes:
    """The answer that was given when the key was first used. Raises Problem where that was for another order."""
    async with bus.transaction() as tx:
        row = await tx.fetch_one(_BY_KEY, (key,))
    if row is None or row[0] != digest:
        raise reused()
    _, order_id, customer_id, total_cents, placed_at = row
    return _encode(PlacedOrder(order_id, customer_id, "pending", total_cents, placed_at.astimezone(timezone.utc)))


_INSERT = "insert into orders (order_id, customer_id, total_cents, lines, placed_at) values (%s, %s, %s, %s, %s)"

# One statement, for each costs the same whatever it does.
_INSERT_WITH_KEY = """\
with placed as (insert into orders (order_id, customer_id, total_cents, lines, placed_at) values (%s, %s, %s, %s, %s))
insert into idempotency_key (key, fingerprint, order_id) values (%s, %s, %s)"""

_BY_KEY = """\
select fingerprint, order_id, customer_id, total_cents, placed_at
from idempotency_key join orders using (order_id) where key = %s"""
