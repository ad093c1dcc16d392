"""How a path is walked until its statements are prepared, and then counted on the wire."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from orderbus import Bus, Delivery, Event, Settings
from orderbus._core.message import Outgoing, Receipt
from orderbus._runtime.relay import Relay, outgoing_of
from orderbus._runtime.stats import Stats
from orderbus._runtime.tx import Encoding
from orderbus.adapters.postgres import PostgresStore
from tests.postgres.conftest import emit, row
from tests.postgres.wire import Wire
from tests.runtime.world import Log, Placed, World

MANY = 50
WARM = 8
"""psycopg prepares a statement of a handler at its sixth run."""


NOTE = "insert into notes (id) values (%s) on conflict do nothing"
NOTES = "insert into notes (id) select * from unnest(%s::integer[]) on conflict do nothing"


def bus_on(world: World, wire: Wire) -> Bus:
    """Transactions over the wire, messages in memory, no relay."""
    return world.bus(database_url=wire.url, relay=False)


@asynccontextmanager
async def opened(bus: Bus, wire: Wire) -> AsyncIterator[Bus]:
    """An open bus that has done its maintenance."""
    async with bus:
        await wire.executed("pg_advisory_unlock")
        yield bus


async def counted(wire: Wire, path: Callable[[], Awaitable[object]]) -> None:
    """Go a path until its statements are prepared, and once more; then only that is on the wire."""
    for _ in range(WARM):
        await path()
    wire.clear()
    await path()


def check(wire: Wire, *, trips: int, statements: int, parsed: int = 0) -> None:
    """A difference shows every trip."""
    assert (len(wire.trips), len(wire.statements), len(wire.parsed)) == (trips, statements, parsed), str(wire)


def reports_to(bus: Bus, done: Log) -> None:
    """A line for each unit of deliveries, once it is committed: how many they were."""

    @bus.middleware
    async def report(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        try:
            await call_next()
        finally:
            done(len(deliveries))


async def deliver(world: World, done: Log, count: int) -> None:
    await hand_over(world, done, messages(world, [Placed(order=str(n), n=n) for n in range(count)]))


async def hand_over(world: World, done: Log, batch: Sequence[Outgoing]) -> None:
    """Publish all at once to a consumer that has nothing else to do; until the unit that they make is done."""
    before = len(done.lines)
    await world.broker.publish(batch)
    await done.reached(before + 1)
    assert done.lines[before:] == [len(batch)]


def messages(world: World, events: Sequence[Event]) -> list[Outgoing]:
    """As the relay would send them."""
    encoding = Encoding(form="json", limit_bytes=1 << 20, clock=world.now, rng=random.Random())
    return [outgoing_of(encoding.row(event)) for event in events]


async def run_relay(world: World, store: PostgresStore, *, pages: int) -> None:
    """A relay that finds so many full pages, and is stopped as soon as all of them are published."""
    await emit(store, [row(n, f"k{n}") for n in range(pages * MANY)])
    relay = Relay(store.outbox, world.broker, Settings(relay_batch=MANY), Stats(), "relay", random.Random(1))
    publish, published = world.broker.publish, 0

    async def publish_and_count(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        nonlocal published
        receipts = await publish(batch)
        published += len(batch)
        if published == pages * MANY:
            relay.stop()
        return receipts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.broker, "publish", publish_and_count)
        await relay.run()


def is_of_a_page(statement: str) -> bool:
    """Not of the lease, and not of what is looked for now and then."""
    return "orderbus.outbox where" in statement
