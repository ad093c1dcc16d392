"""What each path costs on the wire, in round trips and statements, once its statements are prepared.

A round trip costs a message far more than a row does, so a change that adds one to a path fails here, and shows every trip.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from redis.asyncio import Redis

from orderbus import Batch, Bus, Delivery, Event, Park, Tx, new_id
from orderbus._core.delivery import Item
from orderbus.adapters.postgres import PostgresStore, open_store
from services import aggregator, inventory, payment
from services.orders_api import orders
from services.orders_api.orders import NewLine, NewOrder, PlacedOrder
from services.shared import database
from services.shared.events import OrderCancelled, OrderPlaced, PaymentAuthorized, StockReserved
from tests.postgres.conftest import ALL
from tests.postgres.counting import (
    MANY,
    NOTE,
    NOTES,
    bus_on,
    check,
    counted,
    deliver,
    hand_over,
    is_of_a_page,
    messages,
    opened,
    reports_to,
    run_relay,
)
from tests.postgres.wire import Wire, open_postgres_wire, open_redis_wire
from tests.runtime.relaying import listen
from tests.runtime.world import Log, Paid, Placed, World, open_world

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


@pytest.fixture
def url(database_url: str) -> str:
    """On one server: what is sent to it does not hang on which it is."""
    return database_url


@pytest.fixture
async def wire(url: str, store: PostgresStore) -> AsyncIterator[Wire]:
    """The way to a database that has the schema, and a table `notes`; on it is only what the test sends."""
    await store.maintain(7 * 86_400)
    async with open_postgres_wire(url) as wire:
        yield wire


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as world:
        yield world


@pytest.fixture
async def tapped(wire: Wire) -> AsyncIterator[PostgresStore]:
    async with open_store(wire.url, name="tapped") as store:
        yield store


# Transactions of a program


async def test_a_transaction_with_an_event(world: World, wire: Wire) -> None:
    async def emit_one() -> None:
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a"))

    async with opened(bus_on(world, wire), wire) as bus:
        await counted(wire, emit_one)

    check(wire, trips=2, statements=3)


async def test_a_statement_that_a_program_waits_for_takes_one_more(world: World, wire: Wire) -> None:
    async def execute_two() -> None:
        async with bus.transaction() as tx:
            await tx.execute("insert into notes (id) values (%s) on conflict do nothing", (1,))
            await tx.fetch_one("select text from notes where id = %s", (1,))
            tx.emit(Placed(order="a"))

    async with opened(bus_on(world, wire), wire) as bus:
        await counted(wire, execute_two)

    check(wire, trips=4, statements=5)


async def test_deferred_statements_go_out_with_the_commit(world: World, wire: Wire) -> None:
    async def defer_many() -> None:
        async with bus.transaction() as tx:
            for n in range(MANY):
                tx.defer(NOTE, (n,))

    async with opened(bus_on(world, wire), wire) as bus:
        await counted(wire, defer_many)

    check(wire, trips=2, statements=1 + MANY + 1)


async def test_deferred_rows_are_one_statement(world: World, wire: Wire) -> None:
    async def defer_many() -> None:
        async with bus.transaction() as tx:
            for n in range(MANY):
                tx.defer_row(NOTES, (n,))

    async with opened(bus_on(world, wire), wire) as bus:
        await counted(wire, defer_many)

    check(wire, trips=2, statements=1 + 1 + 1)


async def test_works_that_arrive_together_share_their_round_trips(world: World, wire: Wire) -> None:
    def work(n: int) -> Callable[[Tx], None]:
        def write(tx: Tx) -> None:
            tx.defer(NOTE, (n,))
            tx.emit(Placed(order=str(n)))

        return write

    async def submit_many() -> None:
        await asyncio.gather(*(bus.group_commit(work(n)) for n in range(MANY)))

    async with opened(bus_on(world, wire), wire) as bus:
        await counted(wire, submit_many)

    check(wire, trips=2, statements=1 + MANY + 2)


async def test_events_of_a_transaction_that_is_the_callers_own(world: World, wire: Wire) -> None:
    async def emit_one() -> None:
        async with bus.enlist(connection) as tx:
            tx.emit(Placed(order="a"))

    async with opened(bus_on(world, wire), wire) as bus:
        async with await psycopg.AsyncConnection.connect(wire.url) as connection:
            await counted(wire, emit_one)
            check(wire, trips=1, statements=1)


# Handlers


async def test_a_message_alone(world: World, wire: Wire) -> None:
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on(Placed, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> Paid:
        tx.defer(NOTE, (event.n,))
        return Paid(order=event.order)

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, 1))

    check(wire, trips=2, statements=2 + 1 + 2)


async def test_fused_messages_share_their_round_trips(world: World, wire: Wire) -> None:
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on(Placed, concurrency=1, fuse=MANY)
    async def handle(event: Placed, tx: Tx) -> Paid:
        tx.defer(NOTE, (event.n,))
        return Paid(order=event.order)

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, MANY))

    check(wire, trips=2, statements=2 + MANY + 2)


async def test_fused_messages_that_wait_for_a_statement_take_one_more_each(world: World, wire: Wire) -> None:
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on(Placed, concurrency=1, fuse=MANY)
    async def handle(event: Placed, tx: Tx) -> Paid:
        await tx.execute(NOTE, (event.n,))
        return Paid(order=event.order)

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, MANY))

    check(wire, trips=2 + MANY, statements=2 + MANY + 2)


async def test_a_batch_with_a_statement_that_its_handler_waits_for(world: World, wire: Wire) -> None:
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on_batch(Placed, most=MANY)
    async def handle(batch: Batch[Placed], tx: Tx) -> list[Paid]:
        await tx.execute(NOTES, ([event.n for event in batch.events],))
        return [Paid(order=event.order) for event in batch.events]

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, MANY))

    check(wire, trips=3, statements=2 + 1 + 2)


async def test_messages_that_are_put_off_are_forgotten_with_the_commit(world: World, wire: Wire) -> None:
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on_batch(Placed, most=MANY)
    async def handle(batch: Batch[Placed], tx: Tx) -> None:
        for item in batch:
            item.park("not now")

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, MANY))

    check(wire, trips=2, statements=2 + 1 + 1, parsed=1)


async def test_messages_that_were_handled_before(world: World, wire: Wire) -> None:
    """They are looked up by a plan of the hour, and rolled back."""
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)
    again = messages(world, [Placed(order=str(n), n=n) for n in range(MANY)])

    @bus.on(Placed, concurrency=1, fuse=MANY)
    async def handle(event: Placed, tx: Tx) -> None:
        tx.defer(NOTE, (event.n,))

    async with opened(bus, wire):
        await counted(wire, lambda: hand_over(world, done, again))

    check(wire, trips=3, statements=2 + 1 + 1, parsed=1)


async def test_a_message_that_fails(world: World, wire: Wire) -> None:
    """The rollback does not go through psycopg, which would give all prepared statements up with it."""
    bus, done = bus_on(world, wire), Log()
    reports_to(bus, done)

    @bus.on(Placed, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        raise Park("not this one")

    async with opened(bus, wire):
        await counted(wire, lambda: deliver(world, done, 1))

    check(wire, trips=2, statements=2 + 1)


# The relay


async def test_a_page_of_the_relay_is_read_and_deleted(world: World, wire: Wire, tapped: PostgresStore) -> None:
    pages = 10
    await listen(world)
    await run_relay(world, tapped, pages=2)
    wire.clear()

    await run_relay(world, tapped, pages=pages)

    wire.trips[:] = [trip for trip in wire.trips if any(map(is_of_a_page, trip.statements))]
    deletes = pages - 1  # the last two pages go together
    check(wire, trips=pages + deletes, statements=pages + deletes)


async def test_a_lease_is_renewed(wire: Wire, tapped: PostgresStore) -> None:
    await counted(wire, lambda: tapped.outbox.lease("relay", 30, None))

    check(wire, trips=2, statements=5 + 3)


async def test_what_is_due_is_found_at_once(wire: Wire, tapped: PostgresStore) -> None:
    await counted(wire, lambda: tapped.outbox.due(ALL, MANY, 1 << 30))

    check(wire, trips=1, statements=2)


# Claims


async def test_claimed_messages_share_their_commands(world: World, redis_url: str) -> None:
    prefix = f"orderbus-test:{secrets.token_hex(6)}:"
    async with open_redis_wire(redis_url) as wire:
        bus, done = world.bus(redis_url=wire.url, redis_prefix=prefix), Log()
        reports_to(bus, done)

        @bus.on(Placed, concurrency=1, fuse=MANY, guard="claims")
        async def handle(event: Placed) -> None: ...

        async with bus:
            await counted(wire, lambda: deliver(world, done, MANY))

    assert wire.statements == ["EVALSHA", "EVALSHA"], str(wire)
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(*[key async for key in redis.scan_iter(f"{prefix}*", count=1_000)])


# The services


@pytest.fixture
async def shop(url: str, wire: Wire, world: World, monkeypatch: pytest.MonkeyPatch) -> Bus:
    """A bus, not yet open, on a database with the services' tables; the functions of the Orders API use it."""
    await database.prepare(url, database.Stock(articles=5))
    bus = bus_on(world, wire)
    monkeypatch.setattr(orders, "bus", bus)
    return bus


async def place_many() -> list[PlacedOrder]:
    """As many requests at once, each with an Idempotency-Key."""
    keys = [(secrets.token_hex(8), "fingerprint") for _ in range(MANY)]
    return await asyncio.gather(*(orders.place(new_id(), NEW_ORDER, key) for key in keys))


async def test_orders_that_are_placed_together_share_their_round_trips(shop: Bus, wire: Wire) -> None:
    async with opened(shop, wire):
        await counted(wire, place_many)

    check(wire, trips=2, statements=1 + 1 + 2)


async def test_an_order_is_looked_up(shop: Bus, wire: Wire) -> None:
    async with opened(shop, wire):
        order_id = (await place_many())[0].order_id
        await counted(wire, lambda: orders.get(order_id))

    check(wire, trips=3, statements=3)


Handler = Callable[..., Awaitable[Any]]
HANDLERS: dict[str, tuple[Handler, type[Event], int, int]] = {
    "payment authorizes": (payment.authorize, OrderPlaced, 1, 1),
    "payment refunds": (payment.refund, OrderCancelled, 1, 0),
    "inventory reserves": (inventory.reserve, OrderPlaced, 3, 1),
    "inventory releases": (inventory.release, OrderCancelled, 3, 0),
    "aggregator, the first answer": (aggregator.answered, PaymentAuthorized, 2, 0),
    "aggregator, the last answer": (aggregator.answered, StockReserved, 2, 1),
}
"""The handler, what it handles, how many statements it waits for, and whether it emits."""


@pytest.mark.parametrize(("handler", "kind", "statements", "emits"), HANDLERS.values(), ids=HANDLERS.keys())
async def test_a_batch_of_a_service(
    shop: Bus, wire: Wire, world: World, handler: Handler, kind: type[Event], statements: int, emits: int
) -> None:
    """New orders each time, with which the other services have done what comes before."""
    done = Log()
    reports_to(shop, done)
    shop.resource(payment.rules)
    register = shop.on_batch(name="answers", most=MANY) if handler is aggregator.answered else shop.on_batch(kind, most=MANY)
    register(handler)

    async def handle_many() -> None:
        placed = await place_many()
        async with shop.transaction() as tx:
            if handler is inventory.release:
                await inventory.reserve(batch_of(OrderPlaced, placed), tx)
            elif kind is StockReserved:
                await aggregator.answered(batch_of(PaymentAuthorized, placed), tx)
        wire.clear()
        await hand_over(world, done, messages(world, [event_of(kind, order) for order in placed]))

    async with opened(shop, wire):
        await counted(wire, handle_many)

    check(wire, trips=2 + statements, statements=2 + statements + emits + 1)


def batch_of(kind: type[Event], placed: Sequence[PlacedOrder]) -> Batch[Any]:
    delivery = Delivery(id=new_id(), topic="", key=None, attempt=1, headers={}, deadline=0.0)
    return Batch([Item(event_of(kind, order), delivery) for order in placed])


def event_of(kind: type[Event], order: PlacedOrder) -> Event:
    """The event of this class about an order."""
    known = {
        "order_id": order.order_id,
        "customer_id": NEW_ORDER.customer_id,
        "total_cents": order.total_cents,
        "amount_cents": order.total_cents,
        "lines": NEW_ORDER.lines,
        "reason": "deadline",
    }
    return kind(**{field: known[field] for field in kind.__struct_fields__})


NEW_ORDER = NewOrder(customer_id=UUID(int=1), lines=(NewLine(sku=database.sku(1), quantity=1, unit_cents=1_000),))
