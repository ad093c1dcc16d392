"""A message broker inside the process, with the semantics of RabbitMQ's quorum queues, on asyncio and trio alike.

It runs no task and keeps no thread: each call does its work at once, and the consumers that wait are the clock by which
messages expire (`anyio.current_time`, so virtual time works). Nothing survives the process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from orderbus._core.message import Incoming, Outgoing, Receipt
from orderbus._core.naming import nearest
from orderbus._core.topology import Topology
from orderbus.adapters.memory.queue import MESSAGE_OVERHEAD_BYTES, MemoryQueue, Stored
from orderbus.adapters.memory.routing import Router
from orderbus.adapters.memory.shared import SharedByName
from orderbus.adapters.memory.subscription import MemorySubscription
from orderbus.adapters.memory.wire import received_properties
from orderbus.errors import UnavailableError, UsageError

__all__ = ["MemoryBroker", "open_broker"]

logger = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 30
MAX_PREFETCH = 65535
"""What AMQP can say."""
_ROUTES_KEPT = 10_000


@asynccontextmanager
async def open_broker(url: str, *, name: str) -> AsyncIterator[MemoryBroker]:
    """Open a memory broker. `memory://` makes one of your own; `memory://NAME` shares the one of that name in this process.

    A shared broker and its content live as long as somebody has it open. It belongs to the event loop that opened it first:
    opening it from another one raises UsageError. `name` says who connects, as on a real server; nothing here shows it.
    """
    with brokers.open(url) as broker:
        yield broker


class MemoryBroker:
    """Implements `orderbus.abc.Broker`, and has hooks by which a test makes it fail.

    `limit_bytes` bounds everything it keeps, a message counting its body and 1 KiB; a publish beyond it is REFUSED. As on
    RabbitMQ 3.10, every return of a delivery counts towards the delivery limit: rejected, released, or lost with its consumer.
    """

    def __init__(self, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._router = Router()
        self._queues: dict[str, MemoryQueue] = {}
        self._routes: dict[tuple[str, str], tuple[MemoryQueue, ...]] = {}
        self._expiring: list[MemoryQueue] = []
        self.next_expiry = math.inf
        """No message expires before this time; never later than the first of them does."""
        self._last_epoch = 0
        self._connection = 0
        self._unblocked: anyio.Event | None = None
        self._to_refuse = 0
        self._confirms_to_lose = 0

    async def apply(self, topology: Topology) -> None:
        """Declare what is missing, all or nothing. Raises TopologyError where something exists with other arguments."""
        await checkpoint()
        self.expire()
        for declared in self._router.declare(topology):
            queue = self._queues[declared.name] = MemoryQueue(declared)
            if queue.ttl_s is not None:
                self._expiring.append(queue)
        self._routes.clear()
        for queue in self._queues.values():
            self._retry_held(queue)

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        """Publish all; one receipt each, in order. Waits as long as the broker is blocked; a cancelled call may have published.

        A message for an exchange that does not exist is UNROUTABLE, and what follows it in the batch is lost, and UNKNOWN: the real
        broker closes the channel over it.
        """
        await checkpoint_if_cancelled()
        connection = self._connection
        while self._unblocked is not None:
            await self._unblocked.wait()
            if connection != self._connection:
                return [Receipt.UNKNOWN] * len(batch)
        self.expire()
        now = anyio.current_time()
        receipts: list[Receipt] = []
        reached: dict[MemoryQueue, None] = {}  # in an order that is the same in every run
        is_closed = False
        for message in batch:
            if is_closed:
                receipts.append(Receipt.REFUSED if received_properties(message) is None else Receipt.UNKNOWN)
                continue
            queues = self._route(message.exchange, message.routing_key)
            reached.update(dict.fromkeys(queues))
            receipts.append(self._accept(message, queues, now))
            is_closed = receipts[-1] is Receipt.UNROUTABLE and not self._router.has(message.exchange)
        for queue in reached:
            queue.notify()
        await checkpoint()
        if connection != self._connection:
            return [Receipt.UNKNOWN] * len(batch)
        return receipts

    @asynccontextmanager
    async def subscribe(self, queue: str, *, prefetch: int) -> AsyncIterator[MemorySubscription]:
        """Consume a queue. Raises UnavailableError where it does not exist, and UsageError for a wrong prefetch."""
        if not 1 <= prefetch <= MAX_PREFETCH:
            raise UsageError(
                f"prefetch={prefetch} for queue {queue!r}: use 1 to {MAX_PREFETCH}; 0 would mean no bound at all", code="OB507"
            )
        await checkpoint()
        source = self._queues.get(queue)
        if source is None:
            raise UnavailableError(f"there is no queue {queue!r} to consume: it was deleted, or never declared")
        self._last_epoch += 1
        subscription = MemorySubscription(self, source, prefetch, self._last_epoch)
        source.consumers.append(subscription)
        try:
            yield subscription
        finally:
            self._end(source, subscription, f"the subscription to {queue!r} was left")

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue. Raises UsageError where there is no such queue."""
        await checkpoint()
        self.expire()
        return len(self._queue(queue))

    def messages(self, queue: str) -> list[Incoming]:
        """What is ready in a queue, in the order in which it will be delivered; nothing is taken. The unsettled is not in it."""
        self.expire()
        return [
            Incoming(
                queue=queue,
                exchange=stored.exchange,
                routing_key=stored.routing_key,
                body=stored.body,
                tag=0,
                epoch=0,
                redelivered=stored.deliveries > 0,
                properties=stored.delivered_properties(),
            )
            for stored in self._queue(queue)
        ]

    def drop_connections(self) -> None:
        """Every subscription ends with UnavailableError, the unsettled is requeued and counted; publishes under way are UNKNOWN.

        A publish that waits because the broker is blocked is lost; one that waits for its confirm is in the queues.
        """
        self._connection += 1
        for queue in self._queues.values():
            for subscription in list(queue.consumers):
                self._end(queue, subscription, f"the connection that consumed {queue.name!r} was dropped")
        if self._unblocked is not None:
            self._unblocked.set()
            self._unblocked = anyio.Event()

    def refuse_publishes(self, count: int) -> None:
        """Answer REFUSED to the next `count` messages, and keep none of them."""
        self._to_refuse = count

    def lose_confirms(self, count: int) -> None:
        """Answer UNKNOWN to the next `count` messages that are kept, as if the connection had ended before the confirm."""
        self._confirms_to_lose = count

    def delete_queue(self, name: str) -> None:
        """Delete a queue with all that is in it, unsettled or not; `receive` of its consumers raises UnavailableError.

        As on the real one, a consumer that is paused does not hear of it, unless it is a single active one.
        """
        queue = self._queue(name)
        for subscription in queue.consumers:
            if subscription.is_paused and not queue.declared.single_active_consumer:
                self._discard(subscription.forsake())
            else:
                self._discard(subscription.end(f"the broker cancelled the consumer of {name!r}: the queue was deleted"))
        queue.consumers.clear()
        self._discard([*queue, *(stored for stored, _ in queue.held)])
        del self._queues[name]
        if queue in self._expiring:
            self._expiring.remove(queue)
        self._router.forget_queue(name)
        self._routes.clear()

    def block(self) -> None:
        """Take no publishes (RabbitMQ's memory or disk alarm): they wait. Consuming goes on."""
        if self._unblocked is None:
            self._unblocked = anyio.Event()

    def unblock(self) -> None:
        if self._unblocked is not None:
            self._unblocked.set()
            self._unblocked = None

    def expire(self) -> None:
        """Dead-letter (or drop) what has expired until now, in the order in which it did. Called by whoever looks at a queue."""
        if self.next_expiry == math.inf:
            return
        now = anyio.current_time()
        while self.next_expiry <= now:
            queue = min(self._expiring, key=lambda candidate: candidate.next_expiry)
            if queue.next_expiry <= now:
                at = queue.next_expiry
                (stored,) = queue.take(1)
                self._bury(queue, stored, "expired", at)
            self._find_next_expiry()

    def give_back(self, queue: MemoryQueue, returned: Sequence[Stored]) -> None:
        """Requeue unsettled messages in this order; dead-letter the ones that came back too often."""
        for dead in queue.give_back(returned):
            self._bury(queue, dead, "delivery_limit", anyio.current_time())
        if queue.next_expiry < self.next_expiry:
            self._expect_expiry(queue.next_expiry)
        queue.notify()

    def reject(self, queue: MemoryQueue, stored: Stored) -> None:
        """Dead-letter one for good."""
        self._bury(queue, stored, "rejected", anyio.current_time())

    def forget(self, stored: Stored) -> None:
        self._size_bytes -= stored.size_bytes

    def _queue(self, name: str) -> MemoryQueue:
        queue = self._queues.get(name)
        if queue is None:
            near = nearest(name, self._queues)
            fix = f"did you mean {near!r}?" if near else "apply the topology that declares it first"
            raise UsageError(f"there is no queue {name!r}: {fix}", code="OB505")
        return queue

    def _route(self, exchange: str, routing_key: str) -> tuple[MemoryQueue, ...]:
        queues = self._routes.get((exchange, routing_key))
        if queues is None:
            queues = tuple(self._queues[name] for name in self._router.route(exchange, routing_key))
            if len(self._routes) >= _ROUTES_KEPT:
                self._routes.clear()
            self._routes[(exchange, routing_key)] = queues
        return queues

    def _accept(self, message: Outgoing, queues: tuple[MemoryQueue, ...], now: float) -> Receipt:
        if self._to_refuse:
            self._to_refuse -= 1
            return Receipt.REFUSED
        properties = received_properties(message)
        if properties is None:
            return Receipt.REFUSED
        if not queues:
            return Receipt.UNROUTABLE
        size_bytes = (len(message.body) + MESSAGE_OVERHEAD_BYTES) * len(queues)
        if self._size_bytes + size_bytes > self._limit_bytes:
            return Receipt.REFUSED
        self._size_bytes += size_bytes
        for queue in queues:
            queue.put(Stored(message.exchange, message.routing_key, message.body, properties), now)
            if queue.ttl_s is not None and queue.next_expiry < self.next_expiry:
                self._expect_expiry(queue.next_expiry)
        if self._confirms_to_lose:
            self._confirms_to_lose -= 1
            return Receipt.UNKNOWN
        return Receipt.CONFIRMED

    def _bury(self, queue: MemoryQueue, stored: Stored, reason: str, at: float) -> None:
        """A message leaves `queue` as dead: to the dead letter exchange at least once, or away where there is none."""
        exchange = queue.declared.dead_letter_exchange
        if exchange is None:
            self.forget(stored)
            return
        key = queue.declared.dead_letter_routing_key
        dead = stored.dead(queue.name, reason, stored.routing_key if key is None else key)
        targets = self._route(exchange, dead.routing_key)
        if not targets:
            queue.held.append((stored, reason))
            return
        self.forget(stored)
        for target in targets:
            if dead.died_in(target.name):
                # RabbitMQ does the same: a message that only ever dies, and is never rejected, would go round for ever.
                logger.warning("dropped a message that was dead-lettered in a circle", extra={"queue": target.name})
                continue
            copy = Stored(exchange, dead.routing_key, dead.body, dead.properties)
            self._size_bytes += copy.size_bytes
            target.put(copy, at)
            if target.next_expiry < self.next_expiry:
                self._expect_expiry(target.next_expiry)
            target.notify()

    def _retry_held(self, queue: MemoryQueue) -> None:
        held = list(queue.held)
        queue.held.clear()
        for stored, reason in held:
            self._bury(queue, stored, reason, anyio.current_time())

    def _end(self, queue: MemoryQueue, subscription: MemorySubscription, because: str) -> None:
        if subscription in queue.consumers:
            queue.consumers.remove(subscription)
            self.give_back(queue, subscription.end(because))

    def _discard(self, messages: Sequence[Stored]) -> None:
        for stored in messages:
            self.forget(stored)

    def _expect_expiry(self, at: float) -> None:
        """An earlier expiry than the waiting consumers know of: wake them, so that they wait until then."""
        self.next_expiry = at
        for queue in self._queues.values():
            for consumer in queue.waiting:
                consumer.wake()

    def _find_next_expiry(self) -> None:
        self.next_expiry = min((queue.next_expiry for queue in self._expiring), default=math.inf)


brokers = SharedByName("broker", MemoryBroker)
