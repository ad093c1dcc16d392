"""What one measured process is asked to do, and the messages that all of them move."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import msgspec

GROUP = "bench"
ORDERED_QUEUE = f"{GROUP}.ordered"
"""orderbus has one such queue for all ordered handlers of a group."""
PREFETCH = 500


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One process, one round. `topic` is new for every job, so that no job meets another's messages."""

    workload: str
    variant: str
    peer: str
    topic: str
    count: int
    body_bytes: int
    prefetch: int = PREFETCH
    broker_url: str
    database_url: str = ""
    redis_url: str = ""
    options: dict[str, Any] = {}

    @property
    def queue(self) -> str:
        """The queue that is consumed: the name that orderbus gives it, used by every peer."""
        return f"{GROUP}.{self.topic}"


class Sample(msgspec.Struct, frozen=True):
    """The body that every peer encodes and decodes, in JSON."""

    number: int
    order_id: UUID
    customer_id: UUID
    total_cents: int
    note: str


def samples(job: Job) -> Iterator[Sample]:
    """The job's messages: `number` counts from 0, and the note fills the body up to `body_bytes`."""
    rng = random.Random(1)
    keys = int(job.options.get("keys", 0))
    for number in range(job.count):
        order_id = UUID(int=(number % keys) + 1) if keys else UUID(int=rng.getrandbits(128), version=4)
        yield Sample(
            number, order_id, UUID(int=rng.getrandbits(128), version=4), number % 100_000, "x" * note_length(job.body_bytes)
        )


def note_length(body_bytes: int) -> int:
    """How long a note makes a body of about this size: the other fields take 150 bytes."""
    return max(body_bytes - 150, 0)
