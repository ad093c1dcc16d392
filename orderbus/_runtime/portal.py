"""Trio and asyncio-only drivers: the drivers live on one asyncio thread, and every batch crosses to it once.

Each class here has the methods of its protocol and nothing else; a call crosses, waits, and brings the result back.
A cancelled call cancels the task on the other side and waits for its end, so that nothing runs on unseen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import trio

from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.topology import Topology
from orderbus.abc import (
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

T = TypeVar("T")


class Portal:
    """A thread with an asyncio loop, called from trio."""

    def __init__(self, inner: anyio.from_thread.BlockingPortal) -> None:
        self._inner = inner
        self._here = trio.lowlevel.current_trio_token()

    async def call(
        self, function: Callable[..., Awaitable[T]], *arguments: Any, undo: Callable[[T], Awaitable[object]] | None = None
    ) -> T:
        """Run a coroutine function over there and wait for its result. Cancellation crosses too.

        `undo` is given the result of a call that had succeeded when its caller was cancelled, so that nothing is left open.
        """
        future: Future[T] = self._inner.start_task_soon(function, *arguments)
        done = self._told(future)
        try:
            await done.wait()
        except BaseException:
            future.cancel()
            with anyio.CancelScope(shield=True):
                await done.wait()
                if undo is not None and not future.cancelled() and future.exception() is None:
                    await self._told(self._inner.start_task_soon(undo, future.result())).wait()
            raise
        try:
            return future.result()
        except CancelledError:
            raise UsageError("the asyncio thread was stopped while a call was under way") from None

    def _told(self, future: Future[Any]) -> anyio.Event:
        done = anyio.Event()
        future.add_done_callback(lambda _: self._here.run_sync_soon(done.set))
        return done

    def soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a plain function over there, soon; nobody waits."""
        self._inner.start_task_soon(function, *arguments)

    @asynccontextmanager
    async def entered(self, manager: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
        """Enter a context manager over there, leave it in the same task."""
        async with anyio.create_task_group() as hosts:
            entered: Future[T] = Future()
            leave = await self.call(_new_event)

            async def host() -> None:
                try:
                    async with manager as value:
                        entered.set_result(value)
                        await leave.wait()
                except BaseException as error:
                    if not entered.done():
                        entered.set_exception(error)
                    raise

            ready = self._told(entered)

            async def hosted() -> None:
                await self.call(host)

            hosts.start_soon(hosted)
            await ready.wait()
            try:
                yield entered.result()
            finally:
                self.soon(leave.set)


async def _new_event() -> anyio.Event:
    return anyio.Event()


@asynccontextmanager
async def open_portal() -> AsyncIterator[Portal]:
    """A new asyncio thread, ended on leaving."""
    manager = anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": False})
    inner = await anyio.to_thread.run_sync(manager.__enter__)
    try:
        yield Portal(inner)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(manager.__exit__, None, None, None)


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
        self._settled: list[tuple[Incoming, Settlement]] = []
        self._crossing = False

    async def receive(self) -> Sequence[Incoming]:
        return await self._portal.call(self._inner.receive)

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        self._settled.append((delivery, how))
        if not self._crossing:
            self._crossing = True
            self._portal.soon(self._cross)

    def _cross(self) -> None:
        self._crossing = False
        settled, self._settled = self._settled, []
        for delivery, how in settled:
            self._inner.settle(delivery, how)

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
            "bus.enlist() works under asyncio only: psycopg's connections belong to an asyncio loop; use bus.transaction()"
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
        raise UsageError("tx.connection works under asyncio only: it belongs to the asyncio thread; use tx.execute(…)")

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

    async def read(self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int) -> OutboxPage:
        return await self._portal.call(self._inner.read, buckets, floor, limit, limit_bytes)

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        return await self._portal.call(self._inner.delete, rows)

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        await self._portal.call(self._inner.set_aside, stuck)

    async def due(self, buckets: Sequence[int], limit: int) -> Sequence[OutboxRow]:
        return await self._portal.call(self._inner.due, buckets, limit)
