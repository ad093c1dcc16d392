"""What the tests of the services do to them: place orders, say things, look at the database, and wait for a condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import psycopg

from orderbus import Bus, Event, Stats
from orderbus.adapters.memory import MemoryBroker
from services import outbox_dispatcher
from services.shared.database import sku
from services.shared.events import (
    Line,
    OrderCancelled,
    OrderConfirmed,
    OrderPlaced,
    PaymentAuthorized,
    PaymentDeclined,
    StockRejected,
    StockReserved,
)

LIMIT_S = 30.0
CUSTOMER = UUID(int=1)
EVENTS = (OrderPlaced, PaymentAuthorized, PaymentDeclined, StockReserved, StockRejected, OrderConfirmed, OrderCancelled)


class Shop:
    """Opened by the fixtures of conftest.py."""

    broker: MemoryBroker

    def __init__(self, bus: Bus, connection: psycopg.AsyncConnection[Any], heard: list[Event]) -> None:
        self._bus = bus
        self._connection = connection
        self.heard = heard
        """Every event that was published; those of one class in their order."""

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str) -> AsyncIterator[Shop]:
        heard: list[Event] = []
        bus = _listener(heard)
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            async with outbox_dispatcher.bus, bus:
                yield cls(bus, connection, heard)

    @asynccontextmanager
    async def running(self, *buses: Bus) -> AsyncIterator[None]:
        """The services of these buses run inside the block."""
        async with AsyncExitStack() as stack:
            for bus in buses:
                await stack.enter_async_context(bus)
            yield

    async def declare(self, bus: Bus) -> None:
        """Create a service's queues by starting and stopping it: what is published from now on waits for it."""
        async with self.running(bus):
            pass

    async def place(self, *orders: OrderPlaced) -> None:
        """As the Orders API does it: the order's row and its event in one transaction."""
        async with self._bus.transaction() as tx:
            for order in orders:
                tx.defer(_PLACE, (order.order_id, order.customer_id, order.total_cents))
                tx.emit(order)

    async def place_silently(self, *orders: OrderPlaced) -> None:
        """The row alone, for tests that speak for the other services."""
        async with self._bus.transaction() as tx:
            for order in orders:
                tx.defer(_PLACE, (order.order_id, order.customer_id, order.total_cents))

    async def say(self, *events: Event) -> None:
        """Emit events in one transaction."""
        async with self._bus.transaction() as tx:
            for event in events:
                tx.emit(event)

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        return await (await self._connection.execute(query)).fetchall()

    async def change(self, statement: str) -> None:
        await self._connection.execute(statement)

    async def until_rows(self, query: str, expected: Sequence[tuple[Any, ...]]) -> None:
        """Wait until a query gives exactly these rows."""

        async def look() -> tuple[bool, object]:
            rows = await self.rows(query)
            return rows == list(expected), rows

        await until(look)

    async def until_heard(self, kind: type[Event], count: int) -> None:
        """Wait until so many events of a class were published."""

        async def look() -> tuple[bool, object]:
            return self.count(kind) >= count, Counter(type(event).__name__ for event in self.heard)

        await until(look)

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.heard)

    def ends(self, order_id: UUID) -> list[Event]:
        """What was published of the end of one order. Of different classes, any may be heard before the other."""
        return [
            event for event in self.heard if isinstance(event, (OrderConfirmed, OrderCancelled)) and event.order_id == order_id
        ]


async def until_handled(bus: Bus, count: int) -> None:
    """Wait until an open bus has handled so many messages."""
    await until_stats(bus, lambda stats: stats.handled >= count)


async def until_stats(bus: Bus, met: Callable[[Stats], bool]) -> None:
    """Wait until an open bus has done this."""

    async def look() -> tuple[bool, object]:
        return met(bus.stats), bus.stats

    await until(look)


async def until(look: Callable[[], Awaitable[tuple[bool, object]]]) -> None:
    """Wait until `look` says true, for at most 30 s; what it saw last is in the error. The one place that looks again and again."""
    seen: object = None
    with anyio.move_on_after(LIMIT_S):
        while True:
            met, seen = await look()
            if met:
                return
            await anyio.sleep(0.01)
    raise TimeoutError(f"still not so after {LIMIT_S:g} s; last seen: {seen}")


def order(number: int, *, cents: int = 1_000, quantity: int = 1, article: int = 1, customer: UUID = CUSTOMER) -> OrderPlaced:
    """An order of one line. The same number is the same order."""
    line = Line(sku=sku(article), quantity=quantity, unit_cents=cents // max(quantity, 1))
    return OrderPlaced(order_id=UUID(int=number), customer_id=customer, total_cents=cents, lines=(line,))


def _listener(heard: list[Event]) -> Bus:
    """Binds every topic, as the whole shop would, and remembers what it gets."""
    bus = Bus("listener")
    for kind in EVENTS:

        def register(kind: type[Event]) -> None:
            async def listen(event: Event) -> None:
                heard.append(event)

            listen.__annotations__["event"] = kind
            bus.on(kind, guard="none", concurrency=1)(listen)

        register(kind)
    return bus


_PLACE = "insert into orders (order_id, customer_id, total_cents, lines) values (%s, %s, %s, '[]')"
