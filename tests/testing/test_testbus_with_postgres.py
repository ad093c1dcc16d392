"""TestBus on the user's own PostgreSQL, in real time, on asyncio and on trio."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import anyio
import psycopg
import pytest

from orderbus import Bus, Event, Retry, Tx
from orderbus.abc import Deferred, InboxEntry, OutboxRow
from orderbus.adapters.postgres import apply
from orderbus.adapters.postgres.transaction import PostgresTransaction
from orderbus.testing import StuckError, TestBus

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


class Placed(Event, topic="shop.placed", key="order_id"):
    order_id: int


class Paid(Event, topic="shop.paid", key="order_id"):
    order_id: int


class Reminded(Event, topic="shop.reminded", key="order_id"):
    order_id: int


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(database_url: str) -> str:
    async def prepare() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await apply(connection)
            await connection.execute("create table payment (order_id int primary key)")

    anyio.run(prepare)
    return database_url


class Shop:
    def __init__(self) -> None:
        self.bus = bus = Bus("payments")
        self.failures = 1

        @bus.on(Placed, retry=Retry.fixed(0.05, attempts=3))
        async def charge(order: Placed, tx: Tx) -> Paid:
            await tx.execute("insert into payment (order_id) values (%s)", (order.order_id,))
            if order.order_id == 2 and self.failures:
                self.failures -= 1
                raise ConnectionResetError("the gateway hung up")
            return Paid(order_id=order.order_id)

        self.charge = charge


async def test_rows_events_and_retries_are_real(url: str) -> None:
    shop = Shop()
    async with TestBus(shop.bus, database_url=url) as t:
        first = await t.publish(Placed(order_id=1))
        await t.publish(Placed(order_id=2))
        await t.settled()
        await t.redeliver(first)
        await t.settled()

        t.emitted(Paid, times=2)
        t.retried(shop.charge, order_id=2, times=1)
        assert t.cost(shop.charge, statements=1, emitted=1).messages == 2

    with psycopg.connect(url) as connection:
        assert connection.execute("select order_id from payment order by 1").fetchall() == [(1,), (2,)]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_event_relayed_before_its_commit_has_returned_is_emitted_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop()
    async with TestBus(shop.bus, database_url=url) as t:
        commit = PostgresTransaction.commit

        async def slow_to_return(
            self: PostgresTransaction,
            deferred: Sequence[Deferred],
            emitted: Sequence[OutboxRow],
            forget: Sequence[InboxEntry] = (),
        ) -> None:
            await commit(self, deferred, emitted, forget)
            while not {str(row.event_id) for row in emitted} <= t._record.messages.keys():
                await t._record.changed.wait()

        monkeypatch.setattr(PostgresTransaction, "commit", slow_to_return)
        await t.publish(Placed(order_id=1))
        await t.settled()

        t.emitted(Paid, times=1)
        assert t.cost(shop.charge, statements=1, emitted=1).messages == 1


async def test_what_is_due_later_than_the_limit_is_named(url: str) -> None:
    shop = Shop()
    async with TestBus(shop.bus, database_url=url) as t:
        async with shop.bus.transaction() as tx:
            tx.emit(Reminded(order_id=1), due_at=t.now() + timedelta(hours=1))
        with pytest.raises(StuckError, match=r"after 0\.3 s of real time.*\n.*shop\.reminded scheduled for 20"):
            await t.settled(limit_s=0.3)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_of_a_transaction_that_somebody_else_owns_only_what_is_committed_is_emitted(url: str) -> None:
    shop = Shop()
    async with TestBus(shop.bus, database_url=url) as t, await psycopg.AsyncConnection.connect(url) as connection:
        for order_id in (1, 3):
            async with shop.bus.enlist(connection) as tx:
                tx.emit(Placed(order_id=order_id))
            await (connection.rollback() if order_id == 1 else connection.commit())
        await t.settled()

        assert t.emitted(Placed, times=1) == [Placed(order_id=3)]
        t.emitted(Paid, order_id=3, times=1)
