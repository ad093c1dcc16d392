"""What the tests of the relay share: an outbox that is filled without a bus, a relay that dies, a queue that keeps all it hears."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from orderbus import Event, Settings, Tx
from orderbus._core.topology import QueueNeed, topology_for
from orderbus._runtime.relay import Relay
from orderbus._runtime.stats import Stats
from orderbus._runtime.tx import Encoding
from tests.runtime.world import World

QUEUE = "audit.all"


async def listen(world: World, *topics: str) -> None:
    """A queue that gets all events of these topics, and keeps them."""
    await world.broker.apply(topology_for([QueueNeed(QUEUE, topics or ("orders.placed", "orders.cancelled", "orders.paid"))]))


def heard(world: World) -> list[tuple[str | None, bytes]]:
    return [(message.properties.headers.get("ob-key"), message.body) for message in world.broker.messages(QUEUE)]


def numbers(world: World, key: str) -> list[int]:
    return [int(body.split(b'"n":')[1].rstrip(b"}")) for k, body in heard(world) if k == key]


async def emit(world: World, *events: Event) -> None:
    """Commit events in one transaction, without any bus."""
    encoding = Encoding(form="json", limit_bytes=1 << 20, clock=world.now, rng=random.Random(1))
    tx = Tx(await world.store.begin(), encoding)
    for event in events:
        tx.emit(event)
    await tx._commit()


@asynccontextmanager
async def relay(world: World, owner: str = "one", **settings: object) -> AsyncIterator[Relay]:
    """A relay that dies at the end of the block, without giving back what it holds."""
    made = Relay(world.store.outbox, world.broker, Settings(**settings), Stats(), owner, random.Random(1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        yield made
        tasks.cancel_scope.cancel()
