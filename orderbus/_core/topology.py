"""Which exchanges, queues and bindings a group needs, and how a key finds its bucket.

Routing keys are `<topic>.<bucket>`: plain queues bind `<topic>.*`, and ordered consumers can later be split by bucket.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Literal

import msgspec

BUCKETS = 64
EVENTS_EXCHANGE = "ob.events"
RETURN_EXCHANGE = "ob.return"
LOST_EXCHANGE = "ob.lost"
LOST_QUEUE = "ob.lost"

DELIVERY_LIMIT = 50
"""The broker's own last line of defence. Our attempt counter decides; this one only stops what kills processes."""
NEVER = 2147483647
"""The delivery limit of a dead letter queue: the default of RabbitMQ 4 drops a message after 20 listings, -1 on 3.10 at the first."""

RETRY_STEPS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""The delays of the retry ladder in seconds: a queue each. A delay is rounded up to a step; a longer one takes several."""


class Exchange(msgspec.Struct, frozen=True):
    name: str
    kind: Literal["topic", "direct", "fanout"]
    alternate: str | None = None


class Queue(msgspec.Struct, frozen=True):
    """A durable quorum queue; where it dead-letters, it does so at least once."""

    name: str
    delivery_limit: int | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    message_ttl_ms: int | None = None
    single_active_consumer: bool = False


class Binding(msgspec.Struct, frozen=True):
    exchange: str
    queue: str
    routing_key: str


class Topology(msgspec.Struct, frozen=True):
    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


class QueueNeed(msgspec.Struct, frozen=True):
    """A queue that a group's handlers consume, with the topics it is bound to."""

    name: str
    topics: tuple[str, ...]
    ordered: bool = False


def bucket_of(key: str) -> int:
    """The bucket of a key, 0 ≤ bucket < 64. CRC-32, so that every language and version agrees."""
    return zlib.crc32(key.encode()) % BUCKETS


def routing_key(topic: str, bucket: int) -> str:
    return f"{topic}.{bucket:02d}"


def dead_letter_queue(queue: str) -> str:
    return f"{queue}.dlq"


def retry_exchange(step_s: int) -> str:
    return f"ob.retry.{step_s * 1000}ms"


def retry_step(delay_s: float) -> int:
    """The ladder's step for a delay: the smallest that is long enough, or the longest there is."""
    return next((step for step in RETRY_STEPS_S if step >= delay_s), RETRY_STEPS_S[-1])


def topology_for(needs: Iterable[QueueNeed]) -> Topology:
    """Everything that must exist before the group publishes or consumes; the same call may be applied again and again."""
    exchanges = [
        Exchange(LOST_EXCHANGE, "fanout"),
        Exchange(EVENTS_EXCHANGE, "topic"),
        Exchange(RETURN_EXCHANGE, "direct", alternate=LOST_EXCHANGE),
    ]
    queues = [Queue(LOST_QUEUE, delivery_limit=NEVER)]
    bindings = [Binding(LOST_EXCHANGE, LOST_QUEUE, "")]
    for step in RETRY_STEPS_S:
        name = retry_exchange(step)
        exchanges.append(Exchange(name, "fanout"))
        queues.append(Queue(name, message_ttl_ms=step * 1000, dead_letter_exchange=RETURN_EXCHANGE))
        bindings.append(Binding(name, name, ""))
    for need in needs:
        parked = dead_letter_queue(need.name)
        queues.append(Queue(parked, delivery_limit=NEVER))
        queues.append(
            Queue(
                need.name,
                delivery_limit=DELIVERY_LIMIT,
                dead_letter_exchange="",
                dead_letter_routing_key=parked,
                single_active_consumer=need.ordered,
            )
        )
        bindings.append(Binding(RETURN_EXCHANGE, need.name, need.name))
        bindings.extend(Binding(EVENTS_EXCHANGE, need.name, f"{topic}.*") for topic in need.topics)
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))
