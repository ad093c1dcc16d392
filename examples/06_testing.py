"""Tests of handlers without servers, in virtual time: `pytest examples/06_testing.py`, or `python examples/06_testing.py`."""

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from orderbus import Bus, Event, Park, Retry, Tx
from orderbus.testing import TestBus, virtual_backend


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: int
    cents: int


class PaymentAuthorized(Event, topic="payments.authorized", key="order_id"):
    order_id: int


bus = Bus("payments")  # as it is in your program: its settings come from the environment there, and from TestBus here
gateway: list[Exception] = []


@bus.on(OrderPlaced, retry=Retry.fixed(3600, attempts=4))
async def charge(order: OrderPlaced, tx: Tx) -> PaymentAuthorized:
    if order.cents < 0:
        raise Park("negative-amount")
    if gateway:
        raise gateway.pop()
    await tx.execute("insert into payment (order_id, cents) values (%s, %s)", (order.order_id, order.cents))
    return PaymentAuthorized(order_id=order.order_id)


def no_rows(sql: str, params: Any) -> Sequence[tuple[Any, ...]]:
    return []  # in place of a database; TestBus(bus, database_url="postgresql://…") has a real one, in real time


@pytest.fixture
def anyio_backend(virtual_time: Any) -> Any:  # of the pytest plugin: asyncio and trio, both in virtual time
    return virtual_time


@pytest.mark.anyio
async def test_an_order_is_paid_once_however_often_it_arrives() -> None:
    async with TestBus(bus, answer=no_rows) as t:
        placed = await t.publish(OrderPlaced(order_id=7, cents=500))
        await t.redeliver(placed)
        await t.settled()
        t.emitted(PaymentAuthorized, order_id=7, times=1)
        t.cost(charge, statements=1, emitted=1)  # fails when somebody adds a query for each message


@pytest.mark.anyio
async def test_a_gateway_that_is_down_for_three_hours_loses_no_order() -> None:
    gateway[:] = [ConnectionResetError()] * 3
    async with TestBus(bus, answer=no_rows) as t:
        await t.publish(OrderPlaced(order_id=8, cents=500))
        await t.settled()
        t.retried(charge, times=3)
        t.emitted(PaymentAuthorized, order_id=8)
        print(f"three retries took {t.elapsed_s / 3600:.0f} hours of virtual time")


@pytest.mark.anyio
async def test_a_negative_amount_is_parked_with_its_reason() -> None:
    async with TestBus(bus, answer=no_rows) as t:
        await t.publish(OrderPlaced(order_id=9, cents=-1))
        await t.settled()
        t.parked(OrderPlaced, reason="negative-amount", order_id=9)
        t.nothing_emitted()


if __name__ == "__main__":
    for test in [value for name, value in list(globals().items()) if name.startswith("test_")]:
        backend, options = virtual_backend("asyncio")
        anyio.run(test, backend=backend, backend_options=options)
        print(f"passed: {test.__name__}")
