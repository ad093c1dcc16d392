"""Two handlers and an event from each to the next, without any server: `python examples/01_hello.py`."""

import anyio

from orderbus import Bus, Event, Settings


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: int


class OrderConfirmed(Event, topic="orders.confirmed", key="order_id"):
    order_id: int


bus = Bus("shop", settings=Settings(broker_url="memory://"))
told = anyio.Event()


@bus.on(OrderPlaced)
async def confirm(order: OrderPlaced) -> OrderConfirmed:
    return OrderConfirmed(order_id=order.order_id)  # goes out when this handler's transaction has committed


@bus.on(OrderConfirmed)
async def tell(order: OrderConfirmed) -> None:
    print(f"order {order.order_id} is confirmed")
    told.set()


async def main() -> None:
    async with bus:  # leaving drains: started work is finished, the rest goes back to the broker
        async with bus.transaction() as tx:
            tx.emit(OrderPlaced(order_id=7))
        await told.wait()


anyio.run(main)
