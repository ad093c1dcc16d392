"""A store inside the process: inbox and outbox with the guarantees of a database, but no SQL, and nothing survives.

A commit is one step that no other task can see half done. That is what makes it atomic, and why ids follow commit order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
from anyio.lowlevel import checkpoint

from orderbus.abc import Deferred, InboxEntry, OutboxRow, Verdict
from orderbus.adapters.memory.outbox import MemoryOutbox
from orderbus.adapters.memory.shared import SharedByName
from orderbus.errors import TransientError, UsageError

__all__ = ["MemoryStore", "MemoryTransaction", "open_store"]

LOCK_TIMEOUT_S = 10.0

_NO_SQL = "the memory store has no SQL; set ORDERBUS_DATABASE_URL to postgresql://… or embedded"

_Key = tuple[UUID, str]


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[MemoryStore]:
    """Open a memory store: `memory://` makes one of your own, `memory://NAME` shares the one of that name in this process.

    A shared store and its content live as long as somebody has it open, within one event loop.
    """
    with stores.open(url) as store:
        yield store


class MemoryStore:
    """Implements `orderbus.abc.Store`. Made within a running event loop, by whose clock leases and due times run."""

    def __init__(self) -> None:
        self._outbox = MemoryOutbox()
        self._handled: dict[_Key, _Handled] = {}
        self._open: dict[_Key, MemoryTransaction] = {}
        self._window_s = 0.0

    @property
    def outbox(self) -> MemoryOutbox:
        return self._outbox

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> MemoryTransaction:
        """Begin a transaction with these inbox entries, one verdict each, in order.

        Where an open transaction holds one of them, waits for its end, as PostgreSQL does: a commit makes it a duplicate, a
        rollback leaves it to us. Raises TransientError after LOCK_TIMEOUT_S of that. A cancelled call leaves nothing.
        """
        transaction = self.transaction()
        verdicts = [Verdict.NEW] * len(inbox)
        try:
            await checkpoint()
            # In the same order everywhere: two transactions that want the same two entries can't then wait for each other.
            for at in sorted(range(len(inbox)), key=lambda at: (inbox[at].event_id, inbox[at].consumer)):
                verdicts[at] = await self._enter(transaction, inbox[at])
        except BaseException:
            self._end(transaction)
            raise
        transaction.verdicts = verdicts
        return transaction

    def transaction(self) -> MemoryTransaction:
        """An open transaction that has entered nothing yet. A simulated store has transactions of its own kind."""
        return MemoryTransaction(self)

    def enlist(self, connection: Any) -> MemoryTransaction:
        """Raises UsageError: there is no connection to enlist."""
        raise UsageError(_NO_SQL, code="OB408")

    async def check(self) -> None:
        """There is no schema that could be missing."""
        await checkpoint()

    async def maintain(self, window_s: float) -> None:
        """Forget the inbox entries that were handled longer ago than the longest dedupe window of those who share it."""
        await checkpoint()
        self._window_s = max(self._window_s, window_s)
        before = anyio.current_time() - self._window_s
        while self._handled:
            oldest = next(iter(self._handled))  # insertion order is the order of handling
            if self._handled[oldest].at >= before:
                break
            del self._handled[oldest]

    def handled(self) -> list[InboxEntry]:
        """What is in the inbox, oldest first."""
        return [InboxEntry(event_id, consumer, entry.body_hash) for (event_id, consumer), entry in self._handled.items()]

    async def _enter(self, transaction: MemoryTransaction, entry: InboxEntry) -> Verdict:
        key = (entry.event_id, entry.consumer)
        while (holder := self._open.get(key)) is not None and holder is not transaction:
            with anyio.move_on_after(LOCK_TIMEOUT_S) as waiting:
                await holder.ended.wait()
            if waiting.cancelled_caught:
                raise TransientError(
                    f"another transaction has been handling event {entry.event_id} for {entry.consumer!r} "
                    f"for more than {LOCK_TIMEOUT_S:g} s"
                )
        known = transaction.entered.get(key)
        if known is None and key in self._handled:
            known = self._handled[key].body_hash
        if known is None:
            self._open[key] = transaction
            transaction.entered[key] = entry.body_hash
            return Verdict.NEW
        return Verdict.DUPLICATE if known == entry.body_hash else Verdict.CONFLICT

    def _commit(self, transaction: MemoryTransaction, emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry]) -> None:
        self._outbox.insert(emitted)
        forgotten = {(entry.event_id, entry.consumer) for entry in forget}
        for key in forgotten:
            self._handled.pop(key, None)
        now = anyio.current_time()
        for key, body_hash in transaction.entered.items():
            if key not in forgotten:
                self._handled[key] = _Handled(body_hash, now)

    def _end(self, transaction: MemoryTransaction) -> None:
        for key in transaction.entered:
            self._open.pop(key, None)
        transaction.entered.clear()
        transaction.ended.set()


class MemoryTransaction:
    """Implements `orderbus.abc.Transaction`: what it was begun with and what it emits; nothing is visible before the commit."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.verdicts: Sequence[Verdict] = ()
        self.entered: dict[_Key, int] = {}
        """The inbox entries that this transaction inserted, with their body's hash."""
        self.ended = anyio.Event()

    @property
    def connection(self) -> Any:
        """Raises UsageError: there is no connection."""
        raise UsageError(_NO_SQL, code="OB408")

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        """Raises UsageError: there is no SQL."""
        raise UsageError(_NO_SQL, code="OB408")

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        """Make the inbox entries and the emitted rows visible at once.

        Where it raises, or is cancelled, the transaction is rolled back: UsageError for deferred SQL or a transaction that had
        ended before, UnavailableError where the outbox is full.
        """
        if self.ended.is_set():
            raise UsageError(
                "the transaction has ended; use tx only inside the handler or block that it was given to", code="OB405"
            )
        try:
            if deferred:
                raise UsageError(_NO_SQL, code="OB408")
            await checkpoint()
            self._store._commit(self, emitted, forget)
        finally:
            self._store._end(self)

    async def rollback(self) -> None:
        """Leave nothing behind; whoever waits for the same inbox entries goes on. After the end it does nothing."""
        self._store._end(self)


class _Handled:
    __slots__ = ("at", "body_hash")

    def __init__(self, body_hash: int, at: float) -> None:
        self.body_hash = body_hash
        self.at = at


stores = SharedByName("store", MemoryStore)
