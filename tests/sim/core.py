"""The project's own core as scenarios of the simulator: small graphs in which each promise is at stake."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from orderbus import Bus, Delivery, Event, Park, Retry, Settings, Tx
from orderbus.testing.sim import World

CONSUMING = Settings(relay=False)


class Placed(Event, topic="orders.placed", key="order"):
    order: int
    n: int = 0


class Paid(Event, topic="orders.paid", key="order"):
    order: int
    n: int = 0


class Cancelled(Event, topic="orders.cancelled", key="order"):
    order: int
    n: int = 0


def once(world: World, table: str, expected: set[tuple[int, ...]] | None = None) -> None:
    """Each row of a table is there once; with `expected`, also that none is missing and none is one too many."""

    def each_row_once() -> None:
        rows = [tuple(row) for row in world.rows(f"insert into {table}")]
        assert len(set(rows)) == len(rows), f"{table} has a row twice: {sorted(rows)}"
        assert expected is None or set(rows) == expected, f"{table} has {sorted(rows)}, not {sorted(expected)}"

    world.invariant(each_row_once)


def placing(world: World, events: list[Event]) -> None:
    """A process that relays, and that commits each of these events in a transaction of its own; each is begun once."""
    left = list(events)

    async def place(bus: Bus) -> None:
        while left:
            event = left.pop(0)
            async with bus.transaction() as tx:
                await tx.execute("insert into placed", (event.order, event.n))  # type: ignore[attr-defined]
                tx.emit(event)

    world.process(Bus("api"), place)
    once(world, "placed")


def effects(world: World) -> None:
    """Effects through the tx, one of them deferred, and follow-ups: from the outbox by the relay to the consumer and on."""
    placing(world, [Placed(order=1), Placed(order=1, n=1)])
    shop = Bus("shop", settings=CONSUMING)

    @shop.on(Placed, concurrency=2, retry=Retry.none())  # it never fails of itself, so nothing may be parked
    async def pay(order: Placed, tx: Tx) -> Paid:
        await tx.execute("insert into payment", (order.order, order.n))
        return Paid(order=order.order, n=order.n)

    @shop.on(Paid, concurrency=2, retry=Retry.none())
    async def ship(order: Paid, tx: Tx) -> None:
        tx.defer("insert into shipment", (order.order, order.n))

    world.process(shop)

    def all_the_way() -> None:
        placed = set(map(tuple, world.rows("insert into placed")))
        for table in ("payment", "shipment"):
            assert set(map(tuple, world.rows(f"insert into {table}"))) == placed, f"{table} does not hold what was placed"

    world.invariant(all_the_way)
    once(world, "payment")
    once(world, "shipment")


def retries(world: World) -> None:
    """Handlers that fail: tried again in the process, tried again by way of the ladder, parked; beside innocents, fused."""
    placing(world, [Placed(order=1), Placed(order=2), Placed(order=3)])
    shop = Bus("shop")

    @shop.on(Placed, concurrency=2, fuse=3, retry=Retry.fixed(1.0, attempts=3))
    async def pay(order: Placed, delivery: Delivery, tx: Tx) -> None:
        await tx.execute("insert into payment", (order.order,))
        if order.order == 2 and delivery.attempt < 3:
            raise ConnectionResetError("by way of the ladder")
        if order.order == 3:
            raise Park("no such card")

    world.process(shop)
    world.expect_parked(lambda letter: letter.reason == "no such card" and letter.body == b'{"order":3,"n":0}')

    def each_ends_as_it_should() -> None:
        placed = {row[0] for row in world.rows("insert into placed")}
        paid = {row[0] for row in world.rows("insert into payment")}
        assert paid == placed - {3}, f"paid are {paid} of {placed}"
        assert bool(world.parked()) == (3 in placed), "order 3 is parked if it was placed"

    world.invariant(each_ends_as_it_should)
    once(world, "payment")


def ordered(world: World) -> None:
    """Two processes of a group with ordered handlers of two topics, one event failing at first, and two relays."""
    placing(
        world,
        [Placed(order=1), Placed(order=2), Cancelled(order=1, n=1), Placed(order=1, n=2)],
    )
    shop = Bus("shop")
    failed: set[tuple[int, int]] = set()

    def fail_once(order: int, n: int) -> None:
        if (order, n) in {(1, 0), (2, 0)} and (order, n) not in failed:
            failed.add((order, n))
            raise ConnectionResetError("at the first try only")

    @shop.on(Placed, ordered=True, concurrency=3, retry=Retry.fixed(0.05, attempts=5))
    async def place(order: Placed, tx: Tx) -> None:
        await tx.execute("insert into seen", (order.order, order.n))
        fail_once(order.order, order.n)

    @shop.on(Cancelled, ordered=True, concurrency=3, retry=Retry.fixed(0.05, attempts=5))
    async def cancel(order: Cancelled, tx: Tx) -> None:
        await tx.execute("insert into seen", (order.order, order.n))
        fail_once(order.order, order.n)

    world.process(shop)
    world.process(shop)

    def in_order() -> None:
        for key in (1, 2):
            placed, seen = (
                [n for order, n in world.rows(f"insert into {table}") if order == key] for table in ("placed", "seen")
            )
            assert seen == placed, f"order {key} was handled in the order {seen}, and placed in the order {placed}"

    world.invariant(in_order)
    once(world, "seen")


def claims(world: World) -> None:
    """Mails that no transaction guards, sent by two processes; the mail server knows a repeated mail by its id."""
    placing(world, [Placed(order=1), Placed(order=2)])
    mail = Bus("mail", settings=CONSUMING)
    sent: set[int] = set()

    @mail.on(Placed, guard="claims", concurrency=2, timeout=2.0, retry=Retry.fixed(0.1, attempts=9))
    async def send(order: Placed, delivery: Delivery) -> None:
        await anyio.sleep(1.5)  # as long as the mail server takes
        if order.order == 2 and delivery.attempt == 1:
            raise ConnectionResetError("at the first try only")
        sent.add(order.order)

    world.process(mail)
    world.process(mail)

    def all_mails_sent() -> None:
        assert sent == {row[0] for row in world.rows("insert into placed")}

    world.invariant(all_mails_sent)


def overrun(world: World) -> None:
    """A mail server that hangs, for longer than any lease, so that another process takes over meanwhile."""
    placing(world, [Placed(order=1)])
    mail = Bus("mail", settings=CONSUMING)
    calls = 0

    @mail.on(Placed, guard="claims", timeout=2.0, retry=Retry.fixed(0.1, attempts=20))
    async def send(order: Placed) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(9.0)
        await anyio.lowlevel.checkpoint()

    world.process(mail)
    world.process(mail)
