"""Bus: a consumer group, its handlers, and everything that runs while it is open."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload
from uuid import UUID

from orderbus._core.codec import Format
from orderbus._core.delivery import Batch
from orderbus._core.event import Event
from orderbus._core.handler import (
    GROUP,
    Guard,
    Handler,
    Options,
    Periodic,
    Plan,
    check_options,
    check_together,
    events_of,
    queue_needs,
    resolve,
    resolve_periodic,
)
from orderbus._core.ids import uuid7
from orderbus._core.naming import line_of_caller, nearest
from orderbus._core.policy import DEFAULT_RETRY, Retry
from orderbus._core.settings import Settings
from orderbus._core.topology import Topology, topology_for
from orderbus._runtime.engine import Engine
from orderbus._runtime.environment import Middleware
from orderbus._runtime.resources import Resource, Resources, resource_of
from orderbus._runtime.stats import DrainReceipt, Stats
from orderbus._runtime.tracing import current_trace
from orderbus._runtime.tx import Tx
from orderbus.abc import Claims, OutboxRow, Receipt
from orderbus.errors import UnavailableError, UsageError

log = logging.getLogger("orderbus")

E = TypeVar("E", bound=Event)
P = ParamSpec("P")
T = TypeVar("T")
Emitted = Event | Sequence[Event] | None
R = TypeVar("R", bound=Emitted)


class Bus:
    """A consumer group: handlers that share one name, one inbox identity and one set of queues.

    `group` is the stable name (lower-case letters, digits, '-', '_'; at most 60). Settings given here win over those of the
    environment, which is read when the bus is opened, not when it is made. `format` is how events are written: "json" or
    "msgpack"; both are always read. Raises UsageError for a wrong name.

    Examples:
        >>> bus = Bus("payments")
    """

    def __init__(
        self, group: str, *, settings: Settings | None = None, format: Format = "json", clock: Callable[[], float] = time.time
    ) -> None:
        if not GROUP.fullmatch(group):
            raise UsageError(
                f"Bus({group!r}): a group's name is lower-case letters, digits, '-' and '_', at most 60", code="OB318"
            )
        if group == "ob":
            raise UsageError(
                "Bus('ob'): the names of the retry ladder's queues begin with 'ob.'; choose another group", code="OB318"
            )
        if format not in ("json", "msgpack"):
            raise UsageError(f'Bus({group!r}): format={format!r} must be "json" or "msgpack"', code="OB319")
        self.group = group
        self._place = f"the bus {group!r} ({line_of_caller(1)})"
        self._given = settings
        self._format: Format = format
        self._clock = clock
        self._handlers: list[Handler] = []
        self._periodics: list[Periodic] = []
        self._resources: dict[type, Resource] = {}
        self._middleware: list[Middleware] = []
        self._new_engine: Callable[..., Engine] = Engine
        """A test has one of its own, on servers of its own."""
        self._engine: Engine | None = None
        self._stack: AsyncExitStack | None = None
        self.receipt: DrainReceipt | None = None
        """What the last stop did; None before."""

    # Definition

    def on(
        self,
        event: type[E],
        *,
        name: str | None = None,
        retry: Retry = DEFAULT_RETRY,
        ordered: bool = False,
        concurrency: int = 10,
        fuse: int = 1,
        timeout: float = 60.0,
        prefetch: int | None = None,
        guard: Guard | None = None,
    ) -> Callable[[Callable[Concatenate[E, P], Awaitable[R]]], Callable[Concatenate[E, P], Awaitable[R]]]:
        """Register an async function as the handler of an event class. The function itself is left as it is.

        `name`: by what the inbox and the queue know it (its topic, unless given). `retry`: what follows a failure.
        `ordered`: each key's events one at a time, in order. `concurrency`: units at a time (1 to 1000). `fuse`: up to so
        many messages share one transaction (1 to 10,000); a failure rolls back and runs them one by one. `timeout`:
        seconds until the handler is cancelled (≤ 1200). `prefetch`: most unsettled deliveries (1 to 65,535; unless given, twice
        what runs at once, or as many as are done within 1500 s: the broker takes back what is held for 30 min).
        `guard`: "inbox" (a row in the handler's transaction; the default where there is a database), "claims" (Redis;
        for handlers that write to no database) or "none". Raises UsageError naming the handler and the fix.
        """
        options = Options(retry, name, ordered, concurrency, fuse, timeout, prefetch, guard)

        def register(function: Callable[Concatenate[E, P], Awaitable[R]]) -> Callable[Concatenate[E, P], Awaitable[R]]:
            self._register(Handler(self.group, function, (event,), options))
            return function

        return register

    @overload
    def on_batch(
        self,
        event: type[E],
        *,
        most: int = 100,
        name: str | None = None,
        retry: Retry = DEFAULT_RETRY,
        concurrency: int = 1,
        timeout: float = 60.0,
        prefetch: int | None = None,
        guard: Guard | None = None,
    ) -> Callable[[Callable[Concatenate[Batch[E], P], Awaitable[R]]], Callable[Concatenate[Batch[E], P], Awaitable[R]]]: ...

    @overload
    def on_batch(
        self,
        *,
        name: str,
        most: int = 100,
        retry: Retry = DEFAULT_RETRY,
        concurrency: int = 1,
        timeout: float = 60.0,
        prefetch: int | None = None,
        guard: Guard | None = None,
    ) -> Callable[[Callable[Concatenate[Batch[E], P], Awaitable[R]]], Callable[Concatenate[Batch[E], P], Awaitable[R]]]: ...

    def on_batch(
        self,
        event: type[E] | None = None,
        *,
        most: int = 100,
        name: str | None = None,
        retry: Retry = DEFAULT_RETRY,
        concurrency: int = 1,
        timeout: float = 60.0,
        prefetch: int | None = None,
        guard: Guard | None = None,
    ) -> Callable[[Callable[Concatenate[Batch[E], P], Awaitable[R]]], Callable[Concatenate[Batch[E], P], Awaitable[R]]]:
        """Register a handler that receives up to `most` events at once, as a Batch sorted by key, in one transaction.

        Each item succeeds unless the handler calls `item.park(reason)` or `item.retry(delay or exception)`. An exception
        rolls everything back and runs the batch's events one by one. The other options are those of `on`.

        Without an event the events are those of the function's own `Batch[A | B]`, with a stable `name=`: all their topics share
        one queue and one transaction, so two answers about one order can be applied by one statement.
        """
        options = Options(retry, name, False, concurrency, most, timeout, prefetch, guard)

        def register(
            function: Callable[Concatenate[Batch[E], P], Awaitable[R]],
        ) -> Callable[Concatenate[Batch[E], P], Awaitable[R]]:
            events = events_of(function) if event is None else (event,)
            self._register(Handler(self.group, function, events, options, batch=True))
            return function

        return register

    def every(self, seconds: float, *, timeout: float = 60.0) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
        """Run an async function every so many seconds (0.01 to 86,400) while the bus is open, in a transaction of its own.

        It takes Tx and resources by type; what it returns is emitted. It runs in every process of the group, so rows are
        claimed with `for update skip locked`. What it raises is logged and rolled back, and the next round comes all the same.
        A stop begins no new round, and cancels one under way only after the grace time.
        """

        def register(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
            self._check_closed("every")
            periodic = Periodic(function, seconds, timeout)
            try:
                resolve_periodic(periodic, Tx, _Anything(self._resources))
            except NameError:
                log.debug("%s: has forward references; checked again at start", periodic.place)
            self._periodics.append(periodic)
            return function

        return register

    def resource(self, function: Callable[[], AsyncIterator[T]]) -> Callable[[], AsyncIterator[T]]:
        """Register an async generator that yields one value: opened at start, closed after the drain, injected by its type."""
        self._check_closed("resource")
        resource = resource_of(function)
        if resource.provides in self._resources:
            raise UsageError(
                f"{resource.place}: this bus has a resource of type {resource.provides.__name__} already", code="OB317"
            )
        self._resources[resource.provides] = resource
        return function

    def middleware(self, middleware: Middleware) -> Middleware:
        """Put a middleware around every unit of deliveries; the first registered is the outermost."""
        self._check_closed("middleware")
        self._middleware.append(middleware)
        return middleware

    # Running

    async def __aenter__(self) -> Bus:
        """Open everything and begin to consume. Raises SettingsError, UsageError, TopologyError or UnavailableError."""
        self._check_closed("async with")
        settings = Settings.load(os.environ, self._given)
        plans = self.plans()
        periodics = self._periodic_plans()
        async with AsyncExitStack() as stack:
            resources = await stack.enter_async_context(Resources(self._resources))
            # Known before it is opened: the first message may be handled while others of its consumers still begin.
            self._engine = self._new_engine(
                self.group,
                settings,
                plans,
                periodics=periodics,
                resources=resources.values,
                middleware=self._middleware,
                form=self._format,
                clock=self._clock,
                rng=random.Random(),  # noqa: S311 - spreads retries, and guards nothing
            )
            try:
                await stack.enter_async_context(self._engine)
            except BaseException:
                self._engine = None
                raise
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Drain, also where the body raised or was cancelled, then close everything. What the stop did is in `receipt`."""
        assert self._stack is not None
        assert self._engine is not None
        stack, engine, self._stack = self._stack, self._engine, None
        try:
            await stack.__aexit__(kind, error, trace)
        finally:
            self.receipt = engine.receipt
            self._engine = None

    async def publish(self, event: Event) -> UUID:
        """Send an event at once and wait for the broker's confirm; its id.

        Gives up what the outbox gives: it is sent whether or not your transaction commits, and when the process dies
        before the confirm nobody sends it again. Raises UnavailableError when the broker is away, did not confirm, or
        (of a class that says `unrouted="keep"`) when nobody is bound to its topic. Cancelled, its outcome is unknown.
        """
        return (await self.publish_many([event]))[0]

    async def publish_many(self, events: Sequence[Event]) -> list[UUID]:
        """Send many events together and wait for all confirms; their ids, in order. As `publish` in everything else.

        It holds all of them in memory: a few hundred at a time are as fast as thousands. Raises UnavailableError that says how
        many were not confirmed, and why the first was not; the others have been sent.
        """
        trace = current_trace()
        rows = [self._open.encoding.row(event, trace=trace) for event in events]
        receipts = await self._open.publish_rows(rows)
        bad = [
            (row, receipt)
            for row, receipt in zip(rows, receipts, strict=True)
            if receipt is not Receipt.CONFIRMED and not (receipt is Receipt.UNROUTABLE and row.unrouted == "drop")
        ]
        if bad:
            handled = [topic for handler in self._handlers for topic in handler.topics]
            raise UnavailableError(_not_confirmed(bad, len(rows), handled))
        return [row.event_id for row in rows]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        """A transaction outside handlers: commits on leaving, rolls back on an exception. Events emitted in it go out after.

        The database ends one that waits for longer than 70 s between two statements, or 10 s more than a handler's `timeout`.
        """
        async with self._open.transaction() as tx:
            yield tx

    @asynccontextmanager
    async def enlist(self, connection: Any) -> AsyncIterator[Tx]:
        """Make the outbox part of a psycopg transaction that your own code owns (asyncio only).

        Leaving inserts the emitted events and runs the deferred writes on your connection; committing stays with you. On
        an exception nothing is inserted.
        """
        async with self._open.enlist(connection) as tx:
            yield tx

    @overload
    async def group_commit(self, work: Callable[[Tx], Awaitable[T]]) -> T: ...

    @overload
    async def group_commit(self, work: Callable[[Tx], T]) -> T: ...

    async def group_commit(self, work: Callable[[Tx], Awaitable[T] | T]) -> T:
        """Run `work(tx)` in a transaction shared with other callers that wait at the same time; its result once committed.

        For writes that arrive by the thousand, such as HTTP requests: a commit costs the same for one row and for a hundred.
        An idle bus commits at once. When the shared transaction fails, each work is run again in one of its own, so `work`
        must do nothing but use its `tx`. Raises what the work or its commit raised; UnavailableError when the database is
        away or 10,000 callers wait. Cancelled before its turn it is not run; later, its outcome is unknown.
        """
        return await self._open.commits().submit(work)

    @property
    def claims(self) -> Claims:
        """The claims keeper (Redis) of the open bus, for idempotency keys of your own. UsageError where there is none."""
        return self._open.servers.claims

    @property
    def stats(self) -> Stats:
        """What the open bus has done since it was opened."""
        return self._open.stats

    @property
    def draining(self) -> bool:
        """Whether the bus is closed or has begun to stop; a readiness probe answers no then."""
        return self._stack is None or self._engine is None or self._engine.draining

    @property
    def consuming(self) -> bool:
        """Whether each of its queues is consumed at this moment; False also while the bus is closed or stops.

        For a page or a gauge. A lost connection comes back by itself, so don't restart for it; one that fell silent is noticed
        after three heartbeats.
        """
        return self._engine is not None and self._engine.is_consuming

    async def drain(self) -> None:
        """Begin the stop and wait until the started work is finished; `async with` does it on leaving."""
        await self._open.drain()

    # Looking

    @property
    def handlers(self) -> Sequence[Handler]:
        """The registered handlers."""
        return tuple(self._handlers)

    def plans(self) -> list[tuple[Handler, Plan]]:
        """Every handler with what its signature asks for. Raises UsageError for a wrong one."""
        found = []
        for handler in self._handlers:
            try:
                found.append((handler, resolve(handler, Tx, self._resources)))
            except NameError as error:
                raise UsageError(
                    f"{handler.place}: its annotations name something that can't be found: {error}", code="OB305"
                ) from error
        return found

    def _periodic_plans(self) -> list[tuple[Periodic, Plan]]:
        found = []
        for periodic in self._periodics:
            try:
                found.append((periodic, resolve_periodic(periodic, Tx, self._resources)))
            except NameError as error:
                raise UsageError(
                    f"{periodic.place}: its annotations name something that can't be found: {error}", code="OB305"
                ) from error
        return found

    def topology(self) -> Topology:
        """The exchanges, queues and bindings that this group needs."""
        return topology_for(queue_needs(self._handlers))

    def _register(self, handler: Handler) -> None:
        self._check_closed(handler.place)
        check_options(handler)
        check_together(handler, self._handlers)
        try:
            resolve(handler, Tx, _Anything(self._resources))
        except NameError:
            log.debug("%s: has forward references; checked again at start", handler.place)
        self._handlers.append(handler)

    def _check_closed(self, what: str) -> None:
        if self._engine is not None:
            raise UsageError(f"{what}: {self._place} is open already; register everything before `async with bus`", code="OB402")

    @property
    def _open(self) -> Engine:
        if self._engine is None:
            raise UsageError(f"{self._place} is not open; use it inside `async with bus:`", code="OB401")
        return self._engine


class _Anything(dict[type, object]):
    """At definition a resource may not be registered yet: any class that is not a builtin passes; start checks again."""

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or (
            isinstance(kind, type) and kind.__module__ not in ("builtins", "typing") and not issubclass(kind, Event)
        )


def _not_confirmed(bad: Sequence[tuple[OutboxRow, Receipt]], count: int, handled: Sequence[str]) -> str:
    row, receipt = bad[0]
    if receipt is Receipt.UNROUTABLE:
        near = nearest(row.topic, handled)
        meant = f"; or did you mean {near!r}, which this bus handles?" if near not in (None, row.topic) else ""
        why = f'no queue is bound to {row.topic!r}: start its consumers first, or declare unrouted="drop"{meant}'
    else:
        why = f"the broker did not confirm event {row.event_id}: {receipt.value}"
    return why if count == 1 else f"{len(bad)} of {count} events were not confirmed; the first: {why}"


def new_id() -> UUID:
    """A new UUIDv7 of now: ids made later sort later, which keeps indexes small and fast. Random bits from the system."""
    return uuid7(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10), "big"))
