"""What a handler costs for each message: a query that is added to it fails the test that counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from orderbus import Batch, Bus, Retry, Tx
from orderbus.testing import TestBus
from tests.testing.shop import Authorized, Placed

pytestmark = pytest.mark.anyio


class Shop:
    def __init__(self, *, asks_twice: bool = False, fuse: int = 1) -> None:
        self.bus = bus = Bus("payments")
        self.failures = 0

        @bus.on(Placed, fuse=fuse, retry=Retry.fixed(1, attempts=2))
        async def charge(order: Placed, tx: Tx) -> Authorized:
            limit = await tx.fetch_one("select cents\n  from card\n  where order_id = %s", (order.order_id,))
            if asks_twice:
                await tx.fetch_one("select name from customer where order_id = %s", (order.order_id,))
            assert limit is not None
            if self.failures:
                self.failures -= 1
                raise ConnectionResetError
            for cents in (1, 2):
                tx.defer("insert into booking (order_id, cents) values (%s, %s)", (order.order_id, cents))
            return Authorized(order_id=order.order_id, cents=limit[0])

        self.charge = charge


def rows(sql: str, params: Any) -> Sequence[tuple[Any, ...]]:
    return [(900,)] if sql.startswith("select") else []


async def test_statements_and_events_are_counted_for_each_message() -> None:
    shop = Shop()
    async with TestBus(shop.bus, answer=rows) as t:
        for order_id in range(4):
            await t.publish(Placed(order_id=order_id))
        await t.settled()

        cost = t.cost(shop.charge, statements=2, emitted=1)
        assert cost.messages == 4
        assert cost.queries == {
            "select cents from card where order_id = %s": 1,
            "insert into booking (order_id, cents) values (%s, %s)": 1,
        }
        t.emitted(Authorized, cents=900, times=4)


async def test_a_query_more_a_message_fails_and_is_shown() -> None:
    shop = Shop(asks_twice=True)
    async with TestBus(shop.bus, answer=rows) as t:
        await t.publish(Placed(order_id=1))
        await t.settled()

        with pytest.raises(AssertionError) as failed:
            t.cost(shop.charge, statements=2)

    assert str(failed.value).splitlines() == [
        "charge takes 3 statements a message, not 2",
        "  3 statements and 1 events a message (of 1)",
        "  1× select cents from card where order_id = %s",
        "  1× select name from customer where order_id = %s",
        "  1× insert into booking (order_id, cents) values (%s, %s)",
    ]


async def test_what_was_rolled_back_costs_nothing_here() -> None:
    shop = Shop()
    shop.failures = 1
    async with TestBus(shop.bus, answer=rows) as t:
        await t.publish(Placed(order_id=1))
        await t.settled()

        t.retried(times=1)
        t.cost(shop.charge, statements=2, emitted=1)


async def test_what_a_batch_shares_costs_each_message_a_part_of_it() -> None:
    bus = Bus("payments")

    @bus.on_batch(Placed, most=10)
    async def charge(orders: Batch[Placed], tx: Tx) -> list[Authorized]:
        await tx.execute("insert into payment select unnest(%s::int[])", ([one.order_id for one in orders.events],))
        return [Authorized(order_id=one.order_id, cents=one.cents) for one in orders.events]

    async with TestBus(bus, answer=rows) as t:
        async with bus.transaction() as tx:
            for order_id in range(10):
                tx.emit(Placed(order_id=order_id))
        await t.settled()

        cost = t.cost(charge, emitted=1)
        assert cost.messages == 10
        assert 0.1 <= cost.statements < 1


async def test_a_handler_that_has_handled_nothing_has_no_cost_but_an_error() -> None:
    shop = Shop()
    async with TestBus(shop.bus) as t:
        await t.publish(Placed(order_id=1))
        await t.settled()

        with pytest.raises(AssertionError) as failed:
            t.cost(shop.charge)

    first, second = str(failed.value).splitlines()
    assert first == "charge has handled nothing, so it has no cost"
    assert "UsageError: there is no database for 'select cents from card where order_id = %s'" in second
    assert "TestBus(bus, database_url=…)" in second
