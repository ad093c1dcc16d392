"""The servers of a TestBus: broker and claims in memory, a store in memory or the user's own PostgreSQL; all keep the record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import sniffio

from orderbus import UsageError
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.parked import Parked, is_dead_letter_queue, read_parked
from orderbus._core.topology import EVENTS_EXCHANGE, RETRY_STEPS_S, retry_exchange
from orderbus._runtime.opening import open_store, scheme_of
from orderbus._runtime.portal import PortalStore, open_portal
from orderbus.abc import Broker, Deferred, InboxEntry, OutboxRow, Store, Transaction, Verdict
from orderbus.adapters.memory import MemoryClaims
from orderbus.adapters.memory.queue import MemoryQueue, Stored
from orderbus.adapters.memory.store import MemoryTransaction
from orderbus.testing.clock import is_virtual
from orderbus.testing.faults import Faults
from orderbus.testing.record import Record
from orderbus.testing.sim.faulty import FaultyBroker, FaultyClaims, FaultyStore, FaultySubscription
from orderbus.testing.sim.ledger import Ledger, Params
from orderbus.testing.sim.servers import Answer, LedgerBroker, LedgerClaims, LedgerStore, LedgerTransaction

__all__ = ["Servers", "open_servers"]

_RETRY_QUEUES = {retry_exchange(step) for step in RETRY_STEPS_S}


class Servers(msgspec.Struct):
    record: Record
    broker: Broker
    store: Store
    claims: FaultyClaims
    """These three as the buses see them: faults may happen to their calls."""
    queues: WatchedBroker
    rows: WatchedStore | RecordedStore


@asynccontextmanager
async def open_servers(
    record: Record, faults: Faults, database_url: str | None, answer: Answer | None, pool_size: int
) -> AsyncIterator[Servers]:
    """Raises UsageError for what can't be kept, and UnavailableError where the database is away."""
    queues = WatchedBroker(record)
    broker = _FaultyBroker(queues, faults)
    claims = FaultyClaims(LedgerClaims(Ledger(), MemoryClaims()), faults)
    if database_url is None:
        store = WatchedStore(record, answer or _no_sql)
        yield Servers(record, broker, FaultyStore(store, faults), claims, queues, store)
        return
    if answer is not None:
        raise UsageError(
            "TestBus: answer= stands in for a database; leave it out where database_url= names a real one", code="OB904"
        )
    if scheme_of(database_url) == "memory":
        raise UsageError("TestBus: the store is in memory unless database_url= says otherwise; leave it out", code="OB904")
    if is_virtual():
        raise UsageError(
            "TestBus: a real database needs real time, and this event loop has virtual time, in which every limit around a socket "
            "runs out at once; run this test in real time (without the virtual anyio_backend), or leave database_url= out",
            code="OB905",
        )
    async with AsyncExitStack() as stack:
        manager = open_store(database_url, name="testbus", pool_size=pool_size)
        inner: Store
        if sniffio.current_async_library() == "trio":
            portal = await stack.enter_async_context(open_portal())
            inner = PortalStore(portal, await stack.enter_async_context(portal.entered(manager)))
        else:
            inner = await stack.enter_async_context(manager)
        real = RecordedStore(inner, record)
        yield Servers(record, broker, real, claims, queues, real)


class WatchedBroker(LedgerBroker):
    """Events that nobody here consumes are taken and forgotten: their consumers are in other tests."""

    def __init__(self, record: Record) -> None:
        super().__init__(Ledger())
        self._record = record

    def _accept(self, message: Outgoing, queues: tuple[MemoryQueue, ...], now: float) -> Receipt:
        receipt = super()._accept(message, queues, now)
        if message.exchange == EVENTS_EXCHANGE and receipt is not Receipt.REFUSED:
            self._record.published(message)
            if receipt is Receipt.UNROUTABLE:
                return Receipt.CONFIRMED
        return receipt

    def forget(self, stored: Stored) -> None:
        super().forget(stored)
        self._record.wake()

    def unfinished(self) -> list[str]:
        """What is in the queues or in the hands of a consumer, in words."""
        self.expire()
        found = []
        for name, queue in self._queues.items():
            if held := sum(consumer.holds for consumer in queue.consumers):
                found.append(f"{held} in the hands of {name}")
            if ready := len(queue) + len(queue.held):
                if name in _RETRY_QUEUES:
                    found.append(f"{ready} waiting for a retry, in {name}")
                elif not is_dead_letter_queue(name):
                    found.append(f"{ready} in the queue {name}")
        return found

    def parked(self) -> list[Parked]:
        names = [name for name in self._queues if is_dead_letter_queue(name)]
        return [read_parked(incoming) for name in names for incoming in self.messages(name)]


class _FaultyBroker(FaultyBroker):
    """Its subscriptions are left in earnest: the simulator's are not, for its processes die."""

    @asynccontextmanager
    async def subscribe(self, queue: str, *, prefetch: int) -> AsyncIterator[FaultySubscription]:
        async with self._broker.subscribe(queue, prefetch=prefetch) as opened:
            subscription = FaultySubscription(opened, self._victim, self._broker, queue)
            try:
                yield subscription
            finally:
                subscription.arrive()
                subscription.lose()


class WatchedStore(LedgerStore):
    """In memory. SQL is written down and answered, as in the simulator."""

    def __init__(self, record: Record, answer: Answer) -> None:
        super().__init__(Ledger())
        self._record = record
        self.answer = answer

    def transaction(self) -> WatchedTransaction:
        return WatchedTransaction(self)

    async def unfinished(self) -> list[str]:
        outbox = self.outbox
        found = [f"{len(rows)} in the outbox"] if (rows := outbox.rows()) else []
        found += [f"{row.topic} scheduled for {_time(row.due_at_ms)}" for row in outbox.scheduled()]
        return found + [f"{one.row.topic} stuck in the outbox: {one.reason}" for one in outbox.stuck()]

    def _commit(self, transaction: MemoryTransaction, emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry]) -> None:
        assert isinstance(transaction, WatchedTransaction)
        super()._commit(transaction, emitted, forget)
        executed = transaction.statements[: len(transaction.statements) - len(transaction.deferred)]
        forgotten = {(entry.event_id, entry.consumer) for entry in forget}
        self._record.applied.update(
            (consumer, event_id) for event_id, consumer in transaction.entered if (event_id, consumer) not in forgotten
        )
        self._record.committed([sql for sql, _ in executed], transaction.deferred, emitted)


class WatchedTransaction(LedgerTransaction):
    deferred: Sequence[Deferred] = ()

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        try:
            for item in deferred:
                self._answer(item.sql, item.params)
        except BaseException:
            self.abandon()
            raise
        self.deferred = deferred
        await super().commit(deferred, emitted, forget)


class RecordedStore:
    """The user's own database. Implements `orderbus.abc.Store`."""

    def __init__(self, inner: Store, record: Record) -> None:
        self._inner = inner
        self._record = record
        self.outbox = inner.outbox

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> Transaction:
        return _RecordedTransaction(await self._inner.begin(inbox), self._record)

    def enlist(self, connection: Any) -> Transaction:
        return _RecordedTransaction(self._inner.enlist(connection), self._record, is_enlisted=True)

    async def check(self) -> None:
        await self._inner.check()

    async def maintain(self, window_s: float) -> None:
        await self._inner.maintain(window_s)

    async def unfinished(self) -> list[str]:
        transaction = await self._inner.begin()
        try:
            rows, _ = await transaction.execute(_UNFINISHED, ())
        finally:
            await transaction.rollback()
        return [text for (text,) in rows]


_UNFINISHED = """\
select count(*) || ' ' || topic || ' in the outbox' from orderbus.outbox group by topic
union all select topic || ' scheduled for ' || due_at from orderbus.scheduled
union all select topic || ' stuck in the outbox: ' || reason from orderbus.stuck"""


class _RecordedTransaction:
    """Events of an enlisted one count when they are published: its owner may still roll back."""

    def __init__(self, inner: Transaction, record: Record, *, is_enlisted: bool = False) -> None:
        self._inner = inner
        self._record = record
        self._is_enlisted = is_enlisted
        self._statements: list[str] = []
        self.verdicts: Sequence[Verdict] = inner.verdicts

    @property
    def connection(self) -> Any:
        return self._inner.connection

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        self._statements.append(str(sql))
        return await self._inner.execute(sql, params)

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        await self._inner.commit(deferred, emitted, forget)
        self._record.committed(self._statements, deferred, () if self._is_enlisted else emitted)

    async def rollback(self) -> None:
        await self._inner.rollback()


def _time(unix_ms: int | None) -> str:
    return datetime.fromtimestamp((unix_ms or 0) / 1000, UTC).isoformat(sep=" ", timespec="milliseconds")


def _no_sql(sql: str, params: Params) -> Sequence[tuple[Any, ...]]:
    raise UsageError(
        f"there is no database for {' '.join(str(sql).split())[:80]!r}: give the test one, TestBus(bus, database_url=…), or have "
        f"statements written down and answered, TestBus(bus, answer=lambda sql, params: [])",
        code="OB906",
    )
