"""How a handler's effects are kept from happening twice: by the inbox, by claims, or not at all.

Each guard runs a unit of deliveries (one, a fused batch, or an `on_batch` batch) and says for each what became of it:
HANDLED, DUPLICATE, or the exception that it failed with. An exception out of `run` fails the whole unit.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel

from orderbus._core.delivery import Batch, Delivery, Item
from orderbus._core.policy import RetryLater
from orderbus._core.work import Work, by_key, check_tx_result
from orderbus._runtime.calling import check_cancelled, running_clock
from orderbus._runtime.tracing import CURRENT_WORK, Tracing, about, cause_of, inside, spans_of
from orderbus._runtime.tx import Encoding, Tx
from orderbus.abc import Claims, ClaimState, InboxEntry, Store, Verdict
from orderbus.errors import HandlerTimeout, MessageError, UnavailableError, UsageError

log = logging.getLogger("orderbus.guard")

HANDLED: Final = "handled"
DUPLICATE: Final = "duplicate"
Outcome = str | Exception

CLAIM_MARGIN_S = 5.0
CLAIM_BUSY_WAIT_S = 0.5
TIMER_S = 0.001
"""How much of its time limit a handler may lose that follows others: what an event loop's timers are exact to."""


class Guard(Protocol):
    async def run(self, works: Sequence[Work]) -> list[Outcome]: ...


class Caller:
    """Calls handlers with what their signatures ask for, under a time limit. Made where an event loop runs."""

    def __init__(self, resources: Mapping[type, Any], tracing: Tracing) -> None:
        self._resources = resources
        self._tracing = tracing
        self._now = running_clock()

    async def together(self, works: Sequence[Work], tx: Tx | None) -> list[Outcome]:
        """Call for each in turn (or once for a batch) in one transaction; the first exception ends it. Raises HandlerTimeout."""
        timeout_s = max(work.route.handler.options.timeout_s for work in works)
        deadline = self._now() + timeout_s
        try:
            with anyio.CancelScope(deadline=deadline):
                if works[0].route.handler.batch:
                    return await self._batch(works, tx, deadline)
                for work in works:
                    await self._one(work, tx, deadline)
                return [HANDLED] * len(works)
        finally:
            CURRENT_WORK.set(None)
        raise _timeout(works[0])

    async def apart(self, works: Sequence[Work], outcomes: list[Outcome | None]) -> None:
        """Call for each beside the others; what failed is that one's outcome. Cancelled, it leaves None for the unfinished.

        As many tasks as handlers that really wait for something: one that doesn't is followed by the next in the same task, for a
        task for each would cost more than everything else that is done for a message (40 of 90 µs).
        """
        if works[0].route.handler.batch:
            outcomes[:] = await self.together(works, None)
            return
        left = deque(enumerate(works))
        if len(works) == 1:
            await self._lane(left, outcomes)
            return
        async with anyio.create_task_group() as lanes:
            while left:
                lanes.start_soon(self._lane, left, outcomes)
                await anyio.lowlevel.checkpoint()

    async def _lane(self, left: deque[tuple[int, Work]], outcomes: list[Outcome | None]) -> None:
        """Handle one after another of those left, each within its own time."""
        while left:
            armed_at, timeout_s = -math.inf, 0.0
            with anyio.CancelScope() as scope:
                while left and not scope.cancel_called:
                    n, work = left.popleft()
                    now, options = self._now(), work.route.handler.options
                    if now - armed_at > TIMER_S or options.timeout_s != timeout_s:
                        armed_at, timeout_s = now, options.timeout_s
                        scope.deadline = now + timeout_s
                    try:
                        await self._one(work, None, scope.deadline)
                    except Exception as error:  # the policy decides, as for every exception of a handler
                        outcomes[n] = error
                    else:
                        outcomes[n] = HANDLED
            CURRENT_WORK.set(None)
            if scope.cancelled_caught:
                outcomes[n] = _timeout(work)

    async def _one(self, work: Work, tx: Tx | None, deadline: float) -> None:
        handler = work.route.handler
        arguments = self._arguments(work, work.event, tx, deadline)
        if tx is not None:
            tx._cause = work.trace if work.span is None else cause_of(work)
        CURRENT_WORK.set(work)  # until the next, or the end of the unit: to take it back after each costs as much again
        try:
            if work.span is None:
                result = await handler.function(*arguments)
            else:
                with inside(work.span):
                    result = await handler.function(*arguments)
        except anyio.get_cancelled_exc_class() as error:
            check_cancelled(handler.place, error)
            raise
        if result is not None:
            events = check_tx_result(result, handler.place)
            if tx is None:
                if events:
                    raise UsageError(
                        f"{handler.place}: returned an event, but it runs without a database, so there is no outbox", code="OB407"
                    )
                return
            for event in events:
                tx.emit(event)

    async def _batch(self, works: Sequence[Work], tx: Tx | None, deadline: float) -> list[Outcome]:
        batch = Batch([Item(work.event, delivery_of(work, deadline)) for work in works])
        handler = works[0].route.handler
        if tx is not None:
            tx._causes = {work.key: cause for work in works if work.key is not None and (cause := cause_of(work))}
        CURRENT_WORK.set(works[0])
        try:
            with self._tracing.handling_batch(works):
                result = await handler.function(*self._arguments(works[0], batch, tx, deadline))
        except anyio.get_cancelled_exc_class() as error:
            check_cancelled(handler.place, error)
            raise
        for event in check_tx_result(result, handler.place):
            if tx is None:
                raise UsageError(
                    f"{handler.place}: returned an event, but it runs without a database, so there is no outbox", code="OB407"
                )
            tx.emit(event)
        return [HANDLED if item.outcome is None else item.outcome for item in batch]

    def _arguments(self, work: Work, first: Any, tx: Tx | None, deadline: float) -> list[Any]:
        arguments = [first]
        for source in work.route.plan.arguments[1:]:
            if source == "tx":
                arguments.append(tx)
            elif source == "delivery":
                arguments.append(delivery_of(work, deadline))
            else:
                arguments.append(self._resources[source])  # type: ignore[index]
        return arguments


def _timeout(work: Work) -> HandlerTimeout:
    handler = work.route.handler
    return HandlerTimeout(f"{handler.place}: ran longer than its timeout of {handler.options.timeout_s:g} s")


def delivery_of(work: Work, deadline: float) -> Delivery:
    return Delivery(
        id=work.id,
        topic=work.route.topic,
        key=work.key,
        attempt=work.attempt,
        headers=work.incoming.properties.headers,
        deadline=deadline,
    )


class InboxGuard:
    """A row in the effect's own transaction is the truth."""

    def __init__(
        self, store: Store, caller: Caller, encoding: Encoding, tracing: Tracing, on_emit: Callable[[int], None]
    ) -> None:
        self._store = store
        self._caller = caller
        self._encoding = encoding
        self._tracing = tracing
        self._on_emit = on_emit

    async def run(self, works: Sequence[Work]) -> list[Outcome]:
        works_in_order = by_key(works)
        entries = [InboxEntry(work.id, work.route.handler.consumer, work.hash) for work in works_in_order]
        spans = spans_of(works) if len(works) == 1 else ()  # what several share is no single one's: `process` spans all of it
        with self._tracing.database("BEGIN", spans):
            transaction = await self._store.begin(entries)
        tx = Tx(transaction, self._encoding, self._tracing)
        outcomes: dict[int, Outcome] = {}
        try:
            fresh = []
            for work, entry, verdict in zip(works_in_order, entries, transaction.verdicts, strict=True):
                if verdict is Verdict.NEW:
                    fresh.append((work, entry))
                elif verdict is Verdict.DUPLICATE:
                    outcomes[id(work)] = DUPLICATE
                else:
                    outcomes[id(work)] = MessageError("id-reused", f"event {work.id} was handled before with another body")
            if not fresh:
                await tx._rollback()
            else:
                results = await self._caller.together([work for work, _ in fresh], tx)
                forget = []
                for (work, entry), result in zip(fresh, results, strict=True):
                    outcomes[id(work)] = result
                    if result is not HANDLED:
                        forget.append(entry)
                with self._tracing.database("COMMIT", spans):
                    await tx._commit(forget)
                self._on_emit(len(tx._emitted))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await tx._rollback()
            raise
        return [outcomes[id(work)] for work in works]


class ClaimsGuard:
    """For handlers that write to no database: a claim with a lease and a token, completed once the handler returned.

    A crash between the handler's outside call and the completion lets the call happen again after the lease: the
    handler passes `delivery.id` on as the outside system's idempotency key.
    """

    def __init__(self, claims: Claims, caller: Caller, *, keep_s: float) -> None:
        self._claims = claims
        self._caller = caller
        self._keep_ms = int(keep_s * 1000)

    async def run(self, works: Sequence[Work]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        for work in works:
            if work.claim is not None:  # its handler has run; only the answer is missing
                await self._complete([work], work.claim)
                outcomes[id(work)] = HANDLED
        granted, token = await self._claim([work for work in works if work.claim is None], outcomes)
        results: list[Outcome | None] = [None] * len(granted)
        try:
            if granted:
                await self._caller.apart(granted, results)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close(granted, results, token)
        for work, result in zip(granted, results, strict=True):
            assert result is not None
            outcomes[id(work)] = result
        return [outcomes[id(work)] for work in works]

    async def _claim(self, works: Sequence[Work], outcomes: dict[int, Outcome]) -> tuple[list[Work], str]:
        """Those that are ours now; the others have their outcome."""
        token = secrets.token_hex(16)
        first: dict[str, Work] = {}
        for work in works:
            if first.setdefault(_claim_key(work), work) is not work:
                outcomes[id(work)] = _busy()  # twice in one unit: the first one decides
        if not first:
            return [], token
        lease_s = max(work.route.handler.options.timeout_s for work in works) + CLAIM_MARGIN_S
        answers = await self._claims.claim([(key, str(work.hash)) for key, work in first.items()], token, int(lease_s * 1000))
        granted = []
        for work, answer in zip(first.values(), answers, strict=True):
            if answer.state is ClaimState.GRANTED:
                granted.append(work)
            elif answer.state is ClaimState.DONE:
                outcomes[id(work)] = DUPLICATE
            elif answer.state is ClaimState.IN_PROGRESS:
                outcomes[id(work)] = _busy()
            else:
                outcomes[id(work)] = MessageError("id-reused", f"event {work.id} was handled before with another body")
        return granted, token

    async def _close(self, works: Sequence[Work], results: list[Outcome | None], token: str) -> None:
        """Write down what was done, give up the rest. What can't be written down now is: not by calling the handler again."""
        done = [work for work, result in zip(works, results, strict=True) if result == HANDLED]
        failed = [work for work, result in zip(works, results, strict=True) if result != HANDLED]
        try:
            if done:
                await self._complete(done, token)
        except UnavailableError as error:
            for n, work in enumerate(works):
                if results[n] == HANDLED:
                    work.claim, results[n] = token, error
        try:
            if failed:
                await self._claims.release([_claim_key(work) for work in failed], token)
        except UnavailableError as error:
            log.warning("%d claims can't be given up now and run out by themselves: %s", len(failed), error)

    async def _complete(self, works: Sequence[Work], token: str) -> None:
        kept = await self._claims.complete([(_claim_key(work), b"") for work in works], token, self._keep_ms)
        for work, was_ours in zip(works, kept, strict=True):
            if not was_ours:
                consumer = work.route.handler.consumer
                log.error("event %s: the claim of %s ran out before it was done", work.id, consumer, extra=about(work))


def _busy() -> RetryLater:
    return RetryLater(CLAIM_BUSY_WAIT_S, counted=False)


def _claim_key(work: Work) -> str:
    return f"inbox:{work.route.handler.consumer}:{work.id}"


class NoGuard:
    """Handlers that said `guard="none"`: at least once, as the broker delivers."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def run(self, works: Sequence[Work]) -> list[Outcome]:
        results: list[Outcome | None] = [None] * len(works)
        await self._caller.apart(works, results)
        return [result for result in results if result is not None]
