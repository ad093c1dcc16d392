"""One life of a subscription: takes deliveries in, runs them in units under their guard, and settles each exactly once.

Everything it holds is bounded by the prefetch. When a server that a handler needs is missing, the deliveries wait here,
unacknowledged and uncounted.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import anyio

from orderbus._core.delivery import Delivery, State, Step
from orderbus._core.handler import ORDERED_RETRY_LIMIT_S
from orderbus._core.leaving import parked_message, retry_message
from orderbus._core.message import BodyNotKept, Outgoing, Settlement
from orderbus._core.naming import place_of
from orderbus._core.policy import Again, Parked, backoff_s, bare, decide
from orderbus._core.work import AnyOrder, KeyOrder, Work
from orderbus._runtime.guard import Guard, delivery_of
from orderbus._runtime.leaving import Leaving
from orderbus.abc import Subscription
from orderbus.errors import MessageError, TransientError, UnavailableError, UsageError

if TYPE_CHECKING:
    from orderbus._runtime.consumer import Consumer
    from orderbus._runtime.environment import Middleware

log = logging.getLogger("orderbus.consumer")

LOST_SESSION_GRACE_S = 5.0
"""After a lost connection, running handlers get this long to commit (their redelivery is then a duplicate)."""
SOLO_AFTER = 3
"""A unit that failed this often for want of a server is taken apart: one member may be what drives it away."""
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
        self._accounts = consumer.accounts
        self._tracing = consumer.env.tracing
        self._subscription = subscription
        self._intake = KeyOrder(max(consumer.prefetch // 2, 1)) if consumer.ordered else AnyOrder()
        self._idle: deque[anyio.Event] = deque()
        self._timer_changed = anyio.Event()
        self._receiving = anyio.CancelScope()
        self._working = anyio.CancelScope()
        self._closed = False
        self._closing = anyio.Event()
        self._lost = False
        self._leaving = Leaving(
            consumer.queue, consumer.env, consumer.accounts, settle=self._settle_left, give_back=self._give_back
        )
        self._begun = 0
        self.in_hand = 0
        self.received = False

    async def run(self) -> None:
        """Returns when drained; raises UnavailableError when the subscription is lost."""
        lost: UnavailableError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._timer)
            with self._working:
                async with anyio.create_task_group() as leaving:
                    leaving.start_soon(self._leaving.run)
                    async with anyio.create_task_group() as workers:
                        for _ in range(self._c.concurrency):
                            workers.start_soon(self._worker)
                        try:
                            with self._receiving:
                                await self._receive()
                        except UnavailableError as error:
                            lost = error
                            self._lose()
                            self._working.deadline = anyio.current_time() + LOST_SESSION_GRACE_S
                        await self._close()
                    self._leaving.complete()
            tasks.cancel_scope.cancel()
        if lost is not None:
            raise lost
        with anyio.move_on_after(LOST_SESSION_GRACE_S, shield=True):
            await self._subscription.flush()
            self._c.owes = False

    @property
    def running(self) -> int:
        """Deliveries that are begun, or on their way out."""
        return self._begun + self._leaving.count

    def stop(self) -> None:
        self._receiving.cancel()

    def cancel(self) -> None:
        self._working.cancel()

    async def _receive(self) -> None:
        while True:
            deliveries = await self._subscription.receive()
            self.received = True
            self._accounts.received(len(deliveries))
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
                self._lose()
        for work in self._intake.drain():
            self._give_back(work)
        for event in self._idle:
            event.set()

    def _lose(self) -> None:
        self._lost = True
        self._leaving.lose()

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
            self._begun += len(unit)
            began = anyio.current_time()
            try:
                await self._unit(unit)
            except BaseException:
                for work in unit:
                    if work.state is State.RUNNING:
                        self._give_back(work)
                raise
            finally:
                self._begun -= len(unit)
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
                self._accounts.rejected(work, error)
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
            self._leaving.add(leaving)
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
        """Run a unit under its guard; where all of it failed together, each member alone."""
        if await self._concluded(guard, works, leaving):
            self._env.wake_relay()
            return
        for work in works:
            work.solo = True
            await self._attempt(guard, [work], leaving)

    async def _concluded(self, guard: Guard, works: Sequence[Work], leaving: list[tuple[Work, Outgoing]]) -> bool:
        """Whether it was decided what becomes of them."""
        self._tracing.begin(works)
        began = self._accounts.began()
        given_up: Exception | None = None
        try:
            try:
                outcomes = await self._guarded(guard, works)
            except Exception as error:  # the policy decides, as for every exception of a handler
                if len(works) > 1 and not isinstance(bare(error), UnavailableError):
                    given_up = error
                    return False
                outcomes = [error] * len(works)
            self._accounts.measure(works, outcomes, began)
            self._conclude(works, outcomes, leaving)
            return True
        finally:
            self._tracing.end(works, given_up)
            given_up = None  # its traceback has this frame, which would keep it, and all the bodies, for the garbage collector

    def _conclude(self, works: Sequence[Work], outcomes: Sequence[str | Exception], leaving: list[tuple[Work, Outgoing]]) -> None:
        self._accounts.succeeded(works, outcomes)
        for work, outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._failed(work, outcome, leaving)
            else:
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
        work.error = error = bare(error)
        work.yields = False
        self._subscription.tried(work.incoming)
        if isinstance(error, UnavailableError):
            work.failures += 1
            work.solo = work.solo or work.failures >= SOLO_AFTER
            work.outcome = "waits"
            delay_s = 0.0 if isinstance(error, TransientError) else backoff_s(work.failures, jitter=self._env.rng.random())
            self._accounts.waits(work, error, delay_s)
            self._wait(work, delay_s)
            return
        self._accounts.failed(work)
        decision = decide(work.route.handler.options.retry, error, work.attempt)
        if work.first_failed_at is None:
            work.first_failed_at = self._env.clock()
        work.outcome = "parked" if isinstance(decision, Parked) else "retried"
        if isinstance(decision, Parked):
            leaving.append(self._park(work, decision.reason, error))
            return
        self._accounts.retried(work, error, decision)
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

    def _settle_left(self, work: Work, taken: Step) -> None:
        self._settle(work, taken)
        self._wake_workers()

    def _give_back(self, work: Work) -> None:
        self._accounts.released()
        self.in_hand -= 1
        work.take(Step.GIVE_BACK)
        if not self._c.ordered:
            self._subscription.settle(work.incoming, Settlement.RELEASE)
            self._c.owes = True

    def _park(self, work: Work, reason: str, error: Exception | None) -> tuple[Work, Outgoing]:
        work.parks_for, work.error = reason, error
        read = work if work.route is not None else None
        return work, parked_message(work.incoming, reason, error, work=read, now_s=self._env.clock())

    def _later(self, work: Work, delay_s: float, *, counted: bool) -> tuple[Work, Outgoing]:
        return work, retry_message(work, delay_s, counted=counted, now_s=self._env.clock())


def _around(
    middleware: Middleware, deliveries: Sequence[Delivery], call: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    async def around() -> None:
        await middleware(deliveries, call)

    return around
