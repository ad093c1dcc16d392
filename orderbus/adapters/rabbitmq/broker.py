"""The broker: one connection for publishing, one for the rest, each made when it is needed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import Topology
from orderbus.adapters.rabbitmq.address import Address, parse_addresses
from orderbus.adapters.rabbitmq.connection import CONNECT_S, Connection, connect_to_one
from orderbus.adapters.rabbitmq.publisher import CONFIRM_S, Publisher, SizeLimit
from orderbus.adapters.rabbitmq.subscription import Subscription
from orderbus.adapters.rabbitmq.topology import apply_topology, ready_count
from orderbus.errors import UsageError

MAX_PREFETCH = 65535


@asynccontextmanager
async def open_broker(
    url: str, *, name: str, connect_s: float = CONNECT_S, confirm_s: float = CONFIRM_S
) -> AsyncIterator[RabbitBroker]:
    """Connect to RabbitMQ; asyncio only.

    The URL is `amqp[s]://user:password@host[:port][,host[:port]…][/vhost]`, and `name` is what the broker's listings call the
    connections. Of several hosts, the nodes of one cluster, it begins at a random one; when that is away, the next is tried.
    `connect_s` bounds each connecting, to each host. A publish whose confirm takes longer than `confirm_s` is reported as unknown. Raises
    UsageError for a URL that can't be right, and UnavailableError, with host and port, where no connection can be had.
    """
    addresses = parse_addresses(url)
    first = random.randrange(len(addresses))  # noqa: S311 - spreads the services over the nodes, and guards nothing
    broker = RabbitBroker(_beginning_at(first, addresses), name, connect_s, confirm_s)
    try:
        await broker.open()
        yield broker
    finally:
        await broker.close()


class RabbitBroker:
    """A `Broker` on RabbitMQ 3.10 to 4.x. Made by `open_broker`.

    Publishing has a connection of its own, because an alarm makes the broker stop reading from those that publish: consuming
    and settling go on. A connection that was lost is replaced by the next call that needs one; nothing runs in between.
    """

    def __init__(self, addresses: Sequence[Address], name: str, connect_s: float, confirm_s: float) -> None:
        self._addresses = addresses
        """The one that took the last connection stands first."""
        self._name = name
        self._connect_s = connect_s
        self._confirm_s = confirm_s
        self._epochs = count(1)
        self._plain_queues: set[str] = set()
        """Queues that were declared here without a single active consumer; any other may have one."""
        self._doubtful_queues: set[str] = set()
        """Ordered queues that are consumed one at a time; see `Subscription`."""
        self._consuming: Connection | None = None
        self._consuming_lock = asyncio.Lock()
        self._publishing: Connection | None = None
        self._publisher: Publisher | None = None
        self._size_limit = SizeLimit()
        self._publishing_lock = asyncio.Lock()
        self._is_closed = False

    async def open(self) -> None:
        await self._consuming_connection()

    async def close(self) -> None:
        """Close both connections. Publishes that wait for confirms are reported as unknown."""
        self._is_closed = True
        try:
            if self._publishing is not None:
                await self._publishing.close()
        finally:
            if self._consuming is not None:
                await self._consuming.close()

    async def apply(self, topology: Topology) -> None:
        """Declare everything that is missing. Raises TopologyError, naming each, where something exists with other arguments."""
        await apply_topology(await self._consuming_connection(), topology)
        for queue in topology.queues:
            if queue.single_active_consumer:
                self._plain_queues.discard(queue.name)
            else:
                self._plain_queues.add(queue.name)

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        """Publish all and wait for all confirms; one receipt each, in order. May be called by several tasks at once.

        Waits while the broker is blocked by an alarm. What was sent when the connection went is UNKNOWN, and so is what a
        cancelled call has sent. Raises UnavailableError only where nothing was sent.
        """
        if not batch:
            return []
        publisher = await self._ready_publisher()
        return await publisher.publish(batch)

    @asynccontextmanager
    async def subscribe(self, queue: str, *, prefetch: int) -> AsyncIterator[Subscription]:
        """Consume a queue with at most `prefetch` unsettled deliveries. Leaving gives back what is unsettled.

        Raises UnavailableError, naming the queue, where it does not exist.
        """
        if not 1 <= prefetch <= MAX_PREFETCH:
            raise UsageError(
                f"prefetch={prefetch} for queue {queue!r}: use 1 to {MAX_PREFETCH}; 0 would mean no bound at all", code="OB507"
            )
        connection = await self._consuming_connection()
        keeps_order = queue not in self._plain_queues
        subscription = Subscription(
            connection, queue, prefetch, keeps_order=keeps_order, epochs=self._epochs, doubtful=self._doubtful_queues
        )
        try:
            await subscription.open()
            yield subscription
        finally:
            await subscription.close()

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue. Raises UsageError where there is no such queue."""
        connection = await self._consuming_connection()
        ready = await ready_count(connection, queue)
        if ready is None:
            raise UsageError(
                f"there is no queue {queue!r} at {connection.address.shown}; open the bus that consumes it once, and it is declared",
                code="OB505",
            )
        return ready

    async def _consuming_connection(self) -> Connection:
        async with self._consuming_lock:
            if self._consuming is None or self._consuming.lost is not None:
                if self._consuming is not None:
                    await self._consuming.close()
                self._consuming = await self._connect("consume")
            return self._consuming

    async def _ready_publisher(self) -> Publisher:
        async with self._publishing_lock:
            if self._publisher is None or self._publisher.failure is not None:
                self._publisher = None
                if self._publishing is not None:
                    await self._publishing.close()
                self._publishing = await self._connect("publish")
                self._publisher = await self._open_publisher(self._publishing)
            elif self._publisher.wants_renewal:
                assert self._publishing is not None
                refused, self._publisher = self._publisher, None
                await refused.close()
                self._publisher = await self._open_publisher(self._publishing)
            return self._publisher

    async def _open_publisher(self, connection: Connection) -> Publisher:
        publisher = Publisher(connection, self._confirm_s, self._size_limit)
        await publisher.open()
        return publisher

    async def _connect(self, purpose: str) -> Connection:
        if self._is_closed:
            raise UsageError("the broker is closed: use it inside its `async with`", code="OB412")
        connection = await connect_to_one(self._addresses, f"{self._name} ({purpose})", self._connect_s)
        self._addresses = _beginning_at(self._addresses.index(connection.address), self._addresses)
        return connection


def _beginning_at(first: int, addresses: Sequence[Address]) -> Sequence[Address]:
    return (*addresses[first:], *addresses[:first])
