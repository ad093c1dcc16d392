"""What a process sees of the servers: each call may come late, get lost, lose its answer, or be the last that the process makes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol, TypeVar

import anyio

from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.topology import Topology
from orderbus.abc import Backlog, ClaimAnswer, Deferred, InboxEntry, OutboxPage, OutboxRow, Stuck, Verdict
from orderbus.adapters.memory.outbox import MemoryOutbox
from orderbus.adapters.memory.subscription import MemorySubscription
from orderbus.errors import TransientError, UnavailableError
from orderbus.testing.sim.decisions import Decision, Fault
from orderbus.testing.sim.servers import LedgerBroker, LedgerClaims, LedgerStore, LedgerTransaction

__all__ = ["DIRECT", "FaultyBroker", "FaultyClaims", "FaultyStore", "Victim"]

T = TypeVar("T")


DIRECT: ContextVar[bool] = ContextVar("direct", default=False)
"""Whether this task publishes past the outbox, as its program wants it."""


class Victim(Protocol):
    """The process on whose behalf a call is made."""

    subscriptions: dict[FaultySubscription, None]
    transactions: dict[FaultyTransaction, None]

    def at(self, operation: str) -> Decision | None:
        """What happens to this call. Raises UnavailableError where the process is dead."""

    def die(self, restart_in_s: float) -> None:
        """Die at once: nothing of it runs any more, and its connections end."""

    def later(self, delay_s: float, call: Callable[[], Awaitable[object]]) -> None:
        """Have the servers do what the process had sent before it died."""


async def call(victim: Victim, operation: str, request: Callable[[], Awaitable[T]]) -> T:
    """Make a call to a server, and let happen to it what was decided."""
    decision = victim.at(operation)
    if decision is None:
        return await request()
    return await suffer(victim, decision, request)


async def suffer(victim: Victim, decision: Decision, request: Callable[[], Awaitable[T]]) -> T:
    match decision.fault:
        case Fault.LATE:
            await anyio.sleep(decision.value)
            return await request()
        case Fault.ANSWER_LATE:
            result = await request()
            await anyio.sleep(decision.value)
            return result
        case Fault.ANSWER_LOST:
            await request()
            raise UnavailableError("the server went away before it answered")
        case Fault.TRANSIENT:
            raise TransientError("deadlock detected")
        case Fault.KILLED:
            victim.die(decision.value)
        case Fault.KILLED_AFTER:
            await request()
            victim.die(decision.value)
        case Fault.KILLED_IN_FLIGHT:
            victim.later(decision.value, request)
            victim.die(0.0)
        case Fault.DISCONNECTED:
            disconnect(victim)
            raise UnavailableError("the connection to the broker was lost")
        case _:
            raise UnavailableError("the server is away")
    return await nothing()


async def nothing() -> NoReturn:
    """What a dead process does next."""
    while True:
        await anyio.sleep_forever()


def disconnect(victim: Victim) -> None:
    """The process's connection to the broker ends, and all its subscriptions with it."""
    for subscription in list(victim.subscriptions):
        subscription.lose()


class FaultyBroker:
    """Implements `orderbus.abc.Broker`."""

    def __init__(self, broker: LedgerBroker, victim: Victim) -> None:
        self._broker = broker
        self._victim = victim

    async def apply(self, topology: Topology) -> None:
        await call(self._victim, "apply", lambda: self._broker.apply(topology))

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        if DIRECT.get():
            self._broker.expects_directly(batch)
        decision = self._victim.at("publish")
        if decision is None:
            return await self._broker.publish(batch)
        most = int(decision.value)
        match decision.fault:
            case Fault.CUT:
                await self._broker.publish(batch[:most])
                return [Receipt.UNKNOWN] * len(batch)
            case Fault.REFUSED if most < len(batch):
                receipts = await self._broker.publish([*batch[:most], *batch[most + 1 :]])
                return [*receipts[:most], Receipt.REFUSED, *receipts[most:]]
            case Fault.ANSWER_LOST:
                await self._broker.publish(batch)
                return [Receipt.UNKNOWN] * len(batch)
            case Fault.DUPLICATED | Fault.REFUSED:
                await self._broker.publish(batch)
                return await self._broker.publish(batch)
        return await suffer(self._victim, decision, lambda: self._broker.publish(batch))

    @asynccontextmanager
    async def subscribe(self, queue: str, *, prefetch: int) -> AsyncIterator[FaultySubscription]:
        """Leaving is done at once, and takes along what was settled."""
        # Never left as such, for that may wait: the subscription ends by `lose`, like a connection.
        entered = self._broker.subscribe(queue, prefetch=prefetch)
        begun: list[FaultySubscription] = []

        async def request() -> FaultySubscription:
            opened = await entered.__aenter__()
            begun.append(FaultySubscription(opened, self._victim, self._broker, queue))
            return begun[0]

        try:
            yield await call(self._victim, "subscribe", request)
        finally:
            for subscription in begun:
                subscription.arrive()
                subscription.lose()

    async def depth(self, queue: str) -> int:
        return await call(self._victim, "depth", lambda: self._broker.depth(queue))


class FaultySubscription:
    """Implements `orderbus.abc.Subscription`. Settlements are under way for a while, and in their order."""

    def __init__(self, subscription: MemorySubscription, victim: Victim, broker: LedgerBroker, queue: str) -> None:
        self._subscription = subscription
        self._victim = victim
        self._broker = broker
        self._queue = queue
        self._sent: list[tuple[Incoming, Settlement]] = []
        self._is_over = False
        victim.subscriptions[self] = None

    async def receive(self) -> Sequence[Incoming]:
        decision = self._victim.at("receive")
        if decision is None:
            return await self._subscription.receive()
        return await suffer(self._victim, decision, self._subscription.receive)

    def tried(self, delivery: Incoming) -> None:
        self._subscription.tried(delivery)

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        decision = self._victim.at("settle")
        self._sent.append((delivery, how))
        if decision is None:
            if len(self._sent) == 1:
                self.arrive()
            return
        match decision.fault:
            case Fault.LATE:
                self._victim.later(decision.value, self._arrive_late)
            case Fault.DISCONNECTED:
                disconnect(self._victim)
            case _:
                self._victim.die(decision.value)

    async def pause(self) -> None:
        await call(self._victim, "pause", self._subscription.pause)

    async def flush(self) -> None:
        await call(self._victim, "flush", self._flush)

    def arrive(self) -> None:
        """What was settled so far reaches the broker."""
        sent, self._sent = self._sent, []
        if self._is_over:
            return
        for delivery, how in sent:
            self._subscription.settle(delivery, how)
            if how is Settlement.ACK:
                self._broker.acked(self._queue, delivery)

    def lose(self) -> None:
        """The connection ends; what was settled and is still under way is lost with it."""
        self._is_over = True
        self._victim.subscriptions.pop(self, None)
        self._broker.drop(self._queue, self._subscription)

    async def _flush(self) -> None:
        self.arrive()
        await self._subscription.flush()

    async def _arrive_late(self) -> None:
        self.arrive()


class FaultyStore:
    """Implements `orderbus.abc.Store`."""

    def __init__(self, store: LedgerStore, victim: Victim) -> None:
        self._store = store
        self._victim = victim
        self._outbox = FaultyOutbox(store.outbox, victim)

    @property
    def outbox(self) -> FaultyOutbox:
        return self._outbox

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> FaultyTransaction:
        begun: list[FaultyTransaction] = []

        async def request() -> FaultyTransaction:
            transaction = await self._store.begin(inbox)
            assert isinstance(transaction, LedgerTransaction)
            begun.append(FaultyTransaction(transaction, self._victim))
            return begun[0]

        try:
            return await call(self._victim, "begin", request)
        except BaseException:
            for transaction in begun:
                transaction.lose()
            raise

    def enlist(self, connection: Any) -> Any:
        return self._store.enlist(connection)

    async def check(self) -> None:
        await self._store.check()

    async def maintain(self, window_s: float) -> None:
        await call(self._victim, "maintain", lambda: self._store.maintain(window_s))


class FaultyTransaction:
    """Implements `orderbus.abc.Transaction`. Whatever it fails with, it is over then, as a connection that was lost."""

    def __init__(self, transaction: LedgerTransaction, victim: Victim) -> None:
        self._transaction = transaction
        self._victim = victim
        self.verdicts: Sequence[Verdict] = transaction.verdicts
        victim.transactions[self] = None

    @property
    def connection(self) -> Any:
        return self._transaction.connection

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        return await call(self._victim, "execute", lambda: self._transaction.execute(sql, params))

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        async def request() -> None:
            await self._transaction.commit(deferred, emitted, forget)
            self._victim.transactions.pop(self, None)

        decision = self._victim.at("commit")
        if decision is None:
            await request()
            return
        if decision.fault is Fault.KILLED_IN_FLIGHT:  # the server goes on with it
            self._victim.transactions.pop(self, None)
        try:
            await suffer(self._victim, decision, request)
        except BaseException:
            self.lose()
            raise

    async def rollback(self) -> None:
        await call(self._victim, "rollback", self._rollback)

    def lose(self) -> None:
        """The connection ends, and the server rolls back."""
        self._victim.transactions.pop(self, None)
        self._transaction.abandon()

    async def _rollback(self) -> None:
        await self._transaction.rollback()
        self._victim.transactions.pop(self, None)


class FaultyOutbox:
    """Implements `orderbus.abc.OutboxStore`."""

    def __init__(self, outbox: MemoryOutbox, victim: Victim) -> None:
        self._outbox = outbox
        self._victim = victim

    async def lease(self, owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        return await call(self._victim, "lease", lambda: self._outbox.lease(owner, lease_s, keep))

    async def read(
        self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None
    ) -> OutboxPage:
        return await call(self._victim, "read", lambda: self._outbox.read(buckets, floor, limit, limit_bytes, up_to=up_to))

    async def backlog(self, buckets: Sequence[int], floor: int) -> Backlog:
        return await call(self._victim, "backlog", lambda: self._outbox.backlog(buckets, floor))

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        return await call(self._victim, "delete", lambda: self._outbox.delete(rows))

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        await call(self._victim, "set-aside", lambda: self._outbox.set_aside(stuck))

    async def due(self, buckets: Sequence[int], limit: int, limit_bytes: int) -> Sequence[OutboxRow]:
        return await call(self._victim, "due", lambda: self._outbox.due(buckets, limit, limit_bytes))


class FaultyClaims:
    """Implements `orderbus.abc.Claims`."""

    def __init__(self, claims: LedgerClaims, victim: Victim) -> None:
        self._claims = claims
        self._victim = victim

    def prefixed(self, prefix: str) -> FaultyClaims:
        return FaultyClaims(self._claims.prefixed(prefix), self._victim)

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        return await call(self._victim, "claim", lambda: self._claims.claim(keys, token, lease_ms))

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        return await call(self._victim, "complete", lambda: self._claims.complete(answers, token, keep_ms))

    async def release(self, keys: Sequence[str], token: str) -> None:
        await call(self._victim, "release", lambda: self._claims.release(keys, token))
