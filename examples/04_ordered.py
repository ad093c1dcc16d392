"""Order per key, across topics and retries: `python examples/04_ordered.py`, without any server.

Both handlers share the queue `shop.ordered`. A key's next event waits until the one before is finished, however often that fails;
other keys go on meanwhile.
"""

import anyio

from orderbus import Bus, Delivery, Event, Retry, Settings


class OrderPlaced(Event, topic="orders.placed", key="order"):
    order: str


class OrderCancelled(Event, topic="orders.cancelled", key="order"):
    order: str


PATIENT = Retry.fixed(0.3, attempts=5)
bus = Bus("shop", settings=Settings(broker_url="memory://"))
told: list[str] = []
all_told = anyio.Event()


def tell(what: str) -> None:
    told.append(what)
    if len(told) == 6:
        all_told.set()


@bus.on(OrderPlaced, ordered=True, retry=PATIENT)
async def reserve(event: OrderPlaced, delivery: Delivery) -> None:
    if event.order == "A" and delivery.attempt < 3:
        tell(f"{event.order}: placing fails")
        raise ConnectionResetError("the warehouse hung up")
    tell(f"{event.order}: placed")


@bus.on(OrderCancelled, ordered=True, retry=PATIENT)
async def release(event: OrderCancelled) -> None:
    tell(f"{event.order}: cancelled")


async def main() -> None:
    async with bus:
        for event in (OrderPlaced(order="A"), OrderCancelled(order="A"), OrderPlaced(order="B"), OrderCancelled(order="B")):
            async with bus.transaction() as tx:  # the outbox keeps the order in which a key's transactions committed
                tx.emit(event)
        await all_told.wait()
    print("\n".join(told))


anyio.run(main)
