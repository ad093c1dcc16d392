"""One life of a subscription: takes deliveries in, runs them in units under their guard, and settles each exactly once.

Everything it holds is bounded by the prefetch. When a server that a handler needs is missing, the deliveries wait here,
unacknowledged and uncounted.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import anyio

from orderbus._core.delivery import Delivery, State, Step
from orderbus._core.handler import ORDERED_RETRY_LIMIT_S
from orderbus._core.ids import uuid7_time_ms
from orderbus._core.leaving import error_text, parked_message, retry_message
from orderbus._core.message import BodyNotKept, Incoming, Outgoing, Receipt, Settlement
from orderbus._core.naming import place_of
from orderbus._core.policy import Again, Parked, backoff_s, bare, decide
from orderbus._core.work import AnyOrder, KeyOrder, Work
from orderbus._runtime.guard import HANDLED, Guard, delivery_of
from orderbus.abc import Subscription
from orderbus.errors import MessageError, TransientError, UnavailableError, UsageError

if TYPE_CHECKING:
    from orderbus._runtime.consumer import Consumer, Middleware

log = logging.getLogger("orderbus.consumer")

LOST_SESSION_GRACE_S = 5.0
"""After a lost connection, running handlers get this long to commit (their redelivery is then a duplicate)."""
SOLO_AFTER = 3
"""A unit that failed this often for want of a server is taken apart: one member may be what drives it away."""
PUBLISH_TRIES = 10
PACE = 2.0
SHORTEST_PACE_S, LONGEST_PACE_S = 0.005, 0.05
"""A busy worker waits `PACE` times as long as its last unit took before it begins one that is not full, within these bounds: the
more loaded the machine, the fuller the units, instead of a transaction for every few messages. An idle worker begins at once."""
PATIENCE_S = 2.0
"""For so long the head of a key may be retried while its followers fill the prefetch, and so hold up other keys."""
FINAL_STEPS = {
    Step.FINISH: Settlement.ACK,
    Step.GIVE_BACK: Settlement.RELEASE,
    Step.REJECT: Settlement.REJECT,
    Step.DEAD_LETTER: Settlement.DEAD_LETTER,
}


class Session:
    """One life of a subscription. Its end leaves nothing running."""

    def __init__(self, consumer: Consumer, subscription: Subscription) -> None:
        self._c = consumer
        self._env = consumer.env
        self._stats = consumer.env.stats
        self._queue_stats = consumer.stats
        self._tracing = consumer.env.tracing
        self._metrics = consumer.env.metrics
        self._subscription = subscription
        self._intake = KeyOrder(max(consumer.prefetch // 2, 1)) if consumer.ordered else AnyOrder()
        self._idle: deque[anyio.Event] = deque()
        self._timer_changed = anyio.Event()
        self._receiving = anyio.CancelScope()
        self._working = anyio.CancelScope()
        self._closed = False
        self._closing = anyio.Event()
        self._lost = False
        self._leaving: list[tuple[Work, Outgoing]] = []
        self._refused: list[tuple[float, Work, Outgoing]] = []
        self._leaving_changed = anyio.Event()
        self._workers_are_gone = False
        self.running = 0
        self.in_hand = 0
        self.received = False

    async def run(self) -> None:
        """Returns when drained; raises UnavailableError when the subscription is lost."""
        lost: UnavailableError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._timer)
            with self._working:
                async with anyio.create_task_group() as leaving:
                    leaving.start_soon(self._leave)
                    async with anyio.create_task_group() as workers:
                        for _ in range(self._c.concurrency):
                            workers.start_soon(self._worker)
                        try:
                            with self._receiving:
                                await self._receive()
                        except UnavailableError as error:
                            lost = error
                            self._lost = True
                            self._working.deadline = anyio.current_time() + LOST_SESSION_GRACE_S
                        await self._close()
                    self._workers_are_gone = True
                    self._leaving_changed.set()
            tasks.cancel_scope.cancel()
        if lost is not None:
            raise lost
        with anyio.move_on_after(LOST_SESSION_GRACE_S, shield=True):
            await self._subscription.flush()
            self._c.owes = False

    def stop(self) -> None:
        self._receiving.cancel()

    def cancel(self) -> None:
        self._working.cancel()

    async def _receive(self) -> None:
        while True:
            deliveries = await self._subscription.receive()
            self.received = True
            self._stats.received += len(deliveries)
            self._queue_stats.received += len(deliveries)
            self.in_hand += len(deliveries)
            self._intake.add([Work(incoming) for incoming in deliveries])
            self._wake_workers()

    async def _close(self) -> None:
        """Begin nothing more. On a drain, plain queues give back what has not begun; an ordered one lets the closing
        channel give everything back at once, for each message given back singly would overtake those still running."""
        self._closed = True
        self._closing.set()
        if not self._lost and not self._c.ordered:
            try:
                await self._subscription.pause()
            except UnavailableError as error:
                log.warning("queue %s: %s; what has not begun goes back by itself", self._c.queue, error)
                self._lost = True
        for work in self._intake.drain():
            self._give_back(work)
        for event in self._idle:
            event.set()

    # Workers

    async def _worker(self) -> None:
        fuse = self._c.fuse
        next_at = 0.0
        while not self._closed:
            ready = self._intake.ready()
            if fuse > 1 and 0 < ready < fuse and (early_s := next_at - anyio.current_time()) > 0:
                with anyio.move_on_after(early_s):
                    await self._closing.wait()
                continue
            unit = self._intake.take(fuse)
            if not unit:
                event = anyio.Event()
                self._idle.append(event)
                await event.wait()
                continue
            self.running += len(unit)
            began = anyio.current_time()
            try:
                await self._unit(unit)
            except BaseException:
                for work in unit:
                    if work.state is State.RUNNING:
                        self._give_back(work)
                raise
            finally:
                self.running -= len(unit)
            ended = anyio.current_time()
            next_at = ended + min(max(PACE * (ended - began), SHORTEST_PACE_S), LONGEST_PACE_S)

    def _wake_workers(self) -> None:
        needed = -(-self._intake.ready() // self._c.fuse)
        while self._idle and needed > 0:
            self._idle.popleft().set()
            needed -= 1

    async def _timer(self) -> None:
        while True:
            due = self._intake.next_due()
            now = anyio.current_time()
            if due is not None and due <= now:
                self._intake.wake(now)
                self._wake_workers()
                continue
            with anyio.move_on_after(float("inf") if due is None else due - now):
                await self._timer_changed.wait()
                self._timer_changed = anyio.Event()

    # One unit

    async def _unit(self, unit: Sequence[Work]) -> None:
        now = self._env.clock()
        leaving: list[tuple[Work, Outgoing]] = []
        readable: list[Work] = []
        for work in unit:
            work.take(Step.START)
            if work.crowded:
                leaving.append(self._park(work, "held-up-others", work.error))
                continue
            try:
                if not work.solo:
                    work.read(self._c.routes, now_s=now, window_s=self._env.window_s)
            except BodyNotKept as error:
                log.error(
                    "queue %s: a message is rejected into the dead letters: %s",
                    self._c.queue,
                    error,
                    extra=self._about(work, error, error.reason),
                )
                self._count_parked(error.reason)
                work.take(Step.LEAVE)
                self._settle(work, Step.DEAD_LETTER)
                continue
            except MessageError as error:
                leaving.append(self._park(work, error.reason, error))
                continue
            if work.not_before is not None:
                leaving.append(self._later(work, work.not_before - now, counted=False))
                continue
            readable.append(work)
        for guard, works in self._by_guard(readable):
            await self._attempt(guard, works, leaving)
        if leaving:
            for work, _ in leaving:
                work.take(Step.LEAVE)
            self.running += len(leaving)
            self._leaving += leaving
            self._leaving_changed.set()
        self._wake_workers()

    def _by_guard(self, works: Sequence[Work]) -> list[tuple[Guard, list[Work]]]:
        if not works:
            return []
        groups: dict[int, tuple[Guard, list[Work]]] = {}
        for work in works:
            guard = self._c.guards[work.route.handler.consumer]
            groups.setdefault(id(guard), (guard, []))[1].append(work)
        return list(groups.values())

    async def _attempt(self, guard: Guard, works: Sequence[Work], leaving: list[tuple[Work, Outgoing]]) -> None:
        self._tracing.begin(works)
        began = anyio.current_time() if self._metrics.records else 0.0
        try:
            try:
                outcomes = await self._guarded(guard, works)
            except Exception as error:  # the policy decides, as for every exception of a handler
                if len(works) > 1 and not isinstance(bare(error), UnavailableError):
                    self._tracing.end(works, error)
                    for work in works:
                        work.solo = True
                        await self._attempt(guard, [work], leaving)
                    return
                outcomes = [error] * len(works)
            if self._metrics.records:
                self._measure(works, outcomes, anyio.current_time() - began)
            self._conclude(works, outcomes, leaving)
        finally:
            self._tracing.end(works)
        self._env.wake_relay()

    def _measure(self, works: Sequence[Work], outcomes: Sequence[str | Exception], took_s: float) -> None:
        attributes = {"orderbus.consumer": works[0].route.handler.consumer}
        failed = next((bare(outcome) for outcome in outcomes if isinstance(outcome, Exception)), None)
        if failed is not None:
            self._metrics.process_duration.record(took_s, {**attributes, "error.type": type(failed).__name__})
        else:
            self._metrics.process_duration.record(took_s, attributes)
        made = [uuid7_time_ms(work.id) for work, outcome in zip(works, outcomes, strict=True) if outcome is HANDLED]
        if oldest_ms := min((ms for ms in made if ms is not None), default=None):
            self._metrics.lag.record(max(self._env.clock() - oldest_ms / 1000, 0.0), attributes)

    def _conclude(self, works: Sequence[Work], outcomes: Sequence[str | Exception], leaving: list[tuple[Work, Outgoing]]) -> None:
        counts = self._stats.handlers[works[0].route.handler.consumer]
        if outcomes[0] is HANDLED:
            self._c.outage.passed(works[0].route.handler.consumer)
        for work, outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._failed(work, outcome, leaving)
                continue
            if outcome is HANDLED:
                self._stats.handled += 1
                counts.handled += 1
            else:
                self._stats.duplicates += 1
                counts.duplicate += 1
            work.outcome = outcome
            self._settle(work, Step.FINISH)

    async def _guarded(self, guard: Guard, works: Sequence[Work]) -> list[str | Exception]:
        if not self._env.middleware:
            return await guard.run(works)
        outcomes: list[str | Exception] = []

        async def innermost() -> None:
            outcomes[:] = await guard.run(works)
            if len(outcomes) == 1 and isinstance(outcomes[0], Exception):
                raise outcomes[0]

        call: Callable[[], Awaitable[None]] = innermost
        deliveries = [delivery_of(work, anyio.current_time() + work.route.handler.options.timeout_s) for work in works]
        for middleware in reversed(self._env.middleware):
            call = _around(middleware, deliveries, call)
        await call()
        if not outcomes:
            places = ", ".join(place_of(middleware) for middleware in self._env.middleware)
            raise UsageError(
                f"a middleware of {places} returned without having called `call_next`; await call_next() in it, or raise",
                code="OB414",
            )
        return outcomes

    def _failed(self, work: Work, error: Exception, leaving: list[tuple[Work, Outgoing]]) -> None:
        handler = work.route.handler
        counts = self._stats.handlers[handler.consumer]
        work.error = error = bare(error)
        work.yields = False
        self._subscription.tried(work.incoming)
        if isinstance(error, UnavailableError):
            work.failures += 1
            work.solo = work.solo or work.failures >= SOLO_AFTER
            self._stats.waited += 1
            counts.waited += 1
            work.outcome = "waits"
            delay_s = 0.0 if isinstance(error, TransientError) else backoff_s(work.failures, jitter=self._env.rng.random())
            if isinstance(error, TransientError):
                log.warning(
                    "%s: event %s: %s; again at once", handler.consumer, work.id, _brief(error), extra=self._about(work, error)
                )
            else:
                self._c.outage.met(handler.consumer, work.id, _brief(error), delay_s)
            self._wait(work, delay_s)
            return
        self._stats.failed += 1
        counts.failed += 1
        decision = decide(handler.options.retry, error, work.attempt)
        if work.first_failed_at is None:
            work.first_failed_at = self._env.clock()
        work.outcome = "parked" if isinstance(decision, Parked) else "retried"
        if isinstance(decision, Parked):
            leaving.append(self._park(work, decision.reason, error))
            return
        if decision.counted:
            self._stats.retried += 1
            counts.retried += 1
        if log.isEnabledFor(logging.INFO):
            log.info(
                "%s: event %s: try %d: %s: again in %g s",
                handler.consumer,
                work.id,
                work.attempt,
                _brief(error),
                decision.delay_s,
                extra=self._about(work, error),
            )
        if self._c.ordered or decision.in_process:
            self._wait_again(work, decision)
        else:
            leaving.append(self._later(work, decision.delay_s, counted=decision.counted))

    def _wait_again(self, work: Work, decision: Again) -> None:
        if decision.counted:
            work.attempt += 1
            failing_s = self._env.clock() - (work.first_failed_at or 0.0)
            work.yields = failing_s + decision.delay_s >= PATIENCE_S
        work.failures = 0
        work.solo = True
        self._wait(work, min(decision.delay_s, ORDERED_RETRY_LIMIT_S))

    def _wait(self, work: Work, delay_s: float) -> None:
        work.take(Step.WAIT)
        if self._closed:
            self._give_back(work)
            return
        self._intake.wait(work, anyio.current_time() + delay_s)
        self._timer_changed.set()

    # Ends

    def _settle(self, work: Work, taken: Step) -> None:
        work.take(taken)
        self._subscription.settle(work.incoming, FINAL_STEPS[taken])
        if work.span is not None:
            self._tracing.settled(work, FINAL_STEPS[taken].value)
        self.in_hand -= 1
        self._c.owes = True
        self._c.finished += taken is Step.FINISH
        self._intake.done(work)

    def _give_back(self, work: Work) -> None:
        self._stats.released += 1
        self._queue_stats.released += 1
        self.in_hand -= 1
        work.take(Step.GIVE_BACK)
        if not self._c.ordered:
            self._subscription.settle(work.incoming, Settlement.RELEASE)
            self._c.owes = True

    def _park(self, work: Work, reason: str, error: Exception | None) -> tuple[Work, Outgoing]:
        read = work if work.route is not None else None
        log.error(
            "queue %s: message %s parked: %s: %s",
            self._c.queue,
            _name(work.incoming),
            reason,
            _brief(error),
            extra=self._about(work, error, reason),
        )
        self._count_parked(reason)
        return work, parked_message(work.incoming, reason, error, work=read, now_s=self._env.clock())

    def _about(self, work: Work, error: BaseException | None = None, reason: str | None = None) -> dict[str, str]:
        """For whoever searches the log, by the names of the Elastic Common Schema where it has one. No key: it may be a person."""
        about = {"orderbus.queue": self._c.queue}
        if work.id is not None:
            about["event.id"] = str(work.id)
        if work.route is not None:
            about["orderbus.consumer"] = work.route.handler.consumer
        if error is not None:
            about["error.type"] = type(error).__name__
        if reason is not None:
            about["event.reason"] = reason
        return about | self._tracing.ids(work)

    def _count_parked(self, reason: str) -> None:
        self._stats.parked += 1
        self._queue_stats.count_parked(reason)

    def _later(self, work: Work, delay_s: float, *, counted: bool) -> tuple[Work, Outgoing]:
        return work, retry_message(work, delay_s, counted=counted, now_s=self._env.clock())

    async def _leave(self) -> None:
        """Publish what leaves, and acknowledge what is confirmed. What can't be published stays here and is tried again.

        It does so beside the workers: while an alarm keeps all publishes back, consuming goes on, for that may be what ends it.
        """
        try:
            while not self._lost and not (self._workers_are_gone and not self._leaving and not self._refused):
                now = anyio.current_time()
                batch = self._leaving + [(work, outgoing) for due, work, outgoing in self._refused if due <= now]
                if batch:
                    self._leaving = []
                    self._refused = [one for one in self._refused if one[0] > now]
                    await self._publish(batch)
                    self._wake_workers()
                    continue
                self._leaving_changed = anyio.Event()
                with anyio.move_on_after(min((due for due, _, _ in self._refused), default=math.inf) - now):
                    await self._leaving_changed.wait()
        finally:
            for work in (*(work for work, _ in self._leaving), *(work for _, work, _ in self._refused)):
                self._give_back(work)

    async def _publish(self, leaving: Sequence[tuple[Work, Outgoing]]) -> None:
        try:
            with self._tracing.leaving(leaving) as told:
                receipts = await self._env.broker.publish([outgoing for _, outgoing in leaving])
                told += receipts
        except UnavailableError as error:
            log.warning("queue %s: retries and dead letters can't be published: %s", self._c.queue, error)
            receipts = [Receipt.UNKNOWN] * len(leaving)
        except BaseException:
            self._leaving = [*leaving, *self._leaving]
            raise
        for (work, outgoing), receipt in zip(leaving, receipts, strict=True):
            if receipt is Receipt.CONFIRMED:
                self.running -= 1
                self._settle(work, Step.FINISH)
            else:
                self._refuse(work, outgoing)
        if not self._lost and any(receipt in (Receipt.UNROUTABLE, Receipt.UNKNOWN) for receipt in receipts):
            await self._reapply()

    def _refuse(self, work: Work, outgoing: Outgoing) -> None:
        work.refusals += 1
        if work.refusals < PUBLISH_TRIES:
            due = anyio.current_time() + backoff_s(work.refusals, jitter=self._env.rng.random())
            self._refused.append((due, work, outgoing))
            return
        log.error(
            "queue %s: message %s can't be moved to %s",
            self._c.queue,
            _name(work.incoming),
            outgoing.routing_key,
            extra=self._about(work),
        )
        self.running -= 1
        self._settle(work, Step.REJECT)

    async def _reapply(self) -> None:
        """Somebody deleted the queue that it should go to: declare it again."""
        try:
            await self._env.broker.apply(self._env.topology)
        except UnavailableError as error:
            log.warning("queue %s: the topology can't be applied: %s", self._c.queue, error)


def _around(
    middleware: Middleware, deliveries: Sequence[Delivery], call: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    async def around() -> None:
        await middleware(deliveries, call)

    return around


def _name(incoming: Incoming) -> str:
    try:
        return incoming.properties.message_id or "without an id"
    except MessageError:
        return "with unreadable properties"


def _brief(error: BaseException | None) -> str:
    """For the log; the dead letter has the whole text. A MessageError quotes the body, and PostgreSQL a row's values from line 2 on."""
    if error is None:
        return ""
    if isinstance(error, MessageError):
        return "its dead letter says what is wrong"
    return f"{type(error).__name__}: {error_text(error).partition(chr(10))[0][:200]}"
