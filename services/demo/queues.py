"""How many messages are ready in the queues, once a second.

RabbitMQ is asked by the driver. The broker inside a process can be asked only there: the process prints what it finds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio
import orjson
from anyio.from_thread import BlockingPortal, start_blocking_portal

from orderbus import Bus, OrderbusError
from orderbus.abc import Broker

Depths = dict[int, dict[str, int]]
"""By second: queue → messages that are ready."""

TELL = "DEMO_QUEUES"
"""Set in the environment of a process that has its broker inside, it prints its queues."""

PERIOD_S = 1.0


def consumed(services: Iterable[str]) -> tuple[str, ...]:
    """The queues of these services' handlers, each followed by that of its dead letters."""
    return of_buses(importlib.import_module(f"services.{name}").bus for name in services)


def of_buses(buses: Iterable[Bus]) -> tuple[str, ...]:
    queues = sorted({handler.queue for bus in buses for handler in bus.handlers})
    return tuple(name for queue in queues for name in (queue, f"{queue}.dlq"))


class QueueWatch:
    """Asks a RabbitMQ, on a thread of its own; nobody waits for the answer. `depths` are the answers."""

    def __init__(self, portal: BlockingPortal, broker: Broker, queues: Sequence[str]) -> None:
        self._portal = portal
        self._broker = broker
        self._queues = queues
        self._asked: Future[None] | None = None
        self._second = 0
        self.depths: Depths = {}

    def look(self) -> None:
        """Ask, where this second has not asked yet, and the last answer is there."""
        second = int(time.time())
        if second == self._second or (self._asked is not None and not self._asked.done()):
            return
        if self._asked is not None:
            self._asked.result()
        self._second = second
        self._asked = self._portal.start_task_soon(self._ask, second)

    def stop(self) -> None:
        """An answer that is still to come is no longer waited for."""
        if self._asked is not None:
            self._asked.cancel()

    async def _ask(self, second: int) -> None:
        with suppress(OrderbusError):  # the broker is away: this second has no answer
            self.depths[second] = await _ready(self._broker, self._queues)


@contextmanager
def watching(broker_url: str, queues: Sequence[str]) -> Iterator[QueueWatch | None]:
    """None where no queue is to be watched, or none can be from here."""
    if not queues or not broker_url.startswith("amqp"):
        yield None
        return
    from orderbus.adapters.rabbitmq import open_broker

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(open_broker(broker_url, name="demo")) as broker:
        watch = QueueWatch(portal, broker, queues)
        try:
            yield watch
        finally:
            watch.stop()


@asynccontextmanager
async def telling(broker: Broker, queues: Sequence[str]) -> AsyncIterator[None]:
    """Print a JSON line once a second."""

    async def tell() -> None:
        while True:
            line = {"event": "queues", "second": int(time.time()), "ready": await _ready(broker, queues)}
            print(orjson.dumps(line).decode(), flush=True)
            await anyio.sleep(PERIOD_S)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tell)
        yield
        tasks.cancel_scope.cancel()


def told(lines: Iterable[Mapping[str, object]]) -> Depths:
    """What `telling` has printed, among other lines."""
    found: Depths = {}
    for line in lines:
        second, ready = line.get("second"), line.get("ready")
        if line.get("event") == "queues" and isinstance(second, int) and isinstance(ready, dict):
            found[second] = ready
    return found


async def _ready(broker: Broker, queues: Sequence[str]) -> dict[str, int]:
    return {queue: await broker.depth(queue) for queue in queues}
