"""Metrics, by the conventions of OpenTelemetry for messaging and databases where those have a name for it.

Counters and gauges cost nothing while messages flow: they are the bus's own counts, read when somebody collects. Histograms are
recorded once a unit, not once a message, and told to the SDK some tens at a time: one record costs 5 µs, and several times that between
other work, where its code has to be fetched anew. docs/telemetry.md lists every name, unit and attribute.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from orderbus._runtime.stats import Stats
from orderbus._runtime.tracing import library_version, sends

log = logging.getLogger("orderbus.telemetry")

__all__ = ["Durations", "Metrics", "Observable", "meters"]

Attributes = Mapping[str, str | bool]
DURATIONS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
"""Bucket borders that have the targets of the demo among them: 200 ms, and 2 s from end to end."""
TOLD_TOGETHER = 64
_NO_SPAN = Context({"orderbus.told": "later"})
"""Of what is recorded later, so that it is no exemplar of whichever span is current then. An empty context would mean the current one."""


class Observable(Protocol):
    """What is read of an open bus."""

    @property
    def group(self) -> str: ...

    @property
    def system(self) -> str:
        """What the conventions call its broker."""

    @property
    def stats(self) -> Stats: ...

    def in_hand(self) -> Iterable[tuple[str, int, int]]:
        """Of each consumed queue, the unsettled deliveries and the most that there may be."""

    @property
    def buckets(self) -> int | None:
        """How many of the outbox's 64 buckets its relay holds; None where it runs none."""


class _Observed(NamedTuple):
    kind: Literal["counter", "gauge", "up_down_counter"]
    name: str
    unit: str
    description: str
    read: Callable[[Observable], Iterable[tuple[float, Attributes]]]


def _handled(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    for consumer, counts in list(bus.stats.handlers.items()):
        for outcome in ("handled", "duplicate", "failed", "retried", "waited"):
            yield getattr(counts, outcome), {"orderbus.consumer": consumer, "orderbus.outcome": outcome}


def _retried(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    for consumer, counts in list(bus.stats.handlers.items()):
        for error, count in list(counts.retried_for.items()):
            yield count, {"orderbus.consumer": consumer, "error.type": error}


def _parked(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    for queue, counts in list(bus.stats.queues.items()):
        for reason, count in list(counts.parked.items()):
            yield count, {**_of_queue(bus, queue), "orderbus.reason": reason}


def _sent(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    for outcome in ("relayed", "published", "dropped", "stuck"):
        yield getattr(bus.stats, outcome), {**sends(bus.system), "orderbus.group": bus.group, "orderbus.outcome": outcome}


def _received(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    for queue, counts in list(bus.stats.queues.items()):
        receives = {"messaging.system": bus.system, "messaging.operation.name": "receive"}
        yield counts.received, {**receives, **_of_queue(bus, queue)}


def _of_queues(field: str) -> Callable[[Observable], Iterable[tuple[float, Attributes]]]:
    def read(bus: Observable) -> Iterable[tuple[float, Attributes]]:
        for queue, counts in list(bus.stats.queues.items()):
            yield getattr(counts, field), _of_queue(bus, queue)

    return read


def _of_outbox(field: str) -> Callable[[Observable], Iterable[tuple[float, Attributes]]]:
    def read(bus: Observable) -> Iterable[tuple[float, Attributes]]:
        if bus.stats.outbox is not None:
            yield getattr(bus.stats.outbox, field), {"orderbus.group": bus.group}

    return read


def _in_hand(at: int) -> Callable[[Observable], Iterable[tuple[float, Attributes]]]:
    def read(bus: Observable) -> Iterable[tuple[float, Attributes]]:
        for queue, *counts in bus.in_hand():
            yield counts[at], _of_queue(bus, queue)

    return read


def _buckets(bus: Observable) -> Iterable[tuple[float, Attributes]]:
    if bus.buckets is not None:
        yield bus.buckets, {"orderbus.group": bus.group}


def _of_queue(bus: Observable, queue: str) -> Attributes:
    return {"messaging.consumer.group.name": bus.group, "messaging.destination.subscription.name": queue}


OBSERVED: Sequence[_Observed] = (
    _Observed("counter", "messaging.client.consumed.messages", "{message}", "Deliveries received.", _received),
    _Observed("counter", "messaging.client.sent.messages", "{message}", "Events that left, by what became of them.", _sent),
    _Observed("counter", "orderbus.handled", "{message}", "Tries of handlers, by what became of them.", _handled),
    _Observed("counter", "orderbus.retried", "{message}", "Tries that are made again, by what they raised.", _retried),
    _Observed("counter", "orderbus.dead_letters", "{message}", "Messages moved to the dead letters.", _of_queues("letters")),
    _Observed("counter", "orderbus.parked", "{message}", "Messages moved to the dead letters, by reason.", _parked),
    _Observed("counter", "orderbus.released", "{message}", "Deliveries given back to the broker.", _of_queues("released")),
    _Observed("counter", "orderbus.reconnects", "{connection}", "Times a queue was consumed anew.", _of_queues("reconnects")),
    _Observed(
        "counter",
        "orderbus.emitted",
        "{message}",
        "Events of committed transactions.",
        lambda bus: [(bus.stats.emitted, {"orderbus.group": bus.group})],
    ),
    _Observed("up_down_counter", "orderbus.deliveries.in_hand", "{message}", "Deliveries that are unsettled.", _in_hand(0)),
    _Observed("up_down_counter", "orderbus.deliveries.limit", "{message}", "The most there may be: the prefetch.", _in_hand(1)),
    _Observed("gauge", "orderbus.outbox.waiting", "{message}", "Rows of this relay's buckets.", _of_outbox("waiting")),
    _Observed("gauge", "orderbus.outbox.age", "s", "How long the oldest of them has waited.", _of_outbox("oldest_s")),
    _Observed("gauge", "orderbus.outbox.stuck", "{message}", "Rows that could not be published.", _of_outbox("stuck")),
    _Observed("gauge", "orderbus.relay.buckets", "{bucket}", "Buckets that this relay holds; 64 in all.", _buckets),
)


class Durations:
    """A histogram of seconds, recorded from any thread. What waits to be told is told, at the latest, when somebody collects."""

    def __init__(self, histogram: metrics.Histogram) -> None:
        self._histogram = histogram
        self._waiting: deque[tuple[float, Attributes]] = deque()

    def record(self, seconds: float, attributes: Attributes) -> None:
        self._waiting.append((seconds, attributes))
        if len(self._waiting) >= TOLD_TOGETHER:
            self.tell()

    def tell(self) -> None:
        while True:
            try:
                seconds, attributes = self._waiting.popleft()  # a reader on its own thread may take the last one before us
            except IndexError:
                return
            try:
                self._histogram.record(seconds, attributes, _NO_SPAN)
            except Exception:  # a view or filter of the user's: no message suffers for it
                log.exception("a duration can't be recorded")


class Metrics:
    """The instruments of a process."""

    def __init__(self, provider: MeterProvider) -> None:
        self.records = not type(provider).__module__.startswith("opentelemetry.metrics")
        """Whether an SDK is installed: those of the API itself record nothing."""
        meter = provider.get_meter("orderbus", library_version())
        self._lock = threading.Lock()
        self._buses: set[Observable] = set()
        self._ended: dict[str, Counter[frozenset[tuple[str, str | bool]]]] = {}
        """Of each counter what buses have counted that are closed: the last export comes after the last of them."""

        self._durations: list[Durations] = []

        def histogram(name: str, description: str) -> Durations:
            made = meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=DURATIONS_S)
            self._durations.append(Durations(made))
            return self._durations[-1]

        self.process_duration = histogram("messaging.process.duration", "From the begin of a unit's handlers to its commit.")
        self.operation_duration = histogram("messaging.client.operation.duration", "From a publish to its last confirm.")
        self.lag = histogram(
            "orderbus.lag", "From an event's emission to the commit of what handled it; the oldest of each unit."
        )
        self.drain_duration = histogram("orderbus.drain.duration", "How long stops took.")
        self.connection_wait = histogram("db.client.connection.wait_time", "How long a transaction waited for its connection.")
        for one in OBSERVED:
            create = getattr(meter, f"create_observable_{one.kind}")
            create(one.name, [functools.partial(self._read, one)], one.unit, one.description)

    def watch(self, bus: Observable) -> None:
        """Read this bus, too, whenever somebody collects, until it is forgotten."""
        if self.records:
            self._buses.add(bus)

    def forget(self, bus: Observable) -> None:
        """The bus is closed. What it has counted stays counted."""
        with self._lock:  # a reader on its own thread would see what is counted here nowhere for a moment, or twice
            if bus in self._buses:
                self._buses.discard(bus)
                for observed in OBSERVED:
                    if observed.kind == "counter":
                        self._add(observed, bus, self._ended.setdefault(observed.name, Counter()))

    def _read(self, observed: _Observed, _: CallbackOptions) -> Iterable[Observation]:
        for durations in self._durations:
            durations.tell()
        with self._lock:
            found = Counter(self._ended.get(observed.name, {}))
            for bus in list(self._buses):
                self._add(observed, bus, found)
        return [Observation(value, dict(attributes)) for attributes, value in found.items()]

    @staticmethod
    def _add(observed: _Observed, bus: Observable, to: Counter[frozenset[tuple[str, str | bool]]]) -> None:
        for value, attributes in observed.read(bus):
            key = frozenset(attributes.items())
            if observed.unit == "s":
                to[key] = max(to[key], value)  # type: ignore[assignment]  # the age of the oldest, in seconds
            else:
                to[key] += int(value)


@functools.lru_cache(maxsize=4)
def _metrics_of(provider: MeterProvider) -> Metrics:
    return Metrics(provider)


def meters() -> Metrics:
    """The instruments of the provider that is installed now; asked for when a bus is opened."""
    return _metrics_of(metrics.get_meter_provider())
