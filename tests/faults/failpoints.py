"""Exact moments at which a process kills itself, by name. They patch the adapters of this one process; the library has none.

FAULTS_FAILPOINT=name arms one: the process dies (SIGKILL) at the NTH time that it comes by.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orderbus.abc import Settlement
from orderbus.adapters.postgres import transaction
from orderbus.adapters.postgres.outbox import PostgresOutbox
from orderbus.adapters.postgres.store import PostgresStore
from orderbus.adapters.postgres.transaction import PostgresTransaction
from orderbus.adapters.rabbitmq.broker import RabbitBroker
from orderbus.adapters.rabbitmq.subscription import Subscription
from orderbus.adapters.redis.claims import RedisClaims

NTH = 5
LEFT_KB = 100
BALLAST: list[bytearray] = []
SENT_S = 0.05
"""After so long what was written has reached the server, and its answer is not looked at any more."""
GOES_WITH_COMMIT = ("into orderbus.outbox", "into trail")
"""Events that were emitted; or, of who emits none, the rows that it deferred."""

writes_at_once = False
"""Whether the handlers write by `tx.execute`, and not by `tx.defer_row` as ever."""


def arm() -> None:
    """Raises KeyError where there is no such point."""
    name = os.environ.get("FAULTS_FAILPOINT")
    if name:
        {**PRODUCER, **SERVICE, **TRAIL, **RELAY, **NOTIFY, **STARVED}[name]()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(kind: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
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
    """When an async method has returned."""
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


def while_waiting(kind: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """When an async method has sent what it has to send, and before it could look at any answer."""
    original = getattr(kind, name)
    calls = 0

    async def patched(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += when(*arguments)
        if calls < NTH:
            return await original(self, *arguments, **named)
        sent = asyncio.ensure_future(original(self, *arguments, **named))
        for _ in range(3):
            await asyncio.sleep(0)
        time_passes()
        die()
        return await sent

    setattr(kind, name, patched)


def effect_written() -> None:
    """The handler's own write is done and answered, inside the open transaction."""
    global writes_at_once
    writes_at_once = True
    after(PostgresTransaction, "execute", lambda sql, *_: sql.startswith("insert into"))


def everything_sent() -> None:
    """All that the commit sends is done and answered, deferred rows and emitted events too; only COMMIT itself is never sent."""
    original = transaction.trip
    calls = 0

    async def patched(connection: Any, sent: Any) -> Any:
        nonlocal calls
        is_it = sent[-1].sql == "commit" and any(words in call.sql for call in sent for words in GOES_WITH_COMMIT)
        calls += is_it
        if not is_it or calls != NTH:
            return await original(connection, sent)
        answers = await original(connection, sent[:-1])
        die()
        return answers

    transaction.trip = patched  # type: ignore[assignment]


def commit_unanswered() -> None:
    """The commit has been written to the server, which does it; this process never hears of it."""
    original = transaction.trip
    calls = 0

    async def patched(connection: Any, sent: Any) -> Any:
        nonlocal calls
        calls += any(call.sql == "commit" for call in sent)
        if calls < NTH:
            return await original(connection, sent)
        answer = asyncio.ensure_future(original(connection, sent))
        for _ in range(3):
            await asyncio.sleep(0)
        time_passes()
        die()
        return await answer

    transaction.trip = patched  # type: ignore[assignment]


def out_of_memory() -> None:
    """From the NTH batch on: every allocation that needs more than a little fails."""

    def starve(*_: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == NTH:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used, used))
            ballast = BALLAST
            with suppress(MemoryError):
                while True:
                    ballast.append(bytearray(1000))
            del ballast[-LEFT_KB:]
        return False

    calls = 0
    before(PostgresStore, "begin", starve)


def time_passes() -> None:
    """Without the event loop: what is in the kernel's buffers goes out."""
    time.sleep(SENT_S)


def emits(_: Any, emitted: Any, *rest: Any) -> bool:
    return bool(emitted)


def leaves(batch: Any) -> bool:
    """A batch of retries or parked copies, not of events."""
    return any(message.exchange != "ob.events" for message in batch)


PRODUCER: dict[str, Callable[[], None]] = {
    "producer-before-commit": lambda: before(PostgresTransaction, "commit", emits),
    "producer-everything-sent-before-commit": everything_sent,
    "producer-commit-unanswered": commit_unanswered,
    "producer-after-commit": lambda: after(PostgresTransaction, "commit", emits),
}
TRAIL: dict[str, Callable[[], None]] = {
    "after-receive": lambda: after(Subscription, "receive"),
    "after-inbox-insert": lambda: after(PostgresStore, "begin"),
    "after-effect-before-commit": effect_written,
    "everything-sent-before-commit": everything_sent,
    "commit-unanswered": commit_unanswered,
    "after-commit-before-ack": lambda: before(Subscription, "settle", lambda _, how: how is Settlement.ACK),
}
SERVICE: dict[str, Callable[[], None]] = {
    **TRAIL,
    "retry-published-unconfirmed": lambda: while_waiting(RabbitBroker, "publish", leaves),
    "retry-confirmed-before-ack": lambda: after(RabbitBroker, "publish", leaves),
}
RELAY: dict[str, Callable[[], None]] = {
    "relay-after-read": lambda: after(PostgresOutbox, "read"),
    "relay-published-unconfirmed": lambda: while_waiting(RabbitBroker, "publish"),
    "relay-confirmed-before-delete": lambda: before(PostgresOutbox, "delete"),
    "relay-after-delete": lambda: after(PostgresOutbox, "delete"),
}
STARVED: dict[str, Callable[[], None]] = {"out-of-memory": out_of_memory}
NOTIFY: dict[str, Callable[[], None]] = {
    "after-receive": TRAIL["after-receive"],
    "after-claim": lambda: after(RedisClaims, "claim"),
    "before-claim-is-completed": lambda: before(RedisClaims, "complete"),
    "claim-completed-before-ack": lambda: after(RedisClaims, "complete"),
}
