"""The example that introduces the API, completed, on the memory broker and a real PostgreSQL: it works as it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID

import anyio
import psycopg
import pytest

from orderbus import Bus, Event, Retry, Settings, Tx, new_id
from orderbus.adapters.postgres import apply

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: UUID
    customer_id: UUID
    total_cents: int


class PaymentAuthorized(Event, topic="payments.authorized", key="order_id"):
    order_id: UUID


class PaymentDeclined(Event, topic="payments.declined", key="order_id"):
    order_id: UUID


class CardRefused(Exception):
    """No try will change it."""


class GatewayDown(Exception):
    """The next try may."""


class Shop:
    """The example's bus, a second group that listens to its answers, and what they did."""

    def __init__(self, database_url: str) -> None:
        settings = Settings(broker_url="memory://design-example", database_url=database_url)
        self.bus = bus = Bus("payments", settings=settings)
        self.ledger = Bus("ledger", settings=settings)
        self.answers: Counter[tuple[UUID, str]] = Counter()
        self.tries: Counter[UUID] = Counter()
        self.answered = anyio.Event()
        self.expected = 0

        @bus.on(OrderPlaced, retry=Retry.exponential(first=0.2, limit=60, attempts=8).never(CardRefused))
        async def authorize(order: OrderPlaced, tx: Tx) -> PaymentAuthorized | PaymentDeclined:
            self.tries[order.order_id] += 1
            await tx.execute(
                "insert into payments (order_id, cents) values (%s, %s)",
                (order.order_id, order.total_cents),
            )
            if order.total_cents == 13:
                raise CardRefused
            if order.total_cents == 17 and self.tries[order.order_id] == 1:
                raise GatewayDown
            if order.total_cents > 100_000:
                return PaymentDeclined(order_id=order.order_id)
            return PaymentAuthorized(order_id=order.order_id)

        @self.ledger.on(PaymentAuthorized)
        async def authorized(answer: PaymentAuthorized) -> None:
            self._note(answer.order_id, "authorized")

        @self.ledger.on(PaymentDeclined)
        async def declined(answer: PaymentDeclined) -> None:
            self._note(answer.order_id, "declined")

    def _note(self, order_id: UUID, what: str) -> None:
        self.answers[order_id, what] += 1
        if self.answers.total() == self.expected:
            self.answered.set()


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await apply(connection)
        await connection.execute("create table payments (order_id uuid primary key, cents bigint not null)")
    shop = Shop(database_url)
    async with shop.ledger, shop.bus:
        yield shop


async def place(shop: Shop, cents: int) -> UUID:
    order = OrderPlaced(order_id=new_id(), customer_id=new_id(), total_cents=cents)
    async with shop.bus.transaction() as tx:
        tx.emit(order)
    return order.order_id


async def test_the_example_pays_answers_retries_and_parks_as_its_policy_says(shop: Shop, database_url: str) -> None:
    shop.expected = 3
    refused = await place(shop, 13)
    small, large, flaky = [await place(shop, cents) for cents in (500, 200_000, 17)]

    with anyio.fail_after(60):
        await shop.answered.wait()
        await shop.bus.drain()
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        cursor = await connection.execute("select order_id, cents from payments")
        paid: dict[UUID, int] = dict(await cursor.fetchall())

    assert shop.answers == {(small, "authorized"): 1, (large, "declined"): 1, (flaky, "authorized"): 1}
    assert paid == {small: 500, large: 200_000, flaky: 17}
    assert (shop.tries[refused], shop.tries[flaky]) == (1, 2)
    assert shop.bus.stats.parked == 1
