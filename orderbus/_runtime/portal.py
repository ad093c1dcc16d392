"""Trio and asyncio-only drivers: the drivers live on one asyncio thread, and every batch crosses to it once.

Each class here has the methods of its protocol and nothing else; a call crosses, waits, and brings the result back.
A cancelled call cancels the task on the other side and waits for its end, so that nothing runs on unseen.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.to_thread

from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.topology import Topology
from orderbus.abc import (
    Backlog,
    Broker,
    ClaimAnswer,
    Claims,
    Deferred,
    InboxEntry,
    OutboxPage,
    OutboxRow,
    OutboxStore,
    Store,
    Stuck,
    Subscription,
    Transaction,
    Verdict,
)  # fmt: skip
from orderbus.errors import UsageError

if TYPE_CHECKING:
    import trio

T = TypeVar("T")


class Portal:
    """A thread with an asyncio loop, called from trio."""

    def __init__(self, inner: anyio.from_thread.BlockingPortal, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop
        import trio  # an optional package; whoever makes a portal runs on it

        self._here = trio.lowlevel.current_trio_token()

    async def call(
        self, function: Callable[..., Awaitable[T]], *arguments: Any, undo: Callable[[T], Awaitable[object]] | None = None
    ) -> T:
        """Run a coroutine function over there and wait for its end. Cancellation crosses too.

        `undo` is given the result of a call that had succeeded when its caller was cancelled, so that nothing is left open.
        """
        crossing: _Crossing[T] = _Crossing(function, arguments)
        self._inner.start_task_soon(crossing.run, self._here)
        try:
            await crossing.ended.wait()
        except BaseException:
            await self._recall(crossing)
            if undo is not None and crossing.has_result:
                with anyio.CancelScope(shield=True):
                    await self.call(undo, crossing.result)
            raise
        return crossing.outcome()

    def soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a plain function over there, soon; nobody waits. What it raises, that loop's exception handler logs."""
        self._loop.call_soon_threadsafe(function, *arguments)

    @asynccontextmanager
    async def entered(self, manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        """Enter a context manager over there, leave it in the same task. No task group of ours stands around the body."""
        begun = anyio.Event()
        entered: list[tuple[T, anyio.Event]] = []

        async def host() -> None:
            try:
                async with manager as value:
                    leave = anyio.Event()
                    entered.append((value, leave))
                    self._here.run_sync_soon(begun.set)
                    await leave.wait()
            finally:
                self._here.run_sync_soon(begun.set)

        crossing = _Crossing(host, ())
        self._inner.start_task_soon(crossing.run, self._here)
        try:
            await begun.wait()
            if not entered:
                await crossing.ended.wait()
        except BaseException:
            await self._recall(crossing)
            raise
        if not entered:
            crossing.outcome()
        value, leave = entered[0]
        try:
            yield value
        finally:
            self.soon(leave.set)
            with anyio.CancelScope(shield=True):
                await crossing.ended.wait()
            crossing.outcome()

    async def _recall(self, crossing: _Crossing[Any]) -> None:
        """Cancel what runs over there, and wait until it has ended: nothing runs on unseen."""
        self.soon(crossing.cancel)
        with anyio.CancelScope(shield=True):
            await crossing.ended.wait()

    def broker(self, inner: Broker) -> Broker:
        """A broker of the asyncio thread, to be called from here."""
        return PortalBroker(self, inner)

    def store(self, inner: Store) -> Store:
        return PortalStore(self, inner)

    def claims(self, inner: Claims) -> Claims:
        return PortalClaims(self, inner)


class _Crossing(Generic[T]):
    """One call over there: its cancel scope, and what became of it."""

    def __init__(self, function: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self._scope: anyio.CancelScope | None = None
        self._is_cancelled = False
        self._error: Exception | None = None
        self.result: Any = None
        self.has_result = False
        self.ended = anyio.Event()

    async def run(self, caller: trio.lowlevel.TrioToken) -> None:
        try:
            with anyio.CancelScope() as self._scope:
                if self._is_cancelled:
                    self._scope.cancel()
                self.result = await self._function(*self._arguments)
                self.has_result = True
        except Exception as error:  # the caller raises it
            self._error = error
        finally:
            caller.run_sync_soon(self.ended.set)

    def cancel(self) -> None:
        """To be called over there."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def outcome(self) -> T:
        if self._error is not None:
            raise self._error
        if not self.has_result:
            raise UsageError("the asyncio thread was stopped while a call was under way", code="OB412")
        return cast(T, self.result)


@asynccontextmanager
async def open_portal() -> AsyncIterator[Portal]:
    """A new asyncio thread, ended on leaving."""
    manager = anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": False})
    inner = await anyio.to_thread.run_sync(manager.__enter__)
    try:
        yield Portal(inner, await anyio.to_thread.run_sync(inner.call, _running_loop))
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(manager.__exit__, None, None, None)


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


class PortalBroker:
    def __init__(self, portal: Portal, inner: Broker) -> None:
        self._portal = portal
        self._inner = inner

    async def apply(self, topology: Topology) -> None:
        await self._portal.call(self._inner.apply, topology)

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        return await self._portal.call(self._inner.publish, batch)

    @asynccontextmanager
    async def subscribe(self, queue: str, *, prefetch: int) -> AsyncIterator[Subscription]:
        async with self._portal.entered(self._inner.subscribe(queue, prefetch=prefetch)) as subscription:
            yield PortalSubscription(self._portal, subscription)

    async def depth(self, queue: str) -> int:
        return await self._portal.call(self._inner.depth, queue)


class PortalSubscription:
    """Settlements are collected here and cross together, at the latest with the next call."""

    def __init__(self, portal: Portal, inner: Subscription) -> None:
        self._portal = portal
        self._inner = inner
        self._settled: deque[tuple[Incoming, Settlement]] = deque()
        """Filled by this thread and emptied by the other: only its atomic ends are touched."""
        self._crossing = False

    async def receive(self) -> Sequence[Incoming]:
        return await self._portal.call(self._inner.receive)

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        self._settled.append((delivery, how))
        if not self._crossing:
            self._crossing = True
            self._portal.soon(self._cross)

    def tried(self, delivery: Incoming) -> None:
        self._portal.soon(self._inner.tried, delivery)

    def _cross(self) -> None:
        self._crossing = False  # first: what is added from here on asks for a crossing of its own
        while self._settled:
            self._inner.settle(*self._settled.popleft())

    async def pause(self) -> None:
        await self._portal.call(self._inner.pause)

    async def flush(self) -> None:
        async def flush() -> None:
            self._cross()
            await self._inner.flush()

        await self._portal.call(flush)


class PortalClaims:
    def __init__(self, portal: Portal, inner: Claims) -> None:
        self._portal = portal
        self._inner = inner

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        return await self._portal.call(self._inner.claim, keys, token, lease_ms)

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        return await self._portal.call(self._inner.complete, answers, token, keep_ms)

    async def release(self, keys: Sequence[str], token: str) -> None:
        await self._portal.call(self._inner.release, keys, token)


class PortalStore:
    def __init__(self, portal: Portal, inner: Store) -> None:
        self._portal = portal
        self._inner = inner
        self.outbox: OutboxStore = PortalOutbox(portal, inner.outbox)

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> Transaction:
        inner = await self._portal.call(self._inner.begin, inbox, undo=lambda transaction: transaction.rollback())
        return PortalTransaction(self._portal, inner)

    def enlist(self, connection: Any) -> Transaction:
        raise UsageError(
            "bus.enlist() works under asyncio only: psycopg's connections belong to an asyncio loop; use bus.transaction()",
            code="OB411",
        )

    async def check(self) -> None:
        await self._portal.call(self._inner.check)

    async def maintain(self, window_s: float) -> None:
        await self._portal.call(self._inner.maintain, window_s)


class PortalTransaction:
    def __init__(self, portal: Portal, inner: Transaction) -> None:
        self._portal = portal
        self._inner = inner
        self.verdicts: Sequence[Verdict] = inner.verdicts

    @property
    def connection(self) -> Any:
        raise UsageError(
            "tx.connection works under asyncio only: it belongs to the asyncio thread; use tx.execute(…)", code="OB411"
        )

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        return await self._portal.call(self._inner.execute, sql, params)

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        await self._portal.call(self._inner.commit, deferred, emitted, forget)

    async def rollback(self) -> None:
        await self._portal.call(self._inner.rollback)


class PortalOutbox:
    def __init__(self, portal: Portal, inner: OutboxStore) -> None:
        self._portal = portal
        self._inner = inner

    async def lease(self, owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        return await self._portal.call(self._inner.lease, owner, lease_s, keep)

    async def read(
        self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None
    ) -> OutboxPage:
        return await self._portal.call(self._inner.read, buckets, floor, limit, limit_bytes, up_to)

    async def backlog(self, buckets: Sequence[int], floor: int) -> Backlog:
        return await self._portal.call(self._inner.backlog, buckets, floor)

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        return await self._portal.call(self._inner.delete, rows)

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        await self._portal.call(self._inner.set_aside, stuck)

    async def due(self, buckets: Sequence[int], limit: int, limit_bytes: int) -> Sequence[OutboxRow]:
        return await self._portal.call(self._inner.due, buckets, limit, limit_bytes)
