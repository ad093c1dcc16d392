"""Faults by name: each happens, and the effect of the event happens once all the same."""

from __future__ import annotations

from typing import get_args

import pytest

from orderbus import Batch, Bus, Retry, Tx, UnavailableError, UsageError
from orderbus.testing import FaultName, TestBus
from tests.testing.shop import Authorized, Placed

pytestmark = pytest.mark.anyio


class Shop:
    def __init__(self) -> None:
        self.calls = 0
        self.told: list[int] = []
        self.payments, self.notices = Bus("payments"), Bus("notices")

        @self.payments.on(Placed, retry=Retry.none())
        async def charge(order: Placed, tx: Tx) -> Authorized:
            self.calls += 1
            await tx.execute("insert into payment (order_id) values (%s)", (order.order_id,))
            return Authorized(order_id=order.order_id, cents=order.cents)

        @self.notices.on(Authorized, guard="claims", retry=Retry.none())
        async def tell(payment: Authorized) -> None:
            self.told.append(payment.order_id)

        self.charge, self.tell = charge, tell


CALLS = {"database away at the commit": 2, "deadlock at the commit": 2}
"""How often the handler is called for one effect, where that is more than once."""
REPEATED = {
    "connection lost after the commit, before the ack",
    "answer to the commit lost",
    "confirm of a publish lost",
    "message published twice",
}
"""Something arrives a second time after it has been handled."""


@pytest.mark.parametrize("name", get_args(FaultName))
async def test_the_effect_happens_once_whatever_fails(name: FaultName) -> None:
    shop = Shop()
    async with TestBus(shop.payments, shop.notices, answer=lambda sql, params: []) as t:
        t.fault(name)
        await t.publish(Placed(order_id=7))
        await t.settled()

        t.emitted(Authorized, times=1)
        t.handled(shop.charge, times=1)
        t.handled(shop.tell, times=1)
        t.nothing_parked()
        t.cost(shop.charge, statements=1, emitted=1)
        assert shop.told == [7]
        assert shop.calls == CALLS.get(name, 1)
        assert shop.payments.stats.duplicates + shop.notices.stats.duplicates == (name in REPEATED)


async def test_a_fault_happens_as_often_as_it_is_asked_for() -> None:
    shop = Shop()
    async with TestBus(shop.payments, answer=lambda sql, params: []) as t:
        t.fault("database away at the commit", times=3)
        await t.publish(Placed(order_id=7))
        await t.settled()

        assert shop.calls == 4
        t.emitted(Authorized, times=1)


async def test_a_duplicate_in_a_unit_whose_commit_failed_was_not_handled_again() -> None:
    bus = Bus("batches")

    @bus.on_batch(Placed)
    async def count(batch: Batch[Placed]) -> None: ...

    async with TestBus(bus) as t:
        first = await t.publish(Placed(order_id=1))
        await t.settled()
        t.fault("deadlock at the commit")
        await t.redeliver(first)
        await t.publish(Placed(order_id=2))
        await t.settled()

        t.handled(count, times=2)


async def test_a_fault_meets_the_tests_own_transaction_too() -> None:
    shop = Shop()
    async with TestBus(shop.payments) as t:
        t.fault("database away at the commit")
        with pytest.raises(UnavailableError):
            async with shop.payments.transaction() as tx:
                tx.emit(Placed(order_id=7))
        await t.settled()

        t.nothing_emitted()


async def test_a_fault_that_had_no_occasion_fails_the_test() -> None:
    async def fails() -> None:
        async with TestBus(Shop().payments) as t:
            t.fault("confirm of a publish lost")

    with pytest.raises(AssertionError, match="did not happen: 'confirm of a publish lost'; nothing gave it the occasion"):
        await fails()


async def test_a_fault_that_there_is_not_is_refused_with_the_nearest() -> None:
    t = TestBus(Shop().payments)

    with pytest.raises(UsageError, match="did you mean 'deadlock at the commit'"):
        t.fault("deadlock at commit")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there are 'connection lost after the commit, before the ack', "):
        t.fault("?")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least once"):
        t.fault("claims keeper away", times=0)
    with pytest.raises(UsageError, match="happens to the store in memory, not to a real database"):
        TestBus(Shop().payments, database_url="embedded").fault("deadlock at the commit")
