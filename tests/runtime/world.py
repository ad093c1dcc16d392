"""What the runtime's tests share: servers in memory that outlive a bus, events to send, and ways to see what became of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import msgspec

from orderbus import Bus, DrainReceipt, Event, Settings, new_id
from orderbus._core.codec import encode
from orderbus._core.message import KEY, Incoming, Outgoing, Receipt
from orderbus._core.topology import EVENTS_EXCHANGE, bucket_of, routing_key
from orderbus.adapters.memory import MemoryBroker, MemoryClaims, MemoryStore, open_broker, open_claims, open_store

_numbers = itertools.count(1)


class Placed(Event, topic="orders.placed", key="order"):
    order: str
    n: int = 0


class Cancelled(Event, topic="orders.cancelled", key="order"):
    order: str
    n: int = 0


class Paid(Event, topic="orders.paid", key="order"):
    order: str
    n: int = 0


class Noted(Event, topic="notes.taken", unrouted="drop"):
    text: str = ""


class World:
    """Servers in memory. Time is `anyio.current_time()`, also for the bus's wall clock."""

    def __init__(self, broker: MemoryBroker, store: MemoryStore, claims: MemoryClaims, url: str) -> None:
        self.broker = broker
        self.store = store
        self.claims = claims
        self.url = url
        self.epoch_s = time.time() - anyio.current_time()

    def now(self) -> float:
        return self.epoch_s + anyio.current_time()

    def bus(self, group: str = "shop", *, format: Any = "json", **settings: Any) -> Bus:
        settings = {"broker_url": self.url, **settings}
        return Bus(group, settings=Settings(**settings), clock=self.now, format=format)

    async def send(self, event: Event, *, event_id: UUID | None = None, **changes: Any) -> UUID:
        """Publish an event as the relay would; `changes` replace fields of the message."""
        event_id = event_id or new_id()
        message = self.message(event, event_id, **changes)
        receipts = await self.broker.publish([message])
        assert list(receipts) == [Receipt.CONFIRMED]
        return event_id

    def message(self, event: Event, event_id: UUID, **changes: Any) -> Outgoing:
        kind = type(event).__event_type__
        key = getattr(event, kind.key) if kind.key else None
        message = Outgoing(
            exchange=EVENTS_EXCHANGE,
            routing_key=routing_key(kind.topic, bucket_of(key or str(event_id))),
            body=encode(event, limit_bytes=1 << 20),
            message_id=str(event_id),
            type=kind.topic,
            headers={} if key is None else {KEY: key},
        )
        return msgspec.structs.replace(message, **changes)

    def parked(self, queue: str = "shop.orders.placed") -> list[Incoming]:
        return self.broker.messages(f"{queue}.dlq")

    def ready(self, queue: str = "shop.orders.placed") -> int:
        return len(self.broker.messages(queue))


class Log:
    """Lines with their times, and a way to wait until there are so many."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.times: list[float] = []
        """In seconds since the log was opened."""
        self._opened = anyio.current_time()
        self._changed = anyio.Event()

    def __call__(self, line: Any) -> None:
        self.lines.append(line)
        self.times.append(anyio.current_time() - self._opened)
        self._changed.set()
        self._changed = anyio.Event()

    async def reached(self, count: int) -> list[Any]:
        with anyio.fail_after(20_000):
            while len(self.lines) < count:
                await self._changed.wait()
        return self.lines

    @property
    def waits(self) -> list[float]:
        """The time between one line and the next."""
        return [round(later - earlier, 3) for earlier, later in itertools.pairwise(self.times)]


def receipt_of(bus: Bus) -> DrainReceipt:
    assert bus.receipt is not None
    return bus.receipt


async def until(condition: Callable[[], object], within_s: float = 120.0) -> None:
    """Let (virtual) time pass until something holds."""
    with anyio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await anyio.sleep(0.01)


@asynccontextmanager
async def open_world() -> AsyncIterator[World]:
    url = f"memory://world-{next(_numbers)}"
    async with (
        open_broker(url, name="test") as broker,
        open_store(url) as store,
        open_claims(url, prefix=Settings().redis_prefix) as claims,
    ):
        yield World(broker, store, claims, url)
