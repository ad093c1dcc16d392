"""Everything that is open while a bus is: its adapters, its consumers, its relay; and how they stop, in which order."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context
from functools import partial
from types import TracebackType
from typing import Any
from uuid import uuid4

import anyio

from orderbus._core.codec import Format
from orderbus._core.handler import DEFAULT_TIMEOUT_S, Handler, Periodic, Plan, guard_kind, queue_needs
from orderbus._core.message import Receipt
from orderbus._core.settings import Settings
from orderbus._core.signing import signing_keys
from orderbus._core.topology import topology_for
from orderbus._core.work import Route
from orderbus._runtime.consumer import Consumer
from orderbus._runtime.environment import Environment, Middleware
from orderbus._runtime.group_commit import GroupCommit
from orderbus._runtime.guard import Caller, ClaimsGuard, Guard, InboxGuard, NoGuard
from orderbus._runtime.relay import Relay, publish_rows
from orderbus._runtime.servers import Servers
from orderbus._runtime.starting import starting
from orderbus._runtime.stats import DrainReceipt, Stats
from orderbus._runtime.tracing import Tracing, outside
from orderbus._runtime.tx import Encoding, Tx
from orderbus._runtime.upkeep import Repetition, look_at_the_outbox, maintain
from orderbus.abc import OutboxRow
from orderbus.errors import UnavailableError

log = logging.getLogger("orderbus")

CANCELLED_GRACE_S = 5.0


class Engine:
    """Opened and closed by `Bus`; one life, no reuse."""

    def __init__(
        self,
        group: str,
        settings: Settings,
        plans: Sequence[tuple[Handler, Plan]],
        *,
        periodics: Sequence[tuple[Periodic, Plan]],
        resources: Mapping[type, Any],
        middleware: Sequence[Middleware],
        form: Format,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.group = group
        self._settings = settings
        self._plans = plans
        self._periodics = periodics
        self._resources = resources
        self._middleware = middleware
        self._clock = clock
        self._rng = rng
        self._stack = AsyncExitStack()
        self._host = anyio.create_task_group()
        self._life = anyio.CancelScope(shield=True)
        limits_s = [handler.options.timeout_s for handler, _ in plans] + [periodic.timeout_s for periodic, _ in periodics]
        self.servers = Servers(group, settings, clock, longest_s=max([DEFAULT_TIMEOUT_S, *limits_s]))
        self._commits: GroupCommit | None = None
        self._commits_done = anyio.Event()
        self._consumers: list[tuple[Consumer, anyio.Event]] = []
        self._repetitions: list[tuple[Repetition, anyio.Event]] = []
        self._relay: Relay | None = None
        self._relay_done = anyio.Event()
        self._drained = anyio.Event()
        self.draining = False
        self.stats = Stats()
        self.receipt: DrainReceipt | None = None
        self._signing = signing_keys(settings.signing_keys)
        self.tracing = Tracing(group, system=_system(settings.broker_url), database=_system(settings.database_url))
        from orderbus._runtime.metrics import meters  # 5 ms of `import orderbus`, were it above

        self.metrics = meters()
        self.encoding = Encoding(form=form, limit_bytes=settings.max_body_bytes, clock=clock, rng=rng, signing=self._signing)

    # Life

    async def __aenter__(self) -> Engine:
        async with AsyncExitStack() as stack:
            await self.servers.open(stack)
            await stack.enter_async_context(self._host)
            failure: Exception | None = None
            try:
                lives = anyio.Event()
                self._host.start_soon(self._live, lives)  # not `start`: cancelled there, it waits for a shielded task
                await lives.wait()
                await self._start()
            except Exception as error:
                failure = error  # raised outside of the task group, which would wrap it in a group
                self._life.cancel()
            except BaseException:
                self._life.cancel()
                raise
            else:
                self._stack = stack.pop_all()
        if failure is not None:
            raise failure
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self.drain()
        finally:
            self.metrics.forget(self)
            self._life.cancel()
            if isinstance(error, anyio.get_cancelled_exc_class()):
                await self._stack.__aexit__(kind, error, trace)
            else:
                # The caller's own error goes on as it is: given to the task group, it would come out wrapped in a group.
                await self._stack.__aexit__(None, None, None)

    async def _live(self, lives: anyio.Event) -> None:
        """All tasks of the bus, shielded: where its `async with` is cancelled, the body ends at once and they are drained."""
        try:
            with self._life:
                async with anyio.create_task_group() as self._tasks:
                    lives.set()
                    await anyio.sleep_forever()
        finally:
            self.tracing.close()

    async def _start(self) -> None:
        needs = queue_needs([handler for handler, _ in self._plans])
        topology = topology_for(needs)
        with starting(self.group, "to declare its queues", self._clock):
            await self.servers.broker.apply(topology)
        if self.draining:
            return  # there is nothing to begin any more
        if self.tracing.records:
            self._tasks.start_soon(self.tracing.keep_telling, name="spans")
        caller = Caller(self._resources, self.tracing)
        guards = {handler.consumer: self._guard(handler, caller, plan) for handler, plan in self._plans}
        env = Environment(
            self.servers.broker,
            topology,
            self._clock,
            self._rng,
            self.stats,
            self._settings.dedupe_window_s,
            tuple(self._middleware),
            self._wake_relay,
            self.tracing,
            self.metrics,
        )
        for need in needs:
            routes = {
                topic: Route(handler, plan, event, limit_bytes=self._settings.max_body_bytes, signing=self._signing)
                for handler, plan in self._plans
                if handler.queue == need.name
                for topic, event in zip(handler.topics, handler.events, strict=True)
            }
            consumer, done = Consumer(need, routes, guards, env), anyio.Event()
            self._consumers.append((consumer, done))
            self._tasks.start_soon(_ending, consumer.run, done, name=f"consumer {need.name}")
        if self.servers.has_store:
            self._tasks.start_soon(maintain, self.servers.store, self._settings.dedupe_window_s, name="maintenance")
            if self._settings.relay is not False:
                owner = f"{self.group}-{uuid4().hex[:12]}"
                self._relay = Relay(
                    self.servers.store.outbox,
                    self.servers.broker,
                    self._settings,
                    self.stats,
                    owner,
                    self._rng,
                    self.tracing,
                    self.metrics,
                )
                self._tasks.start_soon(_ending, self._relay.run, self._relay_done, name="relay")
                if self.metrics.records:
                    self._tasks.start_soon(look_at_the_outbox, self._relay, self.stats, name="outbox metrics")
        for periodic, plan in self._periodics:
            repetition = Repetition(
                periodic,
                plan,
                transaction=self.transaction,
                resources=self._resources,
                tracing=self.tracing,
                stats=self.stats,
            )
            done = anyio.Event()
            self._repetitions.append((repetition, done))
            self._tasks.start_soon(_ending, repetition.run, done, name=periodic.place)
        with starting(self.group, "to consume its queues", self._clock):
            for consumer, _ in self._consumers:
                await consumer.consuming.wait()
                if consumer.refused is not None:
                    raise consumer.refused
        self.metrics.watch(self)

    def _guard(self, handler: Handler, caller: Caller, plan: Plan) -> Guard:
        kind = guard_kind(handler, plan, has_store=self.servers.has_store, has_claims=self.servers.has_claims)
        if kind == "none":
            return NoGuard(caller)
        if kind == "claims":
            return ClaimsGuard(self.servers.claims, caller, keep_s=self._settings.dedupe_window_s)
        return InboxGuard(self.servers.store, caller, self.encoding, self.tracing, self._emitted)

    # Stopping

    async def drain(self) -> None:
        """Stop once: no new work, started work finishes inside the grace time, the rest goes back, confirms are flushed."""
        if self.draining:
            with anyio.CancelScope(shield=True), anyio.move_on_after(self._settings.grace_s + 2 * CANCELLED_GRACE_S):
                await self._drained.wait()
            return
        self.draining = True
        began = anyio.current_time()
        with anyio.CancelScope(shield=True):
            finished_before = sum(consumer.finished for consumer, _ in self._consumers)
            released_before = self.stats.released
            cancelled = await self._stop_work()
            if self._commits is not None:
                self._commits.close()
                with anyio.move_on_after(self._settings.grace_s):
                    await self._commits_done.wait()
            if self._relay is not None:
                self._relay.stop()
                with anyio.move_on_after(self._settings.grace_s):
                    await self._relay_done.wait()
        self.receipt = DrainReceipt(
            finished=sum(consumer.finished for consumer, _ in self._consumers) - finished_before,
            released=self.stats.released - released_before,
            cancelled=cancelled,
            clean=cancelled == 0 and self._everything_ended() and not any(consumer.owes for consumer, _ in self._consumers),
            seconds=anyio.current_time() - began,
            stats=self.stats,
        )
        self._drained.set()
        if self.metrics.records:
            self.metrics.drain_duration.record(
                self.receipt.seconds, {"orderbus.group": self.group, "orderbus.clean": self.receipt.clean}
            )
        log.info("drained %s: %s", self.group, self.receipt)

    async def _stop_work(self) -> int:
        """Stop consumers and periodic functions; how much of what they had begun had to be cancelled."""
        for worker, _ in self._workers():
            worker.stop()
        with anyio.move_on_after(self._settings.grace_s):
            for _, done in self._workers():
                await done.wait()
            return 0
        cancelled = sum(worker.running for worker, _ in self._workers())
        for worker, _ in self._workers():
            worker.cancel()
        with anyio.move_on_after(CANCELLED_GRACE_S):
            for _, done in self._workers():
                await done.wait()
        return cancelled

    def _workers(self) -> Iterator[tuple[Consumer | Repetition, anyio.Event]]:
        yield from self._consumers
        yield from self._repetitions

    def _everything_ended(self) -> bool:
        return (
            all(done.is_set() for _, done in self._workers())
            and (self._commits is None or self._commits_done.is_set())
            and (self._relay is None or self._relay_done.is_set())
        )

    # Looking

    @property
    def is_consuming(self) -> bool:
        return not self.draining and all(consumer.is_consuming for consumer, _ in self._consumers)

    def in_hand(self) -> Iterator[tuple[str, int, int]]:
        """Of each consumed queue, the unsettled deliveries and the most that there may be."""
        for consumer, _ in self._consumers:
            yield consumer.queue, consumer.in_hand, consumer.prefetch

    @property
    def system(self) -> str:
        """What OpenTelemetry's conventions call the broker."""
        return self.tracing.system

    @property
    def buckets(self) -> int | None:
        """How many of the outbox's 64 buckets its relay holds; None where it runs none."""
        return None if self._relay is None else self._relay.buckets

    # Work for the bus

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        with self.tracing.database("BEGIN"):
            tx = Tx(await self.servers.store.begin(), self.encoding, self.tracing)
        try:
            yield tx
            with self.tracing.database("COMMIT"):
                await tx._commit()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await tx._rollback()
            raise
        self._emitted(len(tx._emitted))
        self._wake_relay()

    @asynccontextmanager
    async def enlist(self, connection: Any) -> AsyncIterator[Tx]:
        tx = Tx(self.servers.store.enlist(connection), self.encoding, self.tracing)
        try:
            yield tx
            await tx._commit()
        except BaseException:
            await tx._rollback()
            raise
        self._emitted(len(tx._emitted))

    async def publish_rows(self, rows: Sequence[OutboxRow]) -> Sequence[Receipt]:
        receipts = await publish_rows(self.servers.broker, rows, self.tracing, self.metrics) if rows else ()
        self.stats.published += sum(receipt is Receipt.CONFIRMED for receipt in receipts)
        return receipts

    def commits(self) -> GroupCommit:
        if self.draining:
            raise UnavailableError(f"the bus {self.group!r} is draining")
        if self._commits is None:
            self._commits = GroupCommit(self.servers.store, self.encoding, self.tracing, self._committed)
            # In a context of its own: the first caller's has his delivery, his baggage, and whatever else he has bound.
            begin = partial(self._tasks.start_soon, _ending, self._commits.run, self._commits_done, name="group commit")
            Context().run(begin)
        return self._commits

    def _emitted(self, count: int) -> None:
        self.stats.emitted += count

    def _committed(self, emitted: int) -> None:
        self._emitted(emitted)
        self._wake_relay()

    def _wake_relay(self) -> None:
        if self._relay is not None:
            self._relay.wake()


def _system(url: str | None) -> str:
    """What the conventions of OpenTelemetry call the server behind a URL."""
    scheme = (url or "memory").partition(":")[0]
    return {"amqp": "rabbitmq", "amqps": "rabbitmq", "postgres": "postgresql", "embedded": "postgresql"}.get(scheme, scheme)


async def _ending(run: Callable[[], Any], done: anyio.Event) -> None:
    outside()  # a task begins in the context of whoever happened to start it
    try:
        await run()
    finally:
        done.set()
