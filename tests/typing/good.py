"""Uses that must pass `mypy --strict`, and the types that come out of them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, assert_type
from uuid import UUID

from orderbus import (
    Batch,
    Bus,
    Delivery,
    DrainReceipt,
    Event,
    Item,
    Park,
    Retry,
    RetryLater,
    Settings,
    Stats,
    Tx,
    new_id,
    run_until_signalled,
)
from orderbus.testing import Cost, Parked, TestBus, Try


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: UUID
    total_cents: int
    note: str = ""


class PaymentAuthorized(Event, topic="payments.authorized", key="order_id", version=2, unrouted="drop"):
    order_id: UUID


class PaymentDeclined(Event, topic="payments.declined", key="order_id"):
    order_id: UUID
    late: bool = False
    reason: str


class CardRefused(Exception):
    pass


class Mailer:
    async def send(self, text: str) -> None: ...


bus = Bus("payments", settings=Settings(broker_url="memory://", pool_size=4), format="msgpack")


@bus.resource
async def mailer() -> AsyncIterator[Mailer]:
    yield Mailer()


@bus.on(
    OrderPlaced,
    retry=Retry.exponential(first=0.2, limit=60, attempts=8).never(CardRefused).on(KeyError, retry=Retry.none()),
    ordered=True,
    timeout=5,
    concurrency=3,
    prefetch=10,
    guard="inbox",
    fuse=4,
    name="authorize",
)
async def authorize(order: OrderPlaced, tx: Tx, delivery: Delivery, mailer: Mailer) -> PaymentAuthorized | PaymentDeclined:
    assert_type(await tx.execute("update orders set paid = true where id = %s", (order.order_id,)), int)
    assert_type(await tx.fetch_one("select 1"), tuple[Any, ...] | None)
    assert_type(await tx.fetch_all("select 1 where %(a)s", {"a": True}), Sequence[tuple[Any, ...]])
    assert_type(tx.emit(order, due_at=datetime.now(UTC)), UUID)
    assert_type(delivery.id, UUID)
    assert_type(delivery.key, str | None)
    assert_type(delivery.attempt, int)
    tx.defer("insert into log values (%s)", (order.note,))
    if order.total_cents > 1000:
        raise RetryLater(5, counted=False)
    if order.total_cents < 0:
        raise Park("negative")
    return PaymentAuthorized(order_id=order.order_id)


@bus.on(PaymentAuthorized)
async def returns_nothing(event: PaymentAuthorized) -> None: ...


@bus.on(PaymentAuthorized, name="one")
async def returns_one_or_nothing(event: PaymentAuthorized, tx: Tx) -> PaymentDeclined | None:
    return None


@bus.on(PaymentAuthorized, name="list")
async def returns_a_list(event: PaymentAuthorized) -> list[PaymentDeclined]:
    return []


@bus.on(PaymentAuthorized, name="tuple")
async def returns_a_tuple(event: PaymentAuthorized) -> tuple[OrderPlaced, PaymentDeclined]:
    return OrderPlaced(order_id=event.order_id, total_cents=1), PaymentDeclined(order_id=event.order_id, reason="")


@bus.on(PaymentAuthorized, name="sequence")
async def returns_a_sequence(event: PaymentAuthorized) -> Sequence[Event] | None:
    return None


@bus.on_batch(name="both", most=50)
async def both(batch: Batch[PaymentDeclined | PaymentAuthorized], tx: Tx) -> None:
    assert_type(batch.events, Sequence[PaymentDeclined | PaymentAuthorized])


@bus.on_batch(PaymentDeclined, most=50)
async def declined(batch: Batch[PaymentDeclined], tx: Tx) -> None:
    assert_type(batch.events, Sequence[PaymentDeclined])
    assert_type(len(batch), int)
    for item in batch:
        assert_type(item, Item[PaymentDeclined])
        assert_type(item.event.reason, str)
        assert_type(item.delivery, Delivery)
        item.park("no")
        item.retry(5)
        item.retry(ValueError())


@bus.every(60, timeout=5)
async def remind(tx: Tx) -> Sequence[OrderPlaced]:
    return []


@bus.middleware
async def timing(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
    await call_next()


async def program() -> None:
    # The decorated functions are what they were.
    order = OrderPlaced(order_id=new_id(), total_cents=5)
    async with bus as opened:
        assert_type(opened, Bus)
        async with bus.transaction() as tx:
            assert_type(tx, Tx)
            assert_type(
                await authorize(order, tx, Delivery(new_id(), "t", None, 1, {}, 0.0), Mailer()),
                PaymentAuthorized | PaymentDeclined,
            )
            assert_type(await remind(tx), Sequence[OrderPlaced])
        async with bus.enlist(object()) as enlisted:
            assert_type(enlisted, Tx)
        assert_type(await bus.publish(order), UUID)
        assert_type(await bus.group_commit(write), str)
        assert_type(await bus.group_commit(lambda tx: tx.emit(order)), UUID)
        assert_type(bus.stats, Stats)
        assert_type(bus.draining, bool)
        await bus.drain()
    assert_type(bus.receipt, DrainReceipt | None)
    assert_type(await run_until_signalled(bus, bus), list[DrainReceipt])


async def write(tx: Tx) -> str:
    return ""


async def in_a_test() -> None:
    async with TestBus(bus, bus, answer=lambda sql, params: [(1,)]) as t:
        assert_type(await t.publish(OrderPlaced(order_id=new_id(), total_cents=5)), UUID)
        await t.settled(limit_s=5)
        t.fault("message published twice", times=2)
        assert_type(t.emitted(PaymentAuthorized, order_id=new_id()), list[PaymentAuthorized])
        assert_type(t.emitted(times=3), list[Event])
        assert_type(t.handled(OrderPlaced, total_cents=5), list[Try])
        assert_type(t.retried(authorize, times=1), list[Try])
        assert_type(t.parked("payments.orders.placed", reason="undecodable"), list[Parked])
        assert_type(t.cost(authorize, statements=2), Cost)
        assert_type(t.now(), datetime)
