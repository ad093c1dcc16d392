"""Uses that `mypy --strict` must refuse; each line says with which of its error codes."""

# ruff: noqa: B018, F841

from collections.abc import AsyncIterator
from uuid import UUID

from orderbus import Batch, Bus, Event, Item, Retry, RetryLater, Settings, Tx
from orderbus.testing import TestBus


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: UUID
    total_cents: int


class Paid(Event, topic="payments.paid"):
    order_id: UUID


bus = Bus("payments")
order = OrderPlaced(order_id=UUID(int=1), total_cents=5)

order.total_cents = 6  # E: misc
OrderPlaced(UUID(int=1), 5)  # E: call-arg
OrderPlaced(order_id=UUID(int=1))  # E: call-arg
OrderPlaced(order_id=1, total_cents=5)  # E: arg-type
OrderPlaced(order_id=UUID(int=1), total_cents=5, more=1)  # E: call-arg


@bus.on(OrderPlaced)  # E: arg-type
async def another_event(event: Paid) -> None: ...


@bus.on(OrderPlaced)  # E: arg-type
async def no_event() -> None: ...


@bus.on(OrderPlaced)  # E: arg-type
def not_async(event: OrderPlaced) -> None: ...


@bus.on(OrderPlaced)  # E: type-var
async def returns_a_number(event: OrderPlaced) -> int:
    return 5


@bus.on(OrderPlaced)  # E: type-var
async def returns_texts(event: OrderPlaced) -> list[str]:
    return []


@bus.on(int)  # E: type-var
async def of_no_event(event: int) -> None: ...


@bus.on(OrderPlaced, guard="redis")  # E: arg-type
async def unknown_guard(event: OrderPlaced) -> None: ...


@bus.on(OrderPlaced, retry=5)  # E: arg-type
async def no_policy(event: OrderPlaced) -> None: ...


@bus.on(OrderPlaced, retries=5)  # E: call-arg
async def unknown_option(event: OrderPlaced) -> None: ...


@bus.on_batch(OrderPlaced)  # E: arg-type
async def single_instead_of_batch(event: OrderPlaced) -> None: ...


@bus.on_batch(OrderPlaced)  # E: arg-type
async def batch_of_others(batch: Batch[Paid]) -> None: ...


@bus.every("1 s")  # E: arg-type
async def no_number() -> None: ...


@bus.resource  # E: arg-type
async def not_a_generator() -> int:
    return 5


@bus.resource  # E: arg-type
async def with_parameters(url: str) -> AsyncIterator[int]:
    yield 5


@bus.middleware  # E: arg-type
async def wrong_middleware(deliveries: int) -> None: ...


async def program(tx: Tx, item: Item[OrderPlaced]) -> None:
    tx.emit("orders.placed")  # E: arg-type
    tx.emit(order, due_at=5)  # E: arg-type
    tx.execute("select 1")  # E: unused-coroutine
    tx.commit()  # E: attr-defined
    (await tx.fetch_one("select 1"))[0]  # E: index
    item.retry("later")  # E: arg-type
    item.event.nothing  # E: attr-defined
    await bus.publish(Paid)  # E: arg-type
    number: int = await bus.group_commit(write)  # E: arg-type
    Bus("payments", format="xml")  # E: arg-type
    Settings(broker_url=5)  # E: arg-type
    Settings("memory://")  # E: call-arg
    Retry.fixed("1", attempts=2)  # E: arg-type
    Retry.none().never(ValueError())  # E: arg-type
    RetryLater("1")  # E: arg-type


async def write(tx: Tx) -> str:
    return ""


async def in_a_test(t: TestBus) -> None:
    TestBus("payments")  # E: arg-type
    await t.publish(Retry.none())  # E: arg-type
    t.emitted(int)  # E: type-var
    t.emitted(order_id=7)  # E: call-overload
    t.fault("something else")  # E: arg-type
