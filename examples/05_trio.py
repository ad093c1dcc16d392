"""The same under trio: `python examples/05_trio.py`, without any server.

orderbus is anyio code, so a bus lives in a nursery of trio's as it lives in asyncio. The drivers of RabbitMQ, PostgreSQL and Redis know
asyncio only: under trio they run on a thread of their own, to which each batch crosses once. Nothing in a handler changes by that.
"""

from collections.abc import AsyncIterator

import trio

from orderbus import Bus, Event, Retry, Settings


class OrderPlaced(Event, topic="orders.placed", key="number"):
    number: int


class Shelf:
    """What a handler asks for by its type. trio's own channels, nurseries and cancel scopes work in it as anywhere else."""

    def __init__(self, send: trio.MemorySendChannel[str]) -> None:
        self.send = send


bus = Bus("shop", settings=Settings(broker_url="memory://"))
send, receive = trio.open_memory_channel[str](10)
done = trio.Event()


@bus.resource
async def shelf() -> AsyncIterator[Shelf]:
    async with send:  # closed after the drain, so nothing is put there afterwards
        yield Shelf(send)


@bus.on(OrderPlaced, timeout=0.2, retry=Retry.none())
async def pack(order: OrderPlaced, shelf: Shelf) -> None:
    if order.number == 3:
        await trio.sleep_forever()  # cancelled by its timeout; one try is all that its policy grants, so it is parked
    async with trio.open_nursery() as nursery:
        for part in ("box", "label"):
            nursery.start_soon(shelf.send.send, f"order {order.number}: {part}")


@bus.every(0.02)
async def watch() -> None:
    if bus.stats.handled + bus.stats.parked == 3:
        done.set()


async def place_orders() -> None:
    async with bus:
        async with bus.transaction() as tx:
            for number in (1, 2, 3):
                tx.emit(OrderPlaced(number=number))
        await done.wait()


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place_orders)
        lines = [line async for line in receive]  # ends when the shelf is closed
    print("\n".join(sorted(lines)))
    assert bus.receipt is not None
    print(f"parked: {bus.receipt.stats.parked}, a clean stop: {bus.receipt.clean}")


trio.run(main)
