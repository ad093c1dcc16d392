"""What the crash tests run as processes of their own: a producer and a service, each with a point at which it kills itself.

`python -m tests.crash.program ROLE [FAILPOINT]`. A failpoint is a real SIGKILL at an exact moment: the process patches one method
of an adapter to die before, or after, the n-th call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import anyio

from orderbus import Bus, Event, Settings, Tx, run_until_signalled
from orderbus.abc import Settlement
from orderbus.adapters.postgres.outbox import PostgresOutbox
from orderbus.adapters.postgres.transaction import PostgresTransaction
from orderbus.adapters.rabbitmq.broker import RabbitBroker
from orderbus.adapters.rabbitmq.subscription import Subscription

EVENTS = 300
NTH = 3


class Placed(Event, topic="crash.placed", key="n"):
    n: int


class Applied(Event, topic="crash.applied", key="n"):
    n: int


producer = Bus("crash-producer", settings=Settings(relay=False))
service = Bus("crash", settings=Settings(relay=True))


@service.on(Placed, fuse=20, concurrency=2)
async def apply(event: Placed, tx: Tx) -> Applied:
    await tx.execute("insert into effect (n, which) values (%s, 'placed')", (event.n,))
    return Applied(n=event.n)


@service.on(Applied, fuse=20, concurrency=2)
async def count(event: Applied, tx: Tx) -> None:
    tx.defer("insert into effect (n, which) values (%s, 'applied')", (event.n,))


async def produce() -> None:
    """Each number that is in `source` was committed together with its event."""
    async with producer:
        for n in range(EVENTS):
            async with producer.transaction() as tx:
                await tx.execute("insert into source (n) values (%s)", (n,))
                tx.emit(Placed(n=n))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(kind: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Die before the n-th call of a method."""
    original = getattr(kind, name)
    calls = 0

    def patched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += when(*arguments)
        if calls >= NTH:
            die()
        return original(self, *arguments, **named)

    setattr(kind, name, patched)


def after(kind: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Die when the n-th call of an async method has returned."""
    original = getattr(kind, name)
    calls = 0

    async def patched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = await original(self, *arguments, **named)
        calls += when(*arguments)
        if calls >= NTH:
            die()
        return result

    setattr(kind, name, patched)


def while_publishing() -> None:
    """Die when the n-th batch has been written and its confirms are still to come."""
    original = RabbitBroker.publish
    calls = 0

    async def patched(self: RabbitBroker, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        sent = asyncio.ensure_future(original(self, batch))
        if calls >= NTH:
            for _ in range(3):
                await asyncio.sleep(0)
            die()
        return await sent

    RabbitBroker.publish = patched  # type: ignore[method-assign]


def emits(_: Any, emitted: Any, *rest: Any) -> bool:
    return bool(emitted)


FAILPOINTS: dict[str, Callable[[], None]] = {
    "after-receive": lambda: after(Subscription, "receive"),
    "after-effect-before-commit": lambda: before(PostgresTransaction, "commit", emits),
    "after-commit-before-ack": lambda: before(Subscription, "settle", lambda _, how: how is Settlement.ACK),
    "after-publish-before-confirm": while_publishing,
    "after-confirm-before-delete": lambda: before(PostgresOutbox, "delete"),
    "after-delete": lambda: after(PostgresOutbox, "delete"),
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    role, *failpoint = sys.argv[1:]
    for name in failpoint:
        FAILPOINTS[name]()
    if role == "producer":
        anyio.run(produce)
    else:
        anyio.run(run_until_signalled, service)
