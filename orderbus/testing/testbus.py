"""TestBus: a user's own buses on servers in memory, in virtual time, and what became of their events as assertions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any
from uuid import UUID

import anyio

from orderbus import Bus, Event, Settings, UsageError
from orderbus._core.event import event_type
from orderbus._runtime.relay import outgoing_of
from orderbus.testing.assertions import Assertions
from orderbus.testing.clock import is_virtual
from orderbus.testing.faults import FaultName, Faults
from orderbus.testing.record import Record
from orderbus.testing.relaying import relaying
from orderbus.testing.servers import open_servers
from orderbus.testing.sim.servers import Answer
from orderbus.testing.telling import errors_of
from orderbus.testing.watching import WatchedEngine

__all__ = ["StuckError", "TestBus"]

VIRTUAL_LIMIT_S = 86_400.0
REAL_LIMIT_S = 10.0
MOST_TRIES = 1_000
"""Of one event by one handler: what waits for a server that never comes would go on for as long as it is let."""


class StuckError(AssertionError):
    """There is work left that does not come to an end; the text names it."""


class TestBus(Assertions):
    """Runs buses as they are, on a broker, a store and claims in memory, for the time of one test.

        async with TestBus(bus) as t:
            await t.publish(OrderPlaced(order_id=7))
            await t.settled()
            t.emitted(PaymentAuthorized, order_id=7)

    Give several buses (`TestBus(orders, payments)`), and they talk to each other. Handlers, resources, periodics, middleware and
    settings are their own, but for the URLs; an event that none of them consumes counts as published. Where the event loop has
    virtual time (see docs/testing.md), waits pass at once. The buses are closed, and theirs again, when it is left.

    `database_url` names a real PostgreSQL with orderbus's schema (or `"embedded"`), used instead of the store in memory; that needs
    an event loop in real time. `answer(sql, params)` stands in for a database: statements are written down and get the rows
    that it returns. Raises UsageError where both are given, for a bus that is open, or for a database in virtual time.
    """

    __test__ = False  # pytest, which collects classes by their names

    def __init__(self, *buses: Bus, database_url: str | None = None, answer: Answer | None = None) -> None:
        if not buses:
            raise UsageError("TestBus(): give it the bus that is tested, or several: TestBus(orders, payments)", code="OB904")
        for bus in buses:
            if not isinstance(bus, Bus):
                raise UsageError(f"TestBus({bus!r}): is a {type(bus).__name__}, not an orderbus.Bus", code="OB904")
        super().__init__(buses)
        self._database_url = database_url
        self._answer = answer
        self._faults = Faults(has_database=database_url is not None)
        self._stack: AsyncExitStack | None = None

    async def __aenter__(self) -> TestBus:
        if self._stack is not None:
            raise UsageError("this TestBus was opened before; make a new one for each test", code="OB904")
        self._is_virtual = is_virtual()
        self._epoch_s = time.time() - anyio.current_time()
        self._record = record = Record()
        async with AsyncExitStack() as stack:
            pool_size = sum((bus._given or Settings()).pool_size for bus in self._buses)
            self._servers = await stack.enter_async_context(
                open_servers(record, self._faults, self._database_url, self._answer, pool_size)
            )
            await stack.enter_async_context(relaying(self._servers, Settings(), self._now_s))
            for bus in self._buses:
                stack.enter_context(_lent(bus, partial(WatchedEngine, self._servers), self._now_s))
                await stack.enter_async_context(bus)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._stack is not None
        unmet = self._faults.unmet()
        await self._stack.__aexit__(kind, error, trace)
        if unmet and error is None:
            raise AssertionError(
                f"what was asked for did not happen: {', '.join(map(repr, unmet))}; nothing gave it the occasion"
            )

    async def publish(self, event: Event) -> UUID:
        """Send an event as another service would; its id. Raises UsageError where none of the buses handles it."""
        topic = event_type(type(event)).topic
        if not any(topic in handler.topics for handler in self._handlers):
            handled = ", ".join(sorted({name for handler in self._handlers for name in handler.topics})) or "nothing"
            text = f"{type(event).__name__}: no bus of this TestBus handles {topic!r}; they handle {handled}"
            raise UsageError(text, code="OB907")
        row = self._buses[0]._open.encoding.row(event)
        self._record.input(row.event_id)
        await self._servers.queues.publish([outgoing_of(row)])
        return row.event_id

    async def redeliver(self, event_id: UUID) -> None:
        """Have an event that was published arrive once more, as brokers and relays do after a fault: an effect must not be doubled.

        Raises UsageError for an event that was not published (yet).
        """
        message = self._record.messages.get(str(event_id))
        if message is None:
            text = f"event {event_id} was not published in this test; await t.settled() before it is delivered again"
            raise UsageError(text, code="OB907")
        await self._servers.queues.publish([message])

    async def settled(self, *, limit_s: float | None = None) -> None:
        """Wait until nothing is in flight, waits for a retry, is due later or stuck: all that follows from what was sent is done.

        `limit_s` is by the event loop's clock: a day of virtual time, 10 s of real time, unless given. Raises StuckError, naming what
        is left, when the limit is over or a handler was called 1000 times for one event. Periodics are not waited for.
        """
        limit = limit_s if limit_s is not None else VIRTUAL_LIMIT_S if self._is_virtual else REAL_LIMIT_S
        until = anyio.current_time() + limit
        while True:
            changed = self._record.changed
            left = await self._unfinished()
            # While a database was asked, what it had may have come into the queues, and gone on from there into the database again.
            if not left and not changed.is_set():
                return
            if max(self._record.tried.values(), default=0) >= MOST_TRIES:
                raise StuckError(self._stuck(f"a handler was called {MOST_TRIES} times for one event", left))
            if left and anyio.current_time() >= until:
                raise StuckError(self._stuck(f"after {limit:g} s of {'virtual' if self._is_virtual else 'real'} time", left))
            with anyio.move_on_after(until - anyio.current_time()):
                await changed.wait()

    def fault(self, name: FaultName, /, *, times: int = 1) -> None:
        """Have a fault happen, at the next occasion and so many times in all; docs/testing.md lists them.

        A fault that has had no occasion when the TestBus is left is an AssertionError: the test would have shown nothing. Raises
        UsageError for a name that there is not, and for a fault of the database where that is a real one.
        """
        self._faults.arm(name, times)

    def now(self) -> datetime:
        """The time of day as the buses see it: `due_at` is measured by it, and it passes with the event loop's time."""
        return datetime.fromtimestamp(self._now_s(), UTC)

    @property
    def elapsed_s(self) -> float:
        """Seconds on the event loop's clock since this was opened."""
        return self._record.elapsed_s

    async def _unfinished(self) -> list[str]:
        queues = self._servers.queues
        left = queues.unfinished() + await self._servers.rows.unfinished()
        return left or queues.unfinished()

    def _stuck(self, why: str, left: Sequence[str]) -> str:
        lines = [f"not settled {why}; there is left:", *(f"  {one}" for one in left), *errors_of(self._record.tries)]
        if not self._is_virtual and self._database_url is None:
            lines.append("  this event loop runs in real time, in which a retry takes as long as it says: docs/testing.md")
        return "\n".join(lines)

    def _now_s(self) -> float:
        return self._epoch_s + anyio.current_time()


@contextmanager
def _lent(bus: Bus, new_engine: Callable[..., Any], now_s: Callable[[], float]) -> Iterator[None]:
    """Have a bus open on the test's servers, by the test's clock, without a relay of its own."""
    saved = bus._given, bus._clock, bus._new_engine
    given = {} if bus._given is None else {name: getattr(bus._given, name) for name in bus._given.__dict__["_given"]}
    urls = {"broker_url": "memory://", "database_url": None, "redis_url": None}
    bus._given, bus._clock, bus._new_engine = Settings(**{**given, **urls, "relay": False}), now_s, new_engine
    try:
        yield
    finally:
        bus._given, bus._clock, bus._new_engine = saved
