"""The words in which the contract speaks to a broker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import anyio

from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.topology import Binding, Exchange, Queue, Topology
from orderbus.abc import Broker, Subscription
from orderbus.errors import UnavailableError

LIMIT_S = 20.0
"""Nothing here takes this long; it ends a test that would wait for ever."""


def message(queue: str, body: str | bytes = b"", *, exchange: str = "", **more: Any) -> Outgoing:
    """A message, to a queue unless an exchange is given."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"message_id": "m", "type": "t", **more}
    return Outgoing(exchange=exchange, routing_key=queue, body=content, **fields)


async def declare(
    broker: Broker, *queues: Queue, exchanges: Iterable[Exchange] = (), bindings: Iterable[tuple[str, str, str]] = ()
) -> None:
    """`bindings` are (exchange, queue, routing key)."""
    await broker.apply(Topology(tuple(exchanges), queues, tuple(Binding(*binding) for binding in bindings)))


async def send(broker: Broker, queue: str, bodies: Iterable[str]) -> None:
    """Publish to a queue; all must be confirmed."""
    with anyio.fail_after(LIMIT_S):
        receipts = await broker.publish([message(queue, body) for body in bodies])
    assert set(receipts) <= {Receipt.CONFIRMED}


async def take(subscription: Subscription, count: int) -> list[Incoming]:
    """The next `count` deliveries, unsettled: no more may come with them than the prefetch lets through."""
    taken: list[Incoming] = []
    with anyio.fail_after(LIMIT_S):
        while len(taken) < count:
            taken += await subscription.receive()
    return taken


async def consume(subscription: Subscription, count: int) -> list[Incoming]:
    """The next `count` deliveries, each acked as it comes."""
    taken: list[Incoming] = []
    with anyio.fail_after(LIMIT_S):
        while len(taken) < count:
            for delivery in await subscription.receive():
                subscription.settle(delivery, Settlement.ACK)
                taken.append(delivery)
    return taken


async def drain(broker: Broker, queue: str, count: int) -> list[Incoming]:
    """Consume `count` messages of a queue and leave it."""
    async with broker.subscribe(queue, prefetch=100) as subscription:
        taken = await consume(subscription, count)
        await subscription.flush()
    return taken


async def until_unavailable(subscription: Subscription) -> str:
    """Receive until the subscription says that it has ended; its words."""
    with anyio.fail_after(LIMIT_S):
        while True:
            try:
                await subscription.receive()
            except UnavailableError as error:
                return str(error)


def bodies(deliveries: Sequence[Incoming]) -> list[str]:
    return [delivery.body.decode() for delivery in deliveries]
