"""What follows a failure: `python examples/03_retry_and_dlq.py`, without any server.

The policy is a value that prints itself. What is used up, or is not worth another try, goes to the dead letters. On RabbitMQ they are
looked after by `orderbus dlq list | show | replay | edit | purge`; a memory broker's end with its process.
"""

import logging
import sys

import anyio

from orderbus import Bus, Delivery, Event, Park, Retry, RetryLater, Settings


class OrderPlaced(Event, topic="orders.placed", key="number"):
    number: int


class CardRefused(Exception):
    """The bank said no: another try would change nothing."""


POLICY = Retry.exponential(first=0.05, limit=0.2, attempts=4).never(CardRefused)
bus = Bus("payments", settings=Settings(broker_url="memory://"))
tries: list[str] = []
done = anyio.Event()


@bus.on(OrderPlaced, retry=POLICY)
async def charge(order: OrderPlaced, delivery: Delivery) -> None:
    tries.append(f"order {order.number}: try {delivery.attempt}")
    match order.number, delivery.attempt:
        case 1, 1:
            raise ConnectionResetError("the gateway hung up")  # the policy: again after 50 ms
        case 2, 1:
            raise RetryLater(0.3)  # the handler knows better: again after 300 ms
        case 3, _:
            raise CardRefused("no money")  # never again: parked at once
        case 4, _:
            raise Park("negative-amount")  # parked at once, with a reason of the handler's own
        case 5, _:
            raise TimeoutError("no answer")  # four tries, then parked


@bus.every(0.02)
async def watch() -> None:
    if bus.stats.handled + bus.stats.parked == 5:
        done.set()


async def main() -> None:
    print(POLICY, end="\n\n")
    async with bus:
        await bus.publish_many([OrderPlaced(number=number) for number in range(1, 6)])
        await done.wait()
    print("\n".join(sorted(tries)), end="\n\n")
    assert bus.receipt is not None
    stats = bus.receipt.stats
    reasons = sorted(stats.queues["payments.orders.placed"].parked)
    print(f"handled: {stats.handled}, tried again: {stats.retried}, parked: {', '.join(reasons)}")


logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
anyio.run(main)
