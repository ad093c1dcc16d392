"""What became of each delivery of a queue, told to whoever counts, measures or reads the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import anyio

from orderbus._core.ids import uuid7_time_ms
from orderbus._core.leaving import error_text
from orderbus._core.message import Incoming, Outgoing
from orderbus._core.policy import Again, bare
from orderbus._core.work import Work
from orderbus._runtime.environment import Environment
from orderbus._runtime.guard import HANDLED
from orderbus._runtime.outage import Outage
from orderbus._runtime.stats import QueueStats
from orderbus._runtime.tracing import cause_of, trace_ids
from orderbus.errors import MessageError, TransientError, UnavailableError

log = logging.getLogger("orderbus.consumer")

_PROCESSES = {"messaging.operation.name": "process"}


class Accounts:
    """The counts, histograms and log lines of one queue's consumer. No line has a key or a body: they may be about a person."""

    def __init__(self, queue: str, env: Environment, queue_stats: QueueStats) -> None:
        self._queue = queue
        self._env = env
        self._stats = env.stats
        self._queue_stats = queue_stats
        self._outage = Outage()

    def received(self, count: int) -> None:
        self._stats.received += count
        self._queue_stats.received += count

    def released(self) -> None:
        self._stats.released += 1
        self._queue_stats.released += 1

    def began(self) -> float:
        """When a unit begins, for `measure`."""
        return anyio.current_time() if self._env.metrics.records else 0.0

    def measure(self, works: Sequence[Work], outcomes: Sequence[str | Exception], began: float) -> None:
        metrics = self._env.metrics
        if not metrics.records:
            return
        took_s = anyio.current_time() - began
        consumer = works[0].route.handler.consumer
        attributes = {"messaging.system": self._env.tracing.system, **_PROCESSES, "orderbus.consumer": consumer}
        failed = next((bare(outcome) for outcome in outcomes if isinstance(outcome, Exception)), None)
        if failed is not None:
            metrics.process_duration.record(took_s, {**attributes, "error.type": type(failed).__name__})
        else:
            metrics.process_duration.record(took_s, attributes)
        made = [uuid7_time_ms(work.id) for work, outcome in zip(works, outcomes, strict=True) if outcome is HANDLED]
        if oldest_ms := min((ms for ms in made if ms is not None), default=None):
            metrics.lag.record(max(self._env.clock() - oldest_ms / 1000, 0.0), {"orderbus.consumer": consumer})

    def succeeded(self, works: Sequence[Work], outcomes: Sequence[str | Exception]) -> None:
        """Count those of a unit that were handled, now or before."""
        handled = sum(outcome is HANDLED for outcome in outcomes)
        duplicates = sum(isinstance(outcome, str) for outcome in outcomes) - handled
        consumer = works[0].route.handler.consumer
        counts = self._stats.handlers[consumer]
        self._stats.handled += handled
        counts.handled += handled
        self._stats.duplicates += duplicates
        counts.duplicate += duplicates
        if handled:
            self._outage.passed(consumer)

    def waits(self, work: Work, error: UnavailableError, delay_s: float) -> None:
        """A server is missing, or wants the transaction to be run again: no failure of the message."""
        consumer = work.route.handler.consumer
        self._stats.waited += 1
        self._stats.handlers[consumer].waited += 1
        if isinstance(error, TransientError):
            log.warning("%s: event %s: %s; again at once", consumer, work.id, _brief(error), extra=self._about(work, error))
        else:
            self._outage.met(consumer, work.id, _brief(error), delay_s, self._about(work, error))

    def failed(self, work: Work) -> None:
        self._stats.failed += 1
        self._stats.handlers[work.route.handler.consumer].failed += 1

    def retried(self, work: Work, error: Exception, decision: Again) -> None:
        consumer = work.route.handler.consumer
        if decision.counted:
            self._stats.retried += 1
            self._stats.handlers[consumer].count_retried(type(error).__name__)
        if log.isEnabledFor(logging.INFO):
            log.info(
                "%s: event %s: try %d: %s: again in %g s",
                consumer,
                work.id,
                work.attempt,
                _brief(error),
                decision.delay_s,
                extra=self._about(work, error),
            )

    def parked(self, work: Work) -> None:
        """It is in the dead letters."""
        log.error(
            "queue %s: message %s parked: %s: %s",
            self._queue,
            _name(work.incoming),
            work.parks_for,
            _brief(work.error),
            extra=self._about(work, work.error, work.parks_for),
        )
        self._count_parked(work.parks_for)

    def rejected(self, work: Work, error: MessageError) -> None:
        """One that was too large to be kept: the broker moves it to the dead letters itself."""
        log.error(
            "queue %s: a message is rejected into the dead letters: %s",
            self._queue,
            error,
            extra=self._about(work, error, error.reason),
        )
        self._count_parked(error.reason)

    def immovable(self, work: Work, outgoing: Outgoing) -> None:
        log.error(
            "queue %s: message %s can't be moved to %s",
            self._queue,
            _name(work.incoming),
            outgoing.routing_key,
            extra=self._about(work),
        )

    def _count_parked(self, reason: str) -> None:
        self._stats.parked += 1
        self._queue_stats.count_parked(reason)

    def _about(self, work: Work, error: BaseException | None = None, reason: str | None = None) -> dict[str, str]:
        """For whoever searches the log, by the names of the Elastic Common Schema where it has one."""
        about = {"orderbus.queue": self._queue}
        if work.id is not None:
            about["event.id"] = str(work.id)
        if work.route is not None:
            about["orderbus.consumer"] = work.route.handler.consumer
        if error is not None:
            about["error.type"] = type(error).__name__
        if reason is not None:
            about["event.reason"] = reason
        return about | trace_ids(cause_of(work))


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
