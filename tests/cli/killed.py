"""The command line with a moment at which it kills itself: `python -m tests.cli.killed POINT NTH VERB…`. A real SIGKILL."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from orderbus.adapters.rabbitmq.broker import RabbitBroker
from orderbus.adapters.rabbitmq.subscription import Subscription

SENT_S = 0.05
"""After so long without the event loop, what was written has reached the broker, and its answer is not looked at."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_sent() -> None:
    time.sleep(SENT_S)
    die()


def before(kind: type, name: str, nth: int) -> None:
    original = getattr(kind, name)
    calls = 0

    def patched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            die()
        return original(self, *arguments, **named)

    setattr(kind, name, patched)


def after(kind: type, name: str, nth: int) -> None:
    original = getattr(kind, name)
    calls = 0

    async def patched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        result = await original(self, *arguments, **named)
        calls += 1
        if calls == nth:
            die()
        return result

    setattr(kind, name, patched)


def while_publishing(nth: int) -> None:
    original = RabbitBroker.publish
    calls = 0

    async def patched(self: RabbitBroker, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < nth:
            return await original(self, batch)
        await self._ready_publisher()
        sent = asyncio.ensure_future(original(self, batch))
        for _ in range(3):
            await asyncio.sleep(0)
        die_when_sent()
        return await sent

    RabbitBroker.publish = patched  # type: ignore[method-assign]


POINTS: dict[str, Callable[[int], None]] = {
    "after-receive": lambda nth: after(Subscription, "receive", nth),
    "before-publish": lambda nth: before(RabbitBroker, "publish", nth),
    "published-unconfirmed": while_publishing,
    "confirmed-before-ack": lambda nth: after(RabbitBroker, "publish", nth),
    "between-acks": lambda nth: before(Subscription, "settle", nth),
    "acked-before-flush": lambda nth: before(Subscription, "flush", nth),
    "after-flush": lambda nth: after(Subscription, "flush", nth),
}


if __name__ == "__main__":
    point, nth, *arguments = sys.argv[1:]
    POINTS[point](int(nth))
    sys.argv = ["orderbus", *arguments]
    from orderbus.cli import main

    main()
