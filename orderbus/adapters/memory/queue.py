"""A queue of the memory broker: what is ready, who consumes it, and in which order things come back.

Modelled on RabbitMQ's quorum queues: what was returned is delivered before what is new, in the order of its return; every
return counts; a message that was returned more often than the delivery limit allows is dead-lettered; only the head expires.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from orderbus._core.message import HeaderValue, Properties
from orderbus._core.topology import Queue

if TYPE_CHECKING:
    from orderbus.adapters.memory.subscription import MemorySubscription

__all__ = ["MESSAGE_OVERHEAD_BYTES", "MemoryQueue", "Stored"]

MESSAGE_OVERHEAD_BYTES = 1024
"""What a message is taken to cost beside its body: objects, properties, headers. An upper estimate for our own headers."""


class Stored:
    """A message in one queue."""

    __slots__ = ("body", "deliveries", "exchange", "expires_at", "properties", "routing_key")

    def __init__(self, exchange: str, routing_key: str, body: bytes, properties: Properties) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.properties = properties
        self.deliveries = 0
        """How often it was delivered here and came back."""
        self.expires_at = math.inf

    @property
    def size_bytes(self) -> int:
        return len(self.body) + MESSAGE_OVERHEAD_BYTES

    def delivered_properties(self) -> Properties:
        """The properties as a consumer sees them: with `x-delivery-count` once the message has been here before."""
        if not self.deliveries:
            return self.properties
        return _with_headers(self.properties, {"x-delivery-count": self.deliveries})

    def dead(self, queue: str, reason: str, routing_key: str) -> Stored:
        """The message as it leaves `queue` for its dead letter exchange, with `x-death` brought up to date."""
        deaths = self.properties.headers.get("x-death")
        earlier = [death for death in deaths if isinstance(death, dict)] if isinstance(deaths, list) else []
        same = [death for death in earlier if death.get("queue") == queue and death.get("reason") == reason]
        counted = same[0].get("count") if same else 0
        newest: dict[str, HeaderValue] = {
            "count": (counted if isinstance(counted, int) else 0) + 1,
            "reason": reason,
            "queue": queue,
            "exchange": self.exchange,
            "routing-keys": [self.routing_key],
        }
        headers: dict[str, HeaderValue] = {"x-death": [newest, *(death for death in earlier if death not in same)]}
        if "x-first-death-queue" not in self.properties.headers:
            headers |= {
                "x-first-death-exchange": self.exchange,
                "x-first-death-queue": queue,
                "x-first-death-reason": reason,
            }
        return Stored(self.exchange, routing_key, self.body, _with_headers(self.properties, headers))

    def died_in(self, queue: str) -> bool:
        deaths = self.properties.headers.get("x-death")
        return isinstance(deaths, list) and any(isinstance(death, dict) and death.get("queue") == queue for death in deaths)


class MemoryQueue:
    """Ready messages, consumers in order of arrival, and whom to wake."""

    __slots__ = ("_notified", "_ready", "_returned", "consumers", "declared", "held", "name", "ttl_s", "waiting")

    def __init__(self, declared: Queue) -> None:
        self.declared = declared
        self.name = declared.name
        self.ttl_s = None if declared.message_ttl_ms is None else declared.message_ttl_ms / 1000
        self._ready: deque[Stored] = deque()
        self._returned: deque[Stored] = deque()
        self.held: deque[tuple[Stored, str]] = deque()
        """Dead messages that no queue takes (yet), with the reason of their death: dead lettering is at-least-once."""
        self.consumers: list[MemorySubscription] = []
        self.waiting: dict[MemorySubscription, None] = {}
        """The consumers inside `receive`, in the order in which they began to wait."""
        self._notified: MemorySubscription | None = None

    def __len__(self) -> int:
        return len(self._ready) + len(self._returned)

    def __iter__(self) -> Iterator[Stored]:
        yield from self._returned
        yield from self._ready

    def put(self, stored: Stored, now: float) -> None:
        if self.ttl_s is not None:
            stored.expires_at = now + self.ttl_s
        self._ready.append(stored)

    def give_back(self, returned: Iterable[Stored]) -> list[Stored]:
        """Requeue what was delivered and not acked, in this order, ahead of everything new; those beyond the delivery limit."""
        limit = self.declared.delivery_limit
        dead = []
        for stored in returned:
            stored.deliveries += 1
            if limit is not None and stored.deliveries > limit:
                dead.append(stored)
            else:
                self._returned.append(stored)
        return dead

    def take(self, most: int) -> list[Stored]:
        """Take up to `most` messages from the head."""
        returned, ready = self._returned, self._ready
        taken = [returned.popleft() for _ in range(min(most, len(returned)))] if returned else []
        taken += [ready.popleft() for _ in range(min(most - len(taken), len(ready)))]
        return taken

    @property
    def next_expiry(self) -> float:
        """When the head expires; infinity where nothing does."""
        if self._returned:
            return self._returned[0].expires_at
        return self._ready[0].expires_at if self._ready else math.inf

    def may_take(self, consumer: MemorySubscription) -> bool:
        """Also asked for one that has just left, and still waits: then there may be no other."""
        return not self.declared.single_active_consumer or self.consumers[:1] == [consumer]

    def notify(self) -> None:
        """Wake one consumer if there is something for it. If it leaves something, it wakes the next: a burst wakes each once."""
        if self._notified is None and (self._returned or self._ready):
            for consumer in self.waiting:
                if consumer.wants_more() and self.may_take(consumer):
                    self._notified = consumer
                    consumer.wake()
                    return

    def woken(self, consumer: MemorySubscription) -> None:
        """The consumer stopped waiting, for whatever reason."""
        self.waiting.pop(consumer, None)
        if self._notified is consumer:
            self._notified = None


def _with_headers(properties: Properties, headers: dict[str, HeaderValue]) -> Properties:
    return Properties(
        properties.message_id,
        properties.type,
        properties.content_type,
        properties.timestamp_s,
        {**properties.headers, **headers},
    )
