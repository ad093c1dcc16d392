"""The servers of a run: the memory adapters, which write into the ledger what takes effect in them, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from orderbus._core.message import Incoming, Outgoing, Receipt
from orderbus.abc import ClaimAnswer, ClaimState, Deferred, InboxEntry, OutboxRow
from orderbus.adapters.memory import MemoryBroker, MemoryClaims, MemoryStore
from orderbus.adapters.memory.queue import MemoryQueue
from orderbus.adapters.memory.store import MemoryTransaction
from orderbus.adapters.memory.subscription import MemorySubscription
from orderbus.testing.sim.ledger import Ledger, Params

__all__ = ["Answer", "LedgerBroker", "LedgerClaims", "LedgerStore", "LedgerTransaction"]

Answer = Callable[[str, Params], Sequence[tuple[Any, ...]]]
"""The rows of a query."""


class LedgerBroker(MemoryBroker):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def _accept(self, message: Outgoing, queues: tuple[MemoryQueue, ...], now: float) -> Receipt:
        receipt = super()._accept(message, queues, now)
        if receipt is Receipt.CONFIRMED:
            self._ledger.accepted(message, [queue.name for queue in queues])
        return receipt

    def expects_directly(self, batch: Sequence[Outgoing]) -> None:
        for message in batch:
            self._ledger.publishes_directly(message.message_id)

    def acked(self, queue: str, delivery: Incoming) -> None:
        self._ledger.acked(queue, delivery.properties.message_id)

    def drop(self, queue: str, subscription: MemorySubscription) -> None:
        """A consumer's connection ends: what it holds goes back into the queue, and counts."""
        if (source := self._queues.get(queue)) is not None:
            self._end(source, subscription, f"the connection that consumed {queue!r} was lost")
            # Its task may be dead, and would never say that it has been woken.
            source.woken(subscription)
            source.notify()

    def queue_names(self) -> list[str]:
        return list(self._queues)

    def is_empty(self, is_asked: Callable[[str], bool]) -> bool:
        """Whether these queues hold nothing, and no consumer of any holds anything."""
        self.expire()
        return all(
            not (is_asked(name) and (len(queue) or queue.held)) and not any(consumer.holds for consumer in queue.consumers)
            for name, queue in self._queues.items()
        )

    def left(self, is_asked: Callable[[str], bool]) -> list[str]:
        """What these queues hold, in words."""
        return [f"{len(queue)} in {name}" for name, queue in self._queues.items() if is_asked(name) and len(queue)]


class LedgerStore(MemoryStore):
    """A store that takes SQL for what it is: a statement of a transaction, which is committed with it or not at all."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self.answer: Answer

    def transaction(self) -> LedgerTransaction:
        return LedgerTransaction(self)

    def _commit(self, transaction: MemoryTransaction, emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry]) -> None:
        assert isinstance(transaction, LedgerTransaction)
        super()._commit(transaction, emitted, forget)
        forgotten = {(entry.event_id, entry.consumer) for entry in forget}
        entered = [InboxEntry(*key, body_hash) for key, body_hash in transaction.entered.items() if key not in forgotten]
        self._ledger.committed(entered, transaction.statements, emitted)


class LedgerTransaction(MemoryTransaction):
    def __init__(self, store: LedgerStore) -> None:
        super().__init__(store)
        self._answer = store.answer
        self.statements: list[tuple[str, Params]] = []

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        await checkpoint()
        self.statements.append((sql, params))
        rows = self._answer(sql, params)
        return rows, len(rows) or 1

    def abandon(self) -> None:
        """Roll back, as the server does when the connection is gone."""
        self._store._end(self)

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        self.statements += [(item.sql, item.params) for item in deferred]
        await super().commit((), emitted, forget)


class LedgerClaims(MemoryClaims):
    """`holder` says who asks: one life of one process."""

    def __init__(self, ledger: Ledger, shared: MemoryClaims, *, prefix: str = "", holder: object = None) -> None:
        super().__init__(shared.table, prefix=prefix)
        self._ledger = ledger
        self._holder = holder

    def prefixed(self, prefix: str) -> LedgerClaims:
        return LedgerClaims(self._ledger, self, prefix=prefix, holder=self._holder)

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        answers = await super().claim(keys, token, lease_ms)
        until = anyio.current_time() + lease_ms / 1000
        for (key, _), answer in zip(keys, answers, strict=True):
            if answer.state is ClaimState.GRANTED:
                self._ledger.granted(self._prefix + key, (self._holder, token), until)
        return answers

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        stored = await super().complete(answers, token, keep_ms)
        until = anyio.current_time() + keep_ms / 1000
        for (key, _), is_stored in zip(answers, stored, strict=True):
            self._ledger.completed(self._prefix + key, (self._holder, token), until, is_stored=is_stored)
        return stored

    async def release(self, keys: Sequence[str], token: str) -> None:
        await super().release(keys, token)
        for key in keys:
            self._ledger.released(self._prefix + key, (self._holder, token))
