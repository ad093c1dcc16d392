"""What a bus has done since it started: plain counters, read by the drain's receipt, by telemetry and by tests."""

from __future__ import annotations

import msgspec

from orderbus.abc import Backlog

MOST_REASONS = 50
"""Of one queue or handler. A handler may park for any reason and raise any class, and each is a time series."""


def _count(counts: dict[str, int], reason: str) -> None:
    if reason not in counts and len(counts) >= MOST_REASONS:
        reason = "other"
    counts[reason] = counts.get(reason, 0) + 1


class HandlerStats(msgspec.Struct):
    """Of one handler, by what became of its tries."""

    handled: int = 0
    duplicate: int = 0
    failed: int = 0
    """Tries that raised, whatever followed."""
    retried: int = 0
    waited: int = 0
    retried_for: dict[str, int] = msgspec.field(default_factory=dict)
    """Those that were retried, by the class of what they raised: the first 50 that came up, and `other`."""

    def count_retried(self, error: str) -> None:
        _count(self.retried_for, error)
        self.retried += 1


class QueueStats(msgspec.Struct):
    """Of one consumed queue."""

    received: int = 0
    released: int = 0
    reconnects: int = 0
    letters: int = 0
    """Messages parked, whatever the reason."""
    parked: dict[str, int] = msgspec.field(default_factory=dict)
    """By reason: the first 50 that came up, and `other`."""

    def count_parked(self, reason: str) -> None:
        _count(self.parked, reason)
        self.letters += 1


class Stats(msgspec.Struct):
    received: int = 0
    handled: int = 0
    duplicates: int = 0
    failed: int = 0
    """Handler calls that raised, whatever followed."""
    retried: int = 0
    """Tries that the policy granted, in the process or through the ladder."""
    parked: int = 0
    released: int = 0
    waited: int = 0
    """Uncounted tries: a server was missing, or the database asked to run the transaction again."""
    reconnects: int = 0
    relayed: int = 0
    stuck: int = 0
    dropped: int = 0
    """Events that nobody was bound to, of classes that say `unrouted="drop"`."""
    published: int = 0
    emitted: int = 0
    handlers: dict[str, HandlerStats] = msgspec.field(default_factory=dict)
    queues: dict[str, QueueStats] = msgspec.field(default_factory=dict)
    outbox: Backlog | None = None
    """What waits for this process's relay, as it last looked; None where it runs none, or nobody collects metrics."""


class DrainReceipt(msgspec.Struct, frozen=True):
    """What a stop did: nothing is abandoned in silence."""

    finished: int
    """Deliveries that were running when the stop began and finished inside the grace time."""
    released: int
    """Deliveries given back to the broker untouched, or after their transaction was rolled back."""
    cancelled: int
    """Deliveries that were cancelled when the grace time ended (among those released), and rounds of periodic functions."""
    clean: bool
    """Whether everything started finished in time and every settlement reached the broker."""
    seconds: float
    stats: Stats
