"""Orders API, as an RSGI application for granian: POST /orders, GET /orders/{id}, GET /ready.

An order and its event are one statement, and so one transaction in one round trip. Under an Idempotency-Key, the key's row is
first, in a transaction with them: who comes second waits for the row, and gets the first one's answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import msgspec
from msgspec import Meta
from psycopg_pool import PoolTimeout

from bench.by_hand_shop.database import OUTBOX, Connection, new_pool
from bench.by_hand_shop.events import Line, OrderPlaced, encode

CONNECTIONS = 16
JSON = [("content-type", "application/json")]
log = logging.getLogger("shop")


class NewLine(Line, frozen=True, forbid_unknown_fields=True):
    sku: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
    quantity: Annotated[int, Meta(ge=1, le=1_000)]
    unit_cents: Annotated[int, Meta(ge=0, le=10_000_000)]


class NewOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    customer_id: UUID
    lines: Annotated[tuple[NewLine, ...], Meta(min_length=1, max_length=100)]


class Placed(msgspec.Struct, frozen=True):
    order_id: UUID
    status: str
    total_cents: int
    placed_at: datetime


class Refused(Exception):
    """Becomes the response: a status, and why."""


decode = msgspec.json.Decoder(NewOrder).decode


class App:
    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = new_pool(CONNECTIONS)
        loop.run_until_complete(self.pool.open(wait=True))

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_until_complete(self.pool.close())

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        try:
            status, answer = await self._route(scope, protocol)
        except Refused as refusal:
            status, answer = refusal.args[0], {"detail": refusal.args[1]}
        except PoolTimeout:
            status, answer = 503, {"detail": "the database can't take the request now; try again"}
        except Exception:
            log.exception("%s %s", scope.method, scope.path)
            status, answer = 500, {"detail": "something went wrong on our side"}
        protocol.response_bytes(status, JSON, encode(answer))

    async def _route(self, scope: Any, protocol: Any) -> tuple[int, Any]:
        if scope.method == "POST" and scope.path == "/orders":
            return 201, await self._place(scope.headers.get("idempotency-key"), await protocol())
        if scope.method == "GET" and scope.path.startswith("/orders/"):
            return 200, await self._get(scope.path.removeprefix("/orders/"))
        if scope.method == "GET" and scope.path == "/ready":
            async with self.pool.connection() as connection:
                await connection.execute("select 1")
            return 200, {"status": "ready"}
        raise Refused(404, "there is nothing here")

    async def _place(self, key: str | None, body: bytes) -> Placed:
        try:
            order = decode(body)
        except msgspec.ValidationError as error:
            raise Refused(422, str(error)) from None
        except msgspec.DecodeError as error:
            raise Refused(400, str(error)) from None
        total_cents = sum(line.quantity * line.unit_cents for line in order.lines)
        placed = Placed(uuid4(), "pending", total_cents, datetime.now(UTC))
        async with self.pool.connection() as connection:
            if key is None:
                await _insert(connection, placed, order)
                return placed
            async with connection.transaction():
                fingerprint = hashlib.blake2b(body, digest_size=16).hexdigest()
                if (await connection.execute(_KEY, (key, fingerprint, placed.order_id))).rowcount:
                    await _insert(connection, placed, order)
                    return placed
                row = await (await connection.execute(_UNDER_KEY, (key,))).fetchone()
                if row is None or row[0] != fingerprint:
                    raise Refused(422, "this Idempotency-Key was used before with another body")
                return Placed(row[1], "pending", row[2], row[3].astimezone(UTC))

    async def _get(self, text: str) -> dict[str, Any]:
        try:
            order_id = UUID(text)
        except ValueError:
            raise Refused(422, "the order's id is not a UUID") from None
        async with self.pool.connection() as connection:
            cursor = await connection.execute(_GET, (order_id,))
            row = await cursor.fetchone()
            if row is None or cursor.description is None:
                raise Refused(404, f"there is no order {order_id}")
            return {column.name: value for column, value in zip(cursor.description, row, strict=True)}


async def _insert(connection: Connection, placed: Placed, order: NewOrder) -> None:
    event = OrderPlaced(
        order_id=placed.order_id, customer_id=order.customer_id, total_cents=placed.total_cents, lines=order.lines
    )
    lines = encode(order.lines).decode()
    row = (placed.order_id, order.customer_id, placed.total_cents, lines, placed.placed_at)
    await connection.execute(_INSERT, (*row, event.event_id, event.topic, encode(event)))


_INSERT = f"""\
with placed as (insert into orders (order_id, customer_id, total_cents, lines, placed_at) values (%s, %s, %s, %s, %s))
{OUTBOX} values (%s, %s, %s)"""

_KEY = "insert into idempotency_key (key, fingerprint, order_id) values (%s, %s, %s) on conflict do nothing"

_UNDER_KEY = """\
select fingerprint, order_id, total_cents, placed_at from idempotency_key join orders using (order_id) where key = %s"""

_GET = """\
select order_id, customer_id, status, reason, total_cents, lines, placed_at, payment, payment_at, stock, stock_at, finished_at
from orders where order_id = %s"""


app = App()
