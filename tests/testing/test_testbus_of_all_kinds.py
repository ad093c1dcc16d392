"""Every kind of handler is seen as it is: fused, in batches, in order, under claims, with resources, beside periodics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from orderbus import Batch, Bus, Delivery, Retry, Tx
from orderbus.testing import TestBus
from tests.testing.shop import Authorized, Placed, Shipped

pytestmark = pytest.mark.anyio


class Log(list[str]):
    """What happened, in its order."""


async def place(bus: Bus, count: int) -> None:
    async with bus.transaction() as tx:
        for order_id in range(count):
            tx.emit(Placed(order_id=order_id))


async def test_of_a_fused_unit_that_fails_only_the_one_that_does_is_tried_again() -> None:
    bus = Bus("payments")
    calls: list[int] = []

    @bus.on(Placed, fuse=10, retry=Retry.fixed(60, attempts=2))
    async def charge(order: Placed, delivery: Delivery) -> Authorized:
        if order.order_id == 3:
            calls.append(delivery.attempt)
            if delivery.attempt == 1:
                raise ValueError("no")
        return Authorized(order_id=order.order_id, cents=order.cents)

    async with TestBus(bus) as t:
        await place(bus, 6)
        await t.settled()

        assert calls in ([1, 1, 2], [1, 2])  # together with others, where they arrived together; alone; and again
        t.retried(charge, order_id=3, times=1)
        t.retried(times=1)
        t.handled(charge, times=6)
        t.emitted(Authorized, times=6)


async def test_the_items_of_a_batch_have_outcomes_of_their_own() -> None:
    bus = Bus("payments")

    @bus.on_batch(Placed, most=10, retry=Retry.fixed(60, attempts=3))
    async def charge(orders: Batch[Placed], tx: Tx) -> None:
        for item in orders:
            if item.event.order_id == 1:
                item.park("no-card")
            if item.event.order_id == 2 and item.delivery.attempt == 1:
                item.retry(ValueError("later"))

    async with TestBus(bus) as t:
        await place(bus, 4)
        await t.settled()

        t.parked(charge, reason="no-card", order_id=1, times=1)
        t.retried(charge, order_id=2, times=1)
        t.handled(charge, times=3)


async def test_an_ordered_handler_keeps_its_order_over_retries() -> None:
    bus = Bus("payments")
    seen: list[int] = []

    @bus.on(Placed, ordered=True, retry=Retry.fixed(30, attempts=3))
    async def charge(order: Placed, delivery: Delivery) -> None:
        if order.cents == 1 and delivery.attempt == 1:
            raise ValueError("again")
        seen.append(order.cents)

    async with TestBus(bus) as t:
        async with bus.transaction() as tx:
            for cents in (1, 2, 3):
                tx.emit(Placed(order_id=7, cents=cents))
        await t.settled()

        assert seen == [1, 2, 3]
        t.retried(charge, cents=1, times=1)
        assert 30 <= t.elapsed_s < 31


async def test_resources_middleware_and_periodics_are_the_buses_own() -> None:
    bus = Bus("payments")
    seen = Log()

    @bus.resource
    async def log() -> AsyncIterator[Log]:
        seen.append("opened")
        yield seen
        seen.append("closed")

    @bus.middleware
    async def around(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        seen.append("around")
        await call_next()

    @bus.every(10)
    async def remind() -> Shipped:
        return Shipped(order_id=1)

    @bus.on(Placed, guard="claims")
    async def charge(order: Placed, log: Log) -> None:
        log.append("called")

    async with TestBus(bus) as t:
        await t.publish(Placed(order_id=7))
        await t.settled()
        t.nothing_emitted()  # nobody waits for a periodic
        assert t.cost(charge).statements == 0

    assert seen == ["opened", "around", "called", "closed"]


async def test_what_a_handler_publishes_directly_is_emitted_and_costs() -> None:
    bus = Bus("payments")

    @bus.on(Placed, guard="claims")
    async def charge(order: Placed) -> None:
        await bus.publish(Authorized(order_id=order.order_id, cents=order.cents))

    async with TestBus(bus) as t:
        await t.publish(Placed(order_id=7))
        await t.settled()

        t.emitted(Authorized, order_id=7, times=1)
        t.cost(charge, statements=0, emitted=1)


async def test_writes_that_commit_together_are_seen() -> None:
    bus = Bus("orders")

    async with TestBus(bus) as t:
        await bus.group_commit(lambda tx: tx.emit(Placed(order_id=7)))
        await t.settled()

        t.emitted(Placed, order_id=7, times=1)
